"""Learning rates and colour noise over the epochs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from modelpar.net import paper
from modelpar.net.plan import Recipe

# Differs: section 5 has no number for "stopped improving".  Here it is five epochs without a new
# best error, measured on the test images and not on validation images.
PATIENCE: Final = 5


@dataclass
class Plateau:
    """Section 5's rule: a tenth of the rate when the validation error stops improving.

    This is all that a schedule remembers, so a checkpoint holds it.
    """

    best: float | None = None  # %
    best_epoch: int = 0
    drops: int = 0

    def observe(self, epoch: int, error: float) -> None:
        """Record the validation error in % at the end of ``epoch``."""
        if self.best is None or error < self.best:
            self.best, self.best_epoch = error, epoch
        elif epoch - self.best_epoch >= PATIENCE and self.drops < paper.PLATEAU_DROPS:
            self.drops += 1
            self.best_epoch = epoch  # the lower rate has its own five epochs


NAMES: Final = tuple(f"{layer}.{kind}" for layer in paper.LAYERS for kind in ("weight", "bias"))


class Schedule:
    """The learning rates of a recipe over ``epochs`` epochs, by ``paper.SCHEDULES``.

    Differs: the paper and its code know one length of training.  Here the published epochs are
    moved in proportion, so that a short training passes through the same stages.
    """

    def __init__(self, recipe: Recipe, epochs: int, names: Sequence[str] = NAMES) -> None:
        self.recipe, self.epochs, self.table = recipe, epochs, paper.SCHEDULES[recipe.schedule]
        self.names = names  # of the net's parameters, in the order of its layers
        self.plateau = Plateau()

    @property
    def shown(self) -> tuple[str, str, str]:
        """The parameters whose rates a run shows: first and last weight, last bias."""
        weights = [name for name in self.names if name.endswith(".weight")]
        return weights[0], weights[-1], weights[-1].replace(".weight", ".bias")

    def rates(self, epoch: int) -> dict[str, float]:
        """Return the learning rate of each parameter, ``conv1.weight`` to ``fc8.bias``.

        ``epoch`` counts from 0.  A parameter with a rate of 0 is not updated at all.
        """
        recipe, table = self.recipe, self.table
        weight = self._factor(table.weights, epoch)
        if recipe.schedule == "plateau":
            weight = paper.RATE_DIVISOR**-self.plateau.drops
        bias = weight
        if recipe.rates == "double_bias":  # the code's biases had a timetable of their own
            bias = paper.BIAS_RATIO * self._factor(table.biases, epoch)
        rates = {
            name: recipe.lr * (weight if name.endswith(".weight") else bias) for name in self.names
        }
        first = self.shown[0]
        rates[first] = recipe.lr * self._factor(table.conv1, epoch, weight)
        if rates[first] == 0:
            rates[first.replace(".weight", ".bias")] = 0.0
        return rates

    def _factor(self, changes: Mapping[float, float], epoch: int, before: float = 1.0) -> float:
        """Return the factor of the last of ``changes`` that ``epoch`` has reached."""
        for start, factor in changes.items():
            if epoch * self.table.length >= start * self.epochs:
                before = factor
        return before

    def colour_noise(self, epoch: int) -> float:
        """Return the standard deviation of the colour draws in ``epoch``: 0.1, or 0 when off.

        The code's noise, which scales the image, is off towards the end; the paper's stays.
        """
        if self.recipe.colour_noise == "none":
            return 0.0
        table = self.table if self.table.noise_off is not None else paper.SCHEDULES["run145"]
        over = epoch * table.length >= (table.noise_off or 0) * self.epochs
        scaled = self.recipe.colour_noise == "added_and_scaled"
        return 0.0 if scaled and over else paper.COLOUR_NOISE
