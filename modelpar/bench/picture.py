"""The picture of a benchmark: bars of speed, and a timeline of one step on both columns."""

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from modelpar.bench.anatomy import PLACES

COLOURS: Final = {
    **dict(
        zip(
            ("conv1", "conv2", "conv3", "conv4", "conv5"),
            ("#08306b", "#2171b5", "#4292c6", "#6baed6", "#9ecae1"),
            strict=True,
        )
    ),
    **dict(zip(("fc6", "fc7", "fc8"), ("#00441b", "#238b45", "#74c476"), strict=True)),
    "norms": "#fdae61",
    "pools": "#fee08b",
    "update": "#9e9ac8",
    "crossings": "#d7191c",
    "rest": "#bdbdbd",
}
TRAVEL: Final = "#f4a3a3"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of ``result`` as a PNG."""
    mpl.use("Agg")
    sizes = [peaks["batch_size"] for peaks in result["peaks"]]
    timelines: dict[str, Any] = result["timelines"]
    heights = [0.32 * len(result["rows"]) / len(sizes) + 0.6] * len(sizes)
    heights += [1.6] * len(timelines)
    figure, axes = plt.subplots(
        len(heights),
        figsize=(10, sum(heights) + 0.6),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    panels: list[Axes] = list(axes[:, 0])
    for size, panel in zip(sizes, panels, strict=False):
        _bars(panel, [row for row in result["rows"] if row["batch_size"] == size], size)
    for (title, ranks), panel in zip(timelines.items(), panels[len(sizes) :], strict=True):
        _timeline(panel, title, ranks)
    if timelines:
        patches = [Patch(color=COLOURS[place], label=place) for place in PLACES]
        patches.append(Patch(color=TRAVEL, label="a swap under way"))
        figure.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(panel: Axes, rows: list[dict[str, Any]], batch_size: int) -> None:
    names, places = [], range(len(rows))
    for place, row in zip(places, rows, strict=True):
        speed = row["images_per_s"]
        ours = row["contender"] == "pair"
        panel.barh(place, speed["median"], color="#2171b5" if ours else "#bdbdbd")
        panel.plot([speed["low"], speed["high"]], [place, place], color="black", lw=1)
        ratio = row["ratios"].get("plain float32")
        note = f" {speed['median']:.1f}" + (f"   x {ratio['median']:.2f}" if ratio else "")
        panel.text(max(speed["high"], speed["median"]), place, note, va="center", fontsize=8)
        rate = "" if row["link_mbit"] is None else f", {row['link_mbit']:g} Mbit/s"
        names.append(f"{row['contender']}, {row['precision']}{rate}")
    panel.set_yticks(places, names, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(
        f"images/s at batch {batch_size}, and times the speed of plain float32", fontsize=9
    )


def _timeline(panel: Axes, title: str, ranks: list[list[dict[str, Any]]]) -> None:
    for rank, spans in enumerate(ranks):
        for span in spans:
            begin, length = span["from"], span["to"] - span["from"]
            travels = span["place"] == "travel"
            top = 2.5 * rank + (0.0 if travels else 0.6)
            colour = TRAVEL if travels else COLOURS[span["place"]]
            panel.broken_barh([(begin, length)], (top, 0.45 if travels else 1.4), color=colour)
    panel.set_yticks([2.5 * rank + 1.2 for rank in range(len(ranks))], _columns(len(ranks)))
    panel.invert_yaxis()
    panel.set_xlim(left=0)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(f"one step of the pair in s: {title}", fontsize=9)


def _columns(count: int) -> list[str]:
    return [f"column {number}" for number in range(count)]
