"""Figure 1: training error over the epochs, and when it first falls to a quarter."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import TYPE_CHECKING, Final

from modelpar.studies.table import grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelpar.studies.gather import Run

GOAL: Final = 25.0  # figure 1: training error in %
PUBLISHED: Final = 6.0  # figure 1: times as many epochs with tanh as with ReLU
HEAD: Final = ("run", "activation", "seed", "epochs", f"epochs to {GOAL:g} % training error")


@dataclass(frozen=True)
class Race:
    """Runs that differ in their activation alone: the mean epochs that each took to the goal."""

    data: str
    relu: float
    tanh: float

    @property
    def ratio(self) -> float:
        """Times as many epochs with tanh."""
        return self.tanh / self.relu


def activation(run: Run) -> str:
    """Return the activation the run was told, or had without being told."""
    return run.settings["model"].get("activation") or "relu"


def curve(run: Run) -> list[tuple[float, float]]:
    """Return the middle of each epoch and the mean error in % of its steps.

    Of batches as they were trained on, augmented and with dropout, each before its update.
    Differs: figure 1's net had neither.
    """
    epochs: dict[int, list[float]] = {}
    for epoch, error in run.training:
        epochs.setdefault(epoch, []).append(error)
    return [(epoch + 0.5, mean(errors)) for epoch, errors in sorted(epochs.items())]


def reached(points: Sequence[tuple[float, float]], goal: float = GOAL) -> float | None:
    """Return when a curve first is at ``goal``, straight between its points; None: never."""
    if points and points[0][1] <= goal:
        return points[0][0]
    for (before, high), (after, low) in pairwise(points):
        if low <= goal < high:
            return before + (after - before) * (high - goal) / (high - low)
    return None


def races(runs: Sequence[Run]) -> list[Race]:
    """Return tanh against ReLU, for each data set and net that both have reached the goal on."""
    times: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in runs:
        model = {key: value for key, value in run.settings["model"].items() if key != "activation"}
        if (time := reached(curve(run))) is not None:
            same = times.setdefault((run.data, repr(sorted(model.items()))), {})
            same.setdefault(activation(run), []).append(time)
    return [
        Race(data, mean(found["relu"]), mean(found["tanh"]))
        for (data, _), found in times.items()
        if {"relu", "tanh"} <= found.keys()
    ]


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return the cells of figure 1's table."""
    cells: list[list[str]] = []
    for run in runs:
        time = reached(curve(run))
        trained = len(curve(run))
        found = "not yet" if time is None else f"{time:.2f}"
        cells.append([str(run.folder), activation(run), str(run.seed), str(trained), found])
    return cells


def report(runs: Sequence[Run]) -> str:
    """Return what is printed: the table, tanh against ReLU, and which runs cannot be shown."""
    learnt = [run for run in runs if run.training]
    lines = [grid(HEAD, rows(learnt)), ""] if learnt else []
    lines += [
        f"{race.data}: {race.ratio:.1f} times as many epochs with tanh ({race.tanh:.2f}) as with "
        f"ReLU ({race.relu:.2f}); figure 1 says {PUBLISHED:g}, of another net and other images"
        for race in races(learnt)
    ]
    lines += [
        f"{run.folder}: its rows have no training error, it is not in figure 1"
        for run in runs
        if not run.training
    ]
    return "\n".join(lines)
