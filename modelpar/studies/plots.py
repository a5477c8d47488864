"""Draw figures 1, 3 and 4, the activations, and the learning curves of a comparison."""

from collections.abc import Sequence
from statistics import mean
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from modelpar.analysis.activations import Activity
from modelpar.analysis.kernels import COLOUR_SHARE, RANDOM_SHARE, kernel_picture
from modelpar.analysis.neighbours import NEAREST, Neighbours, Prediction
from modelpar.studies import curves
from modelpar.studies.comparison import Group
from modelpar.studies.runs import Run
from modelpar.studies.snapshots import Kernels, Snapshot

DPI: Final = 200
COLUMNS: Final = ("#4d4d4d", "#d9534f")  # column 0, column 1
LINES: Final = {"relu": "-", "tanh": "--", "sigmoid": ":", "elu": "-."}  # figure 1: tanh is dashed
GREY, RED, BLUE = "#8c8c8c", "#d9534f", "#9ecae1"  # figure 4: the correct class is red
DOTTED: Final = (0, (1, 2))
SMALL: Final = 7  # points
PREDICTIONS_PER_ROW: Final = 4  # figure 4
LONGEST_NAME: Final = 24  # characters of a class's name that fit on a bar
POINTS: Final = 40  # of a training loss's curve, each a mean over as many steps


