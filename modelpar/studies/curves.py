"""Figure 1: training error over epochs, and how many epochs pass until it is 25 %."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean
from typing import Final

from modelpar import tables
from modelpar.studies.runs import Run

GOAL: Final = 25.0  # figure 1: training error in %
HEAD: Final = ("run", "activation", "rate", "seed", "epochs", f"epochs to {GOAL:g} % error")
CAPTION: Final = "Figure 1 of the paper: tanh needs six times as many epochs as ReLU, on CIFAR-10."


def activation(run: Run) -> str:
    """Return the run's activation, which by default is ReLU."""
    return run.settings["model"].get("activation") or "relu"


def curve(run: Run) -> list[tuple[float, float]]:
    """Return for each epoch its middle and the mean training error of its steps in %.

    A step's error is that of its batch before the update, augmented and with dropout.
    """
    epochs: dict[int, list[float]] = {}
    for epoch, error in run.training:
        epochs.setdefault(epoch, []).append(error)
    return [(epoch + 0.5, mean(errors)) for epoch, errors in sorted(epochs.items())]


def epochs_to_goal(points: Sequence[tuple[float, float]]) -> float | None:
    """Return when a curve first reaches ``GOAL``, by linear interpolation; None if never."""
    if points and points[0][1] <= GOAL:
        return points[0][0]
    for (before, high), (after, low) in pairwise(points):
        if low <= GOAL < high:
            return before + (after - before) * (high - GOAL) / (high - low)
    return None


def report(runs: Sequence[Run]) -> str:
    """Return what is printed: the table, and which runs are missing and why."""
    rows: list[list[str]] = []
    missing: list[str] = []
    for run in runs:
        points, rate = curve(run), f"{run.settings['recipe']['lr']:g}"
        time = epochs_to_goal(points)
        reached = "not reached" if time is None else f"{time:.2f}"
        if points:
            cells = (run.folder, activation(run), rate, run.seed, len(points), reached)
            rows.append([str(cell) for cell in cells])
        else:
            missing.append(f"{run.folder}: not in figure 1, it has no training errors")
    return "\n".join([*([tables.markdown(HEAD, rows), "", CAPTION] if rows else []), *missing])
