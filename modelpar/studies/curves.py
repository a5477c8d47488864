"""Figure 1: training error over epochs, and how many epochs pass until it is 25 %."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean
from typing import Final, NamedTuple

from modelpar import tables
from modelpar.studies.runs import Run

GOAL: Final = 25.0  # figure 1: training error in %
PUBLISHED: Final = 6.0  # figure 1: tanh needs six times as many epochs as ReLU
HEAD: Final = ("run", "activation", "rate", "seed", "epochs", f"epochs to {GOAL:g} % error")
TUNED: Final = ("model.activation", "recipe.lr", "steps")  # chosen for each activation separately


class Best(NamedTuple):
    """Mean epochs to the goal over the seeds, and the learning rate that needs the fewest."""

    epochs: float
    rate: float


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


def epochs_to(points: Sequence[tuple[float, float]], goal: float = GOAL) -> float | None:
    """Return when a curve first reaches ``goal``, by linear interpolation; None if never."""
    if points and points[0][1] <= goal:
        return points[0][0]
    for (before, high), (after, low) in pairwise(points):
        if low <= goal < high:
            return before + (after - before) * (high - goal) / (high - low)
    return None


def speed_ups(runs: Sequence[Run]) -> Iterator[tuple[str, Best, Best]]:
    """Yield data set, ReLU and tanh for each kind of run in which both reached the goal.

    Section 3.1: "the learning rates for each network were chosen independently".
    """
    kinds: dict[tuple[str, str], dict[str, dict[float, list[Run]]]] = {}
    for run in runs:
        same = {key: value for key, value in run.identity.items() if key not in TUNED}
        kind = kinds.setdefault((run.data, json.dumps(same)), {})
        rates = kind.setdefault(activation(run), {})
        rates.setdefault(float(run.settings["recipe"]["lr"]), []).append(run)
    for (data, _), kind in kinds.items():
        relu, tanh = (_best(kind.get(name, {})) for name in ("relu", "tanh"))
        if relu and tanh:
            yield data, relu, tanh


def _best(rates: dict[float, list[Run]]) -> Best | None:
    """Return the fastest rate of those at which every seed reached the goal."""
    found: list[Best] = []
    for rate, runs in rates.items():
        times = [time for run in runs if (time := epochs_to(curve(run))) is not None]
        if len(times) == len(runs):
            found.append(Best(mean(times), rate))
    return min(found, default=None)


def report(runs: Sequence[Run]) -> str:
    """Return what is printed: the table, tanh against ReLU, and which runs are missing and why."""
    shown = [run for run in runs if run.training]
    rows: list[list[str]] = []
    for run in shown:
        points, rate = curve(run), f"{run.settings['recipe']['lr']:g}"
        reached = "not reached" if (time := epochs_to(points)) is None else f"{time:.2f}"
        about = [str(run.folder), activation(run), rate, str(run.seed), str(len(points))]
        rows.append([*about, reached])
    lines = [tables.markdown(HEAD, rows), ""] if shown else []
    lines += [
        f"{data}: tanh needs {tanh.epochs / relu.epochs:.1f} times as many epochs "
        f"({tanh.epochs:.2f} at rate {tanh.rate:g}) as ReLU ({relu.epochs:.2f} at rate "
        f"{relu.rate:g}); figure 1 has {PUBLISHED:g} times, on CIFAR-10"
        for data, relu, tanh in speed_ups(shown)
    ]
    missing = (run for run in runs if not run.training)
    lines += [f"{run.folder}: not in figure 1, it has no training errors" for run in missing]
    return "\n".join(lines)
