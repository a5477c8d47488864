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
h1 { font-size: 1.5rem }
h2 { font-size: 1.15rem; margin: 1.5rem 0 .5rem }
section { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px }
th, td { border-bottom: 1px solid #8884; padding: .35rem .6rem }
th, td { text-align: left; vertical-align: top }
td { white-space: nowrap }
td:nth-child(9) { min-width: 8rem; white-space: normal }
tr > :first-child { background: Canvas; left: 0; position: sticky }
td:first-child { min-width: 6rem; white-space: normal }
td:last-child { min-width: 13rem; white-space: normal }
svg { background: white; display: block; height: auto; margin: 1.25rem 0 }
svg { max-width: 100%; min-width: 40rem }
@media (prefers-color-scheme: dark) { svg { filter: invert(.93) hue-rotate(180deg) } }
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
        shows = escape(f"{data}: training loss and test error over the steps")
        parts.append(f'{table}<section><svg role="img" aria-label="{shows}"{svg}</section>')
    notes = [*comparison.notes(sets)] if sets else []
    if averaged:
        parts.append(_table(averages.TITLE, averages.HEAD, averaged))
        notes.append(averages.NOTE)
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    return html.page(TITLE, STYLE, "\n".join(["<h1>Comparison of runs</h1>", *parts]))


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = "".join(_row(cells, "td") for cells in rows)
    return f"<h2>{escape(title)}</h2><section><table>{_row(head, 'th')}{lines}</table></section>"


def _row(cells: Sequence[str], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{html.breakable(cell)}</{kind}>" for cell in cells) + "</tr>"