def figure1(runs: Sequence[Run]) -> Figure:
    """Draw training error over epochs, with a ring where it first is 25 %."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    panel = figure.subplots()
    panel.axhline(curves.GOAL, color=GREY, lw=0.7, ls=DOTTED)
    colours: dict[str, str] = {}  # all seeds of an experiment have the same colour
    for run in runs:
        points, activation = curves.curve(run), curves.activation(run)
        label = None if run.label in colours else f"{run.label} ({activation})"
        look: Any = {"color": colours.setdefault(run.label, f"C{len(colours)}")}
        panel.plot(*zip(*points, strict=True), LINES[activation], lw=1.2, label=label, **look)
        if (time := curves.epochs_to(points)) is not None:
            panel.plot(time, curves.GOAL, "o", ms=5, mfc="white", **look)
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    _plain(panel, "epochs", "training error, %")
    panel.legend(frameon=False, fontsize=SMALL)
    return figure


def figure3(sources: Sequence[Kernels]) -> Figure:
    """Draw the kernels of each column, and each kernel as a point of frequency and colour."""
    heights = [0.55 + 1.4 * max(1.25, one.columns) for one in sources]  # inches
    figure = Figure(figsize=(9.2, sum(heights)), layout="constrained")
    panels: Any = figure.subfigures(len(sources), 1, squeeze=False, height_ratios=heights)
    for panel, one in zip(panels[:, 0], sources, strict=True):
        _kernels(panel, one)
    return figure


def _kernels(panel: FigureBase, one: Kernels) -> None:
    panel.suptitle(f"{one.name}, step {one.step}", fontsize=8, weight="bold")
    grid = panel.add_gridspec(one.columns, 2, width_ratios=[2.5, 1])
    points = panel.add_subplot(grid[:, 1])
    parts = one.weight.chunk(one.columns)
    for column, (weight, found) in enumerate(zip(parts, one.found, strict=True)):
        share, cycles = found.colour_share, found.frequency
        caption = (
            f"column {column}: colour share {share.mean():.2f} ± {share.std():.2f}, "
            f"{found.colour_kernels} of {len(weight)} colour kernels, "
            f"{cycles.mean():.2f} ± {cycles.std():.2f} cycles/pixel"
        )
        _image(panel.add_subplot(grid[column, 0]), kernel_picture(weight, 1), caption)
        look: Any = {"c": COLUMNS[column], "label": f"column {column}"}
        points.scatter(cycles, share, s=9, alpha=0.75, lw=0, **look)
    for height, text, side in (
        (RANDOM_SHARE, "random kernels", "top"),
        (COLOUR_SHARE, "colour kernels", "bottom"),
    ):
        points.axhline(height, color=GREY, lw=0.7, ls=DOTTED)
        points.text(0.005, height, text, fontsize=SMALL - 1, color=GREY, va=side)
    points.set(xlim=(0, 0.5**0.5), ylim=(0, 1))  # one cycle in two pixels, down and across
    _plain(points, "cycles/pixel", "colour share")
    points.legend(frameon=False, fontsize=SMALL - 1, loc="lower left", handletextpad=0)


def figure4(snapshot: Snapshot) -> Figure:
    """Draw both halves: the most likely classes, and the nearest training images."""
    found, classes = snapshot.figure4, snapshot.classes
    figure = Figure(figsize=(13.2, 5.4), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[1, 1.12], wspace=0.04)
    halves[0].suptitle("test images and their five most likely classes", fontsize=9)
    nearest = f"test images and the nearest of {found.searched:,} training images"
    halves[1].suptitle(f"{nearest}, by the last hidden layer", fontsize=9)
    rows, ratios = -(-len(found.predictions) // PREDICTIONS_PER_ROW), [1, 0.08, *[1] * NEAREST]
    left = halves[0].subplots(2 * rows, PREDICTIONS_PER_ROW, height_ratios=[1.6, 1] * rows)
    right = halves[1].subplots(
        len(found.neighbours), len(ratios), width_ratios=ratios, squeeze=False
    )
    for panel in (*left.flat, *right.flat):
        panel.set_axis_off()
    for above, below, one in zip(left[::2].flat, left[1::2].flat, found.predictions, strict=False):
        _prediction(above, below, one, classes)
    for panels, one in zip(right, found.neighbours, strict=True):
        _neighbours(panels, one, classes)
    return figure


def _prediction(above: Axes, below: Axes, one: Prediction, classes: Sequence[str]) -> None:
    _image(above, one.image, _name(classes, one.label), weight="bold")
    below.set_axis_on()
    colours = [RED if found == one.label else BLUE for found in one.classes]
    below.barh(range(len(one.classes)), one.probabilities, color=colours, height=0.82)
    for place, found in enumerate(one.classes):
        below.text(0.02, place, _name(classes, found), fontsize=6.5, va="center")
    below.set(xlim=(0, 1), ylim=(len(one.classes) - 0.4, -0.6), xticks=[], yticks=[])
    below.spines[:].set_linewidth(0.6)


def _neighbours(panels: Sequence[Axes], one: Neighbours, classes: Sequence[str]) -> None:
    _image(panels[0], one.query, _name(classes, one.label), weight="bold")
    found = zip(panels[2:], one.images, one.labels, one.distances, strict=False)
    for panel, image, label, distance in found:
        _image(panel, image, f"{distance:.3g}", color="black" if label == one.label else RED)


def _image(panel: Axes, image: Tensor, text: str, **font: Any) -> None:
    """Show an image (3, H, W) with a text below it, without a frame."""
    panel.set_axis_on()
    panel.imshow(image.permute(1, 2, 0).numpy())
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    panel.set_xlabel(text, fontsize=SMALL, labelpad=3, **font)


def _name(classes: Sequence[str], number: int) -> str:
    name = classes[number].replace("_", " ")
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


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
    size.set_yscale("log")
    for panel, title in (
        (size, "size of the mean (dot), standard deviation (bar)"),
        (zeros, "zero after the activation, %"),
        (dead, "maps and units that are zero for all images, %"),
    ):
        shown = layers if panel is size else layers[:-1]  # logits follow no activation
        panel.set_xticks(range(len(shown)), shown, fontsize=SMALL, rotation=45)
        panel.set_title(title, fontsize=8)
        _plain(panel)
    zeros.legend(frameon=False, fontsize=SMALL)
    zeros.set_ylim(0, 100)
    dead.set_ylim(bottom=0)
    return figure


def learning_curves(groups: Sequence[Group]) -> Figure:
    """Draw training loss and test error over steps for each group, as means over the seeds."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for one in groups:
        runs = list(one.counted.values()) or [run for run in one.runs if run.losses and run.tests]
        if not runs:
            continue
        left.plot(*smoothed([run.losses for run in runs]), label=one.label, lw=1.4)
        tests = [{step: top1 for step, top1, _ in run.tests} for run in runs]
        common = sorted(set.intersection(*(set(test) for test in tests)))
        errors = [mean(test[step] for test in tests) for step in common]
        right.plot(common, errors, marker="o", ms=3)
    for panel, title in ((left, "training loss"), (right, "test top-1 error, %")):
        panel.set_title(title, fontsize=10)
        _plain(panel, "step")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def smoothed(losses: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float]]:
    """Return the mean curve over the steps that all runs have, as means over ``POINTS`` parts."""
    by_step = [dict(one) for one in losses]
    common = sorted(set.intersection(*(set(one) for one in by_step)))
    size = max(1, len(common) // POINTS)
    parts = [common[first : first + size] for first in range(0, len(common), size)]
    means = [mean(one[step] for one in by_step for step in part) for part in parts]
    return [part[-1] for part in parts], means


def _plain(panel: Axes, x: str = "", y: str = "") -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=SMALL)
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
