"""What tests do to copies of published result files."""

from __future__ import annotations

import json


def change(path, places, value):
    """Put a value at a place of a result file, such as ``["radii", "0.2"]``."""
    found = json.loads(path.read_text())
    entry = found
    for place in places[:-1]:
        entry = entry[place]
    entry[places[-1]] = value
    path.write_text(json.dumps(found))
