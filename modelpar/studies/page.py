"""A comparison as one HTML page without external files: tables and learning curves."""

import io
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Final

import matplotlib as mpl

from modelpar.studies import comparison, plots
from modelpar.studies.comparison import Group

PAGE: Final = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>modelpar: comparison of runs</title><style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
div { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .7rem; text-align: left }
td { white-space: nowrap }
td:first-child, td:last-child { min-width: 14rem; white-space: normal }
svg { background: #fff; height: auto; max-width: 100% }
</style></head><body>
$body
</body></html>
""")


def page(sets: dict[str, list[Group]]) -> str:
    """Return the page."""
    parts: list[str] = []
    for data, groups in sets.items():
        lines = [
            _row(comparison.HEAD, "th"),
            *(_row(one, "td") for one in comparison.rows(groups)),
        ]
        table = f"<div><table>{''.join(lines)}</table></div>"
        parts += [f"<h2>{escape(data)}</h2>", table, _svg(groups)]
    parts += [f"<p>{escape(note)}</p>" for note in comparison.notes(sets)]
    return PAGE.substitute(body="\n".join(parts))


def _row(cells: Sequence[str], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"


def _svg(groups: Sequence[Group]) -> str:
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "modelpar"}):  # the same runs give the same page
        plots.learning_curves(groups).savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
