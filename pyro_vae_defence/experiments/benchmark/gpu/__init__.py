"""The benchmark of a GPU: one study, and a file per section."""
