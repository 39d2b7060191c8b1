"""Pages of reports in HTML: a frame and tables, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { font-weight: 600; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bad { color: #a40000; } .good { color: #1a6b1a; } .note { color: #555; }
section { border-top: 2px solid #1c1c1c; margin-top: 2.5rem; }
svg { max-width: 100%; height: auto; }
img.examples { image-rendering: pixelated; max-width: 100%; }
"""  # noqa: E501


def page(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def interval(entry: Mapping[str, float]) -> str:
    """An estimate and its interval, ``low`` to ``high``."""
    return f"{entry['estimate']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what stands in ``rows`` is HTML."""

    def cells(kind: str, texts: Iterable[str]) -> str:
        tag = kind.split()[0]
        return "<tr>" + "".join(f"<{kind}>{text}</{tag}>" for text in texts) + "</tr>"

    lines = [cells("th", map(escape, head)), *(cells('td class="number"', row) for row in rows)]
    return "<table>" + "\n".join(lines) + "</table>"
