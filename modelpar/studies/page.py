"""The comparison as one page of HTML that needs nothing else: tables and learning curves."""

import io
from collections.abc import Sequence
from html import escape
from statistics import mean
from typing import Final

import matplotlib as mpl
from matplotlib import pyplot as plt

from modelpar.studies import comparison
from modelpar.studies.comparison import Group

SMOOTH: Final = 40  # a curve's points are means over this part of its length
STYLE: Final = """
:root { color-scheme: light dark }
div { overflow-x: auto }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; font-size: 14px }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .7rem; text-align: left }
td:nth-child(n+2):nth-child(-n+6), td:nth-child(8), td:nth-child(9) { white-space: nowrap }
td:last-child { min-width: 16rem }
svg { background: #fff; height: auto; max-width: 100% }
"""


def page(sets: dict[str, list[Group]]) -> str:
    """Return the page."""
    parts = [f"<p>{comparison.APART}</p>"] if len(sets) > 1 else []
    for data, groups in sets.items():
        parts += [f"<h2>{escape(data)}</h2>", _table(groups), curves(groups)]
    lines = [*comparison.left_out(sets), comparison.BESIDE]
    body = "\n".join([*parts, *(f"<p>{escape(line)}</p>" for line in lines)])
    named = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{named}<title>modelpar: runs compared</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _table(groups: Sequence[Group]) -> str:
    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    lines = [
        line(comparison.HEAD, "th"),
        *(line(cells, "td") for cells in comparison.rows(groups)),
    ]
    return f"<div><table>{''.join(lines)}</table></div>"


def curves(groups: Sequence[Group]) -> str:
    """Return an SVG of training loss and test error over the steps, means over the seeds."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "modelpar"  # the same page from the same runs
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for one in groups:
        runs = list(one.counted.values()) or [run for run in one.runs if run.losses and run.tests]
        if not runs:
            continue
        steps, losses = smoothed([run.losses for run in runs])
        left.plot(steps, losses, label=one.label, lw=1.4)
        tests = [{step: top1 for step, top1, _ in run.tests} for run in runs]
        common = sorted(set.intersection(*(set(test) for test in tests)))
        right.plot(
            common, [mean(test[step] for test in tests) for step in common], marker="o", ms=3
        )
    for panel, title in ((left, "training loss"), (right, "test top-1 error, %")):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def smoothed(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float]]:
    """Return the means of the curves over equal stretches of the steps that all have."""
    by_step = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(curve) for curve in by_step))) if by_step else []
    size = max(1, len(common) // SMOOTH)
    stretches = [common[first : first + size] for first in range(0, len(common), size)]
    losses = [mean(curve[step] for curve in by_step for step in stretch) for stretch in stretches]
    return [stretch[-1] for stretch in stretches], losses
