"""Figure 1: training error over the epochs, and when it first falls to a quarter."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Final, NamedTuple

from modelpar.studies.comparison import grid
from modelpar.studies.runs import Run

GOAL: Final = 25.0  # figure 1: training error in %
PUBLISHED: Final = 6.0  # figure 1: times as many epochs with tanh as with ReLU
HEAD: Final = ("run", "activation", "rate", "seed", "epochs", f"epochs to {GOAL:g} % error")
TUNED: Final = ("model.activation", "recipe.lr", "steps")  # what a race leaves to each side


class Side(NamedTuple):
    """An activation's best: the mean epochs that its runs took to the goal, at which rate."""

    epochs: float
    rate: float


@dataclass(frozen=True)
class Race:
    """Runs that differ in activation, rate and seed alone; each activation by its best rate.

    Section 3.1: "the learning rates for each network were chosen independently".
    """

    data: str
    relu: Side
    tanh: Side

    @property
    def ratio(self) -> float:
        """Times as many epochs with tanh."""
        return self.tanh.epochs / self.relu.epochs


def activation(run: Run) -> str:
    """Return the activation the run was told, or had without being told."""
    return run.settings["model"].get("activation") or "relu"


def curve(run: Run) -> list[tuple[float, float]]:
    """Return the middle of each epoch and the mean error in % of its steps.

    Of batches as they were trained on, augmented and with dropout, each before its update.
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
    """Return tanh against ReLU, where both have reached the goal on the same images."""
    alike: dict[tuple[str, str], dict[str, dict[float, list[Run]]]] = {}
    for run in runs:
        own = {key: value for key, value in run.told.items() if key not in TUNED}
        rates = alike.setdefault((run.data, json.dumps(own)), {}).setdefault(activation(run), {})
        rates.setdefault(float(run.settings["recipe"]["lr"]), []).append(run)
    found = [
        (data, {one: _best(rates) for one, rates in sides.items()})
        for (data, _), sides in alike.items()
    ]
    return [
        Race(data, relu, tanh)
        for data, best in found
        if (relu := best.get("relu")) and (tanh := best.get("tanh"))
    ]


def _best(rates: dict[float, list[Run]]) -> Side | None:
    """Return the rate that was soonest at the goal, of those at which every seed came there."""
    sides: list[Side] = []
    for rate, runs in rates.items():
        times = [time for run in runs if (time := reached(curve(run))) is not None]
        if len(times) == len(runs):
            sides.append(Side(mean(times), rate))
    return min(sides, default=None)


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return the cells of figure 1's table."""
    cells: list[list[str]] = []
    for run in runs:
        time = reached(curve(run))
        trained = len(curve(run))
        found = "not yet" if time is None else f"{time:.2f}"
        rate = f"{run.settings['recipe']['lr']:g}"
        cells.append([str(run.folder), activation(run), rate, str(run.seed), str(trained), found])
    return cells


def report(runs: Sequence[Run]) -> str:
    """Return what is printed: the table, tanh against ReLU, and which runs cannot be shown."""
    learnt = [run for run in runs if run.training]
    lines = [grid(HEAD, rows(learnt)), ""] if learnt else []
    lines += [
        f"{race.data}: {race.ratio:.1f} times as many epochs with tanh ({race.tanh.epochs:.2f}, "
        f"at a rate of {race.tanh.rate:g}) as with ReLU ({race.relu.epochs:.2f}, at "
        f"{race.relu.rate:g}); figure 1 says {PUBLISHED:g}, on CIFAR-10"
        for race in races(learnt)
    ]
    lines += [
        f"{run.folder}: its rows have no training error, it is not in figure 1"
        for run in runs
        if not run.training
    ]
    return "\n".join(lines)
