"""A comparison of runs: tables on the screen and as CSV, and one HTML page with curves."""

import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from modelpar import tables
from modelpar.files import write_texts
from modelpar.schemas import CompareSettings
from modelpar.studies import averages, comparison, html, plots, runs
from modelpar.studies.comparison import Group

TITLE: Final = "modelpar: comparison of runs"
STYLE: Final = """\
table { border-collapse: collapse; display: block; font-size: 14px; overflow-x: auto }
tr:first-child { font-weight: bold }
td { border-bottom: 1px solid #8884; padding: .35rem .7rem; white-space: nowrap }
td:first-child, td:last-child { min-width: 14rem; white-space: normal }
svg { background: white; height: auto; max-width: 100% }
"""


def compare(settings: CompareSettings) -> None:
    """Print the tables as Markdown; write them as CSV and as an HTML page with curves."""
    patterns, files = averages.find(settings.runs)
    sets = comparison.group([runs.read(folder) for folder in runs.find(patterns)])
    rows = averages.rows(files)
    texts = {"compare.html": page(sets, rows)}
    if sets:
        print(comparison.markdown(sets))  # noqa: T201
        texts["compare.csv"] = comparison.as_csv(sets)
    if rows:
        table = tables.markdown(averages.HEAD, rows)
        print(f"\n**{averages.TITLE}**\n\n{table}\n\n{averages.NOTE}")  # noqa: T201
        texts["averages.csv"] = tables.comma_separated(averages.HEAD, rows)
    write_texts(settings.out, texts)
    print(f"\n{settings.out}: {', '.join(texts)}")  # noqa: T201


def page(sets: dict[str, list[Group]], averaged: Sequence[Sequence[str]] = ()) -> str:
    """Return the page; ``averaged`` are the rows of averaged nets."""
    parts: list[str] = []
    for data, groups in sets.items():
        table = _table(data, comparison.HEAD, comparison.rows(groups))
        picture = io.StringIO()
        plots.learning_curves(groups).savefig(picture, format="svg", metadata={"Date": None})
        svg = picture.getvalue().partition("<svg")[2]
        parts.append(f"{table}<svg{svg}")
    notes = [*comparison.notes(sets)] if sets else []
    if averaged:
        parts.append(_table(averages.TITLE, averages.HEAD, averaged))
        notes.append(averages.NOTE)
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    return html.page(TITLE, STYLE, "\n".join(parts))


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = "".join(_row(cells) for cells in (head, *rows))
    return f"<h2>{escape(title)}</h2><table>{lines}</table>"


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
