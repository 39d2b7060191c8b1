"""The paper: its printed numbers, and what makes each of its tables and figures here."""
