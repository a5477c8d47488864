"""Figures 1, 3 and 4, and the activations, as they are printed; needs matplotlib."""

from collections.abc import Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from modelpar.analysis import bars
from modelpar.analysis.activations import Activity
from modelpar.analysis.kernels import COLOUR_SHARE, RANDOM_SHARE, kernel_picture
from modelpar.analysis.neighbours import NEAREST, Neighbours
from modelpar.studies import curves
from modelpar.studies.portrait import Portrait
from modelpar.studies.runs import Run
from modelpar.studies.snapshots import Kernels

DPI: Final = 200
COLUMNS: Final = ("#4d4d4d", "#d9534f")  # column 0, column 1
LINES: Final = {"relu": "-", "tanh": "--", "sigmoid": ":", "elu": "-."}  # figure 1: tanh is dashed
GREY: Final = "#8c8c8c"
DOTTED: Final = (0, (1, 2))
SMALL: Final = 7  # points


def figure1(runs: Sequence[Run]) -> Figure:
    """Draw training error over epochs; a ring where it first is at a quarter."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    panel = figure.subplots()
    panel.axhline(curves.GOAL, color=GREY, lw=0.7, ls=DOTTED)
    colours: dict[str, str] = {}
    for run in runs:  # one colour for all seeds
        points = curves.curve(run)
        new = run.label not in colours
        colour = colours.setdefault(run.label, f"C{len(colours)}")
        name = f"{run.label} ({curves.activation(run)})" if new else None
        line = LINES[curves.activation(run)]
        panel.plot(*zip(*points, strict=True), line, lw=1.2, color=colour, label=name)
        if (time := curves.reached(points)) is not None:
            panel.plot(time, curves.GOAL, "o", ms=5, mfc="white", color=colour)
    panel.set_xlabel("epochs", fontsize=8)
    panel.set_ylabel("training error, %", fontsize=8)
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    _plain(panel)
    panel.legend(frameon=False, fontsize=SMALL)
    return figure


def figure3(sources: Sequence[Kernels]) -> Figure:
    """Draw the kernels of each column, what they are beneath, and each one as a point beside."""
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
    for column, own in enumerate(one.found):
        place = panel.add_subplot(grid[column, 0])
        part = one.kernels.chunk(one.columns)[column]
        place.imshow(kernel_picture(part, 1).permute(1, 2, 0).numpy())
        place.set_xticks([])
        place.set_yticks([])
        place.spines[:].set_visible(False)
        place.set_xlabel(
            f"column {column}: colour {own.colour_share.mean():.2f} "
            f"± {own.colour_share.std():.2f}, "
            f"{own.colour_kernels} of {len(part)} colour, "
            f"{own.frequency.mean():.2f} ± {own.frequency.std():.2f} cycles/pixel",
            fontsize=SMALL,
            labelpad=3,
        )
        colour = COLUMNS[column]
        points.scatter(own.frequency, own.colour_share, s=9, c=colour, alpha=0.75, lw=0)
        label = f"column {column}"
        points.plot([], [], "o", ms=3.5, color=colour, mec="none", label=label)
    for height, text, top in (
        (RANDOM_SHARE, "nothing learnt", False),
        (COLOUR_SHARE, "colour", True),
    ):
        points.axhline(height, color=GREY, lw=0.7, ls="-" if top else DOTTED)
        side = "bottom" if top else "top"
        points.text(0.005, height, text, fontsize=SMALL - 1, color=GREY, va=side)
    points.set_xlim(0, 0.5**0.5)  # one cycle in two pixels, down and across
    points.set_ylim(0, 1)
    points.set_xlabel("cycles/pixel", fontsize=SMALL)
    points.set_ylabel("energy off the grey axis", fontsize=SMALL)
    _plain(points)
    points.legend(frameon=False, fontsize=SMALL - 1, loc="lower left", handletextpad=0)


def figure4(seen: Portrait) -> Figure:
    """Draw both halves: the likeliest classes, and the nearest training images."""
    found = seen.answers
    figure = Figure(figsize=(13.2, 5.4), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[1, 1.12], wspace=0.04)
    left, right = halves
    bars.draw(left, found.predictions, seen.classes)
    _likenesses(right, found.neighbours, seen.classes)
    left.suptitle("test images and the five likeliest classes", fontsize=9)
    right.suptitle(
        f"test images, and of {found.searched:,} training images the nearest in the last hidden "
        "layer",
        fontsize=9,
    )
    return figure


def _likenesses(panel: FigureBase, found: Sequence[Neighbours], classes: Sequence[str]) -> None:
    widths = [1, 0.08, *[1] * NEAREST]
    axes: Any = panel.subplots(len(found), len(widths), width_ratios=widths, squeeze=False)
    for row, one in zip(axes, found, strict=True):
        for place in row:
            place.set_xticks([])
            place.set_yticks([])
            place.spines[:].set_visible(False)
        _image(row[0], one.query, bars.name(classes, one.label), "black", "bold")
        near = zip(row[2:], one.images, one.labels, one.distances, strict=False)
        for place, image, label, distance in near:
            colour = "black" if label == one.label else bars.RIGHT
            _image(place, image, f"{distance:.3g}", colour)


def _image(place: Axes, image: Any, text: str, colour: str, weight: str = "normal") -> None:
    place.imshow(image.permute(1, 2, 0).numpy())
    place.set_xlabel(text, fontsize=6.5, color=colour, weight=weight, labelpad=2)


def activations(rows: Sequence[Activity]) -> Figure:
    """Draw what the layers of each column gave."""
    figure = Figure(figsize=(9.2, 2.7), layout="constrained")
    layers = list(dict.fromkeys(row.layer for row in rows))
    size, zeros, dead = figure.subplots(1, 3)
    for row in rows:
        column = row.column or 0
        apart = 0.0 if row.column is None else 0.36 * column - 0.18
        place = layers.index(row.layer) + apart
        colour = "#9ecae1" if row.column is None else COLUMNS[column]
        size.plot(place, row.std, "_", ms=7, mew=1.4, color=colour)
        size.plot(place, abs(row.mean), "o", ms=4, color=colour, mec="none")
        if row.column is not None:
            zeros.bar(place, 100 * row.zeros, 0.34, color=colour)
            dead.bar(place, 100 * row.dead, 0.34, color=colour)
    size.set_yscale("log")
    for panel, title in (
        (size, "size of the mean (dot), standard deviation (bar)"),
        (zeros, "zero after the activation, %"),
        (dead, "maps and units that are zero for all images, %"),
    ):
        shown = layers if panel is size else [name for name in layers if name != "logits"]
        panel.set_xticks(range(len(shown)), shown, fontsize=SMALL, rotation=45)
        panel.set_title(title, fontsize=8)
        _plain(panel)
    for column in sorted({row.column for row in rows if row.column is not None}):
        zeros.bar(0, 0, color=COLUMNS[column], label=f"column {column}")
    zeros.legend(frameon=False, fontsize=SMALL)
    zeros.set_ylim(0, 100)
    return figure


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=SMALL)
