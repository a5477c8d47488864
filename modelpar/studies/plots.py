"""Draw figures 1, 3 and 4, the activations, and the learning curves of a comparison."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from modelpar.analysis.activations import Activity
from modelpar.analysis.kernels import COLOUR_SHARE, RANDOM_SHARE, kernel_picture
from modelpar.analysis.neighbours import NEAREST, Example
from modelpar.studies.comparison import Group
from modelpar.studies.runs import GOAL, Run
from modelpar.studies.snapshots import Kernels, Snapshot

DPI: Final = 200
COLUMNS: Final = ("#4d4d4d", "#d9534f")  # column 0, column 1
LINES: Final = {"relu": "-", "tanh": "--", "sigmoid": ":", "elu": "-."}  # figure 1: tanh is dashed
GREY, RED, BLUE = "#8c8c8c", "#d9534f", "#9ecae1"  # figure 4: the correct class is red
DOTTED: Final = (0, (1, 2))
PREDICTIONS_PER_ROW: Final = 4  # figure 4
LONGEST_NAME: Final = 24  # characters of a class's name that fit on a bar
LEGEND: Final = 130  # characters in a row of learning_curves' legend
POINTS: Final = 40  # of a training loss's curve, each a mean over as many steps

STYLE: Final[Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 7,
    "legend.frameon": False,
    "text.parse_math": False,  # names of classes and runs hold dollar signs and underscores
}


def _plain(name: str) -> str:
    """Return a name as matplotlib draws it: valid Unicode, and not hidden from legends by "_"."""
    text = name.encode(errors="backslashreplace").decode()
    return f" {text}" if text.startswith("_") else text


@mpl.rc_context(STYLE)
def figure1(runs: Sequence[Run]) -> Figure:
    """Draw training error over epochs, with a ring where it first is 25 %."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    panel = figure.subplots()
    panel.axhline(GOAL, color=GREY, lw=0.7, ls=DOTTED)
    colours: dict[str, str] = {}  # all seeds of an experiment have the same colour
    for run in runs:
        label = None if run.label in colours else _plain(f"{run.label} ({run.activation})")
        look: Any = {"color": colours.setdefault(run.label, f"C{len(colours)}")}
        points = run.curve()
        marker = "." if len(points) == 1 else ""  # a line through one point is not visible
        style = marker + LINES[run.activation]
        panel.plot(*zip(*points, strict=True), style, lw=1.2, label=label, **look)
        if (time := run.epochs_to_goal()) is not None:
            panel.plot(time, GOAL, "o", ms=5, mfc="white", **look)
    panel.set(xlabel="epochs", ylabel="training error, %")
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    panel.legend()
    return figure


@mpl.rc_context(STYLE)
def figure3(sources: Sequence[Kernels]) -> Figure:
    """Draw the kernels of each column, and each kernel as a point of frequency and colour."""
    heights = [0.55 + 1.4 * max(1.25, len(one.columns)) for one in sources]  # inches
    figure = Figure(figsize=(9.2, sum(heights)), layout="constrained")
    panels: Any = figure.subfigures(len(sources), 1, squeeze=False, height_ratios=heights)
    for panel, one in zip(panels[:, 0], sources, strict=True):
        _kernels(panel, one)
    return figure


def _kernels(panel: FigureBase, one: Kernels) -> None:
    panel.suptitle(_plain(f"{one.name}, step {one.step}"), weight="bold")
    grid = panel.add_gridspec(len(one.columns), 2, width_ratios=[2.5, 1])
    points = panel.add_subplot(grid[:, 1])
    for column, found in enumerate(one.columns):
        share, cycles = found.colour_share, found.frequency
        caption = (
            f"column {column}: colour share {share.mean():.2f} ± {share.std():.2f}, "
            f"{found.colour_kernels} of {len(share)} colour kernels, "
            f"{cycles.mean():.2f} ± {cycles.std():.2f} cycles/pixel"
        )
        _image(panel.add_subplot(grid[column, 0]), kernel_picture(found.kernels, 1), caption)
        look: Any = {"c": COLUMNS[column], "label": f"column {column}"}
        points.scatter(cycles, share, s=9, alpha=0.75, lw=0, **look)
    for height, text, side in (
        (RANDOM_SHARE, "random kernels", "top"),
        (COLOUR_SHARE, "colour kernels", "bottom"),
    ):
        points.axhline(height, color=GREY, lw=0.7, ls=DOTTED)
        points.text(0.005, height, text, fontsize=6, color=GREY, va=side)
    points.set(xlim=(0, 0.5**0.5), ylim=(0, 1))  # one cycle in two pixels, down and across
    points.set(xlabel="cycles/pixel", ylabel="colour share")
    points.legend(loc="lower left", handletextpad=0)


