"""Figure 4's left half: test images, and bars for their likeliest classes; needs matplotlib."""

from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from modelpar.analysis.neighbours import Prediction

ROW: Final = 4  # images a row, as in figure 4
RIGHT: Final = "#d9534f"  # the class that is right; figure 4 has it red
OTHER: Final = "#9ecae1"
LONGEST: Final = 24  # characters that stand beside a bar


def bars(answers: Sequence[Prediction], classes: Sequence[str]) -> Figure:
    """Return the images with their bars as a figure of its own."""
    rows = -(-len(answers) // ROW)
    figure = Figure(figsize=(1.75 * ROW, 2.75 * rows), dpi=150, layout="constrained")
    draw(figure, answers, classes)
    return figure


def draw(panel: FigureBase, answers: Sequence[Prediction], classes: Sequence[str]) -> None:
    """Draw each image, its class below, and a bar for each of its likeliest classes."""
    rows = -(-len(answers) // ROW)
    axes = panel.subplots(2 * rows, ROW, height_ratios=[1.6, 1] * rows, squeeze=False)
    for number in range(rows * ROW):
        row, column = divmod(number, ROW)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        if number >= len(answers):
            above.set_axis_off()
            below.set_axis_off()
            continue
        answer = answers[number]
        above.imshow(answer.image.permute(1, 2, 0).numpy())
        above.set_xticks([])
        above.set_yticks([])
        above.spines[:].set_linewidth(0.6)
        above.set_xlabel(name(classes, answer.label), fontsize=7.5, weight="bold", labelpad=3)
        _bars(below, answer, classes)


def _bars(panel: Axes, answer: Prediction, classes: Sequence[str]) -> None:
    places = range(len(answer.classes))
    colours = [RIGHT if found == answer.label else OTHER for found in answer.classes]
    panel.barh(places, answer.probabilities, color=colours, height=0.82)
    for place, found in zip(places, answer.classes, strict=True):
        panel.text(0.02, place, name(classes, found), fontsize=6.5, va="center")
    panel.set_xlim(0, 1)
    panel.set_ylim(len(answer.classes) - 0.4, -0.6)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_linewidth(0.6)


def name(classes: Sequence[str], number: int) -> str:
    """Return the class's name as it fits beside a bar."""
    words = classes[number].replace("_", " ")
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 3]}..."