@mpl.rc_context(STYLE)
def figure4(snapshot: Snapshot) -> Figure:
    """Draw both halves: the most likely classes, and the nearest training images."""
    found, classes = (
        snapshot.figure4,
        [_plain(name.replace("_", " ")[:LONGEST_NAME]) for name in snapshot.classes],
    )
    figure = Figure(figsize=(13.2, 5.4), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[1, 1.12], wspace=0.04)
    left, right = halves
    left.suptitle("test images and their five most likely classes")
    searched = f"{found.searched:,} training images, by the last hidden layer"
    right.suptitle(f"test images and the nearest of {searched}")
    rows = -(-len(found.predictions) // PREDICTIONS_PER_ROW)
    panels = left.subplots(2 * rows, PREDICTIONS_PER_ROW, height_ratios=[1.6, 1] * rows)
    pairs = zip(panels[::2].flat, panels[1::2].flat, strict=True)
    for (above, below), one in zip(pairs, found.predictions, strict=False):
        _image(above, one.image, classes[one.label], weight="bold")
        _bars(below, one, classes)
    panels = right.subplots(len(found.neighbours), 1 + NEAREST, squeeze=False)
    for (first, *others), one in zip(panels, found.neighbours, strict=True):
        _image(first, one.query, classes[one.label], weight="bold")
        for panel, (image, label, distance) in zip(others, one.nearest, strict=False):
            _image(panel, image, f"{distance:.3g}", color="black" if label == one.label else RED)
    for panel in figure.axes:
        if not panel.has_data():
            panel.set_axis_off()
    return figure


def _bars(panel: Axes, one: Example, classes: Sequence[str]) -> None:
    colours = [RED if found == one.label else BLUE for found in one.classes]
    panel.barh(range(len(one.classes)), one.probabilities, color=colours, height=0.82)
    for place, found in enumerate(one.classes):
        panel.text(0.02, place, classes[found], va="center")
    panel.set(xlim=(0, 1), ylim=(len(one.classes) - 0.4, -0.6), xticks=[], yticks=[])
    panel.spines[:].set(linewidth=0.6, visible=True)


def _image(panel: Axes, image: Tensor, text: str, **font: Any) -> None:
    """Show an image (3, H, W) with a text below it, without a frame."""
    panel.imshow(image.permute(1, 2, 0).numpy())
    panel.set(xticks=[], yticks=[], frame_on=False)
    panel.set_xlabel(text, labelpad=3, **font)


@mpl.rc_context(STYLE)
def activations(rows: Sequence[Activity]) -> Figure:
    """Draw the size of each layer's activations in each column, zeros, and dead maps."""
    figure = Figure(figsize=(9.2, 2.7), layout="constrained")
    layers = list(dict.fromkeys(row.layer for row in rows))
    size, zeros, dead = figure.subplots(1, 3)
    for row in rows:
        offset = 0.0 if row.column is None else 0.36 * row.column - 0.18
        place = layers.index(row.layer) + offset
        colour = BLUE if row.column is None else COLUMNS[row.column]
        size.plot(place, row.std, "_", ms=7, mew=1.4, color=colour)
        size.plot(place, abs(row.mean), "o", ms=4, color=colour, mec="none")
        if row.column is not None:
            label = f"column {row.column}" if row.layer == layers[0] else None
            zeros.bar(place, 100 * row.zeros, 0.34, color=colour, label=label)
            dead.bar(place, 100 * row.dead, 0.34, color=colour)
    for panel in (size, zeros, dead):
        panel.set_xticks(range(len(layers)), layers, rotation=45)
    size.set(title="size of the mean (dot), standard deviation (bar)", yscale="log")
    zeros.set(title="zero after the activation, %", ylim=(0, 100))
    dead.set(title="maps and units that are zero for all images, %")
    zeros.legend()
    return figure


@mpl.rc_context(STYLE)
def learning_curves(groups: Sequence[Group]) -> Figure:
    """Draw training loss and test error over steps for each group, as means over the seeds."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title="training loss", xlabel="step")
    right.set(title="test top-1 error, %", xlabel="step")
    for one in groups:
        runs = list(one.counted.values()) or [run for run in one.runs if run.losses and run.tests]
        if runs:
            steps, losses = mean_curve([dict(run.losses) for run in runs])
            left.plot(*smoothed(steps, losses), label=_plain(one.label), lw=1.4)
            tests = [{step: top1 for step, top1, _ in run.tests} for run in runs]
            right.plot(*mean_curve(tests), marker="o", ms=3)
    longest = max(len(one.label) for one in groups)
    figure.legend(loc="outside lower center", ncols=max(1, min(5, LEGEND // (longest + 10))))
    return figure


def mean_curve(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], list[float]]:
    """Return the steps that all curves have, and the means over the curves."""
    common = sorted(set.intersection(*map(set, curves)))
    return common, [mean(curve[step] for curve in curves) for step in common]


def smoothed(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return the means over ``POINTS`` parts of a curve, each at the last step of its part."""
    size = max(1, len(steps) // POINTS)
    parts = [slice(first, first + size) for first in range(0, len(steps), size)]
    return [steps[part][-1] for part in parts], [mean(values[part]) for part in parts]
