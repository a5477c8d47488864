"""Learning rates and colour noise over the epochs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from modelpar.errors import refuse_choice
from modelpar.net import paper
from modelpar.net.plan import Recipe
from modelpar.settings import TrainSettings

# Differs: section 5 has no number for "stopped improving".  Here it is five epochs without a new
# best error, measured on the test images and not on validation images.
PATIENCE: Final = 5


@dataclass
class Plateau:
    """Section 5's rule: a tenth of the rate when the validation error stops improving.

    This is all that a run remembers of its evaluations, so a checkpoint holds it.
    """

    best: float | None = None  # %
    best_epoch: int = 0
    drops: int = 0
    worse: int = 0  # evaluations since the best one, for early_stopping

    def observe(self, epoch: int, error: float) -> None:
        """Record the validation error in % at the end of ``epoch``."""
        self.worse += 1
        if self.best is None or error < self.best:
            self.best, self.best_epoch, self.worse = error, epoch, 0
        elif epoch - self.best_epoch >= PATIENCE and self.drops < paper.PLATEAU_DROPS:
            self.drops += 1
            self.best_epoch = epoch  # the lower rate has its own five epochs


NAMES: Final = tuple(f"{layer}.{kind}" for layer in paper.LAYERS for kind in ("weight", "bias"))


def run_length(settings: TrainSettings) -> int:
    """Return the epochs of a whole run: those that are set, or those of the schedule's own run."""
    given = settings.epochs or settings.data.epochs
    return given or paper.SCHEDULES[settings.recipe.schedule].length


class Schedule:
    """The learning rates of a recipe over ``epochs`` epochs, by ``paper.SCHEDULES``.

    Differs: the paper and its code know one length of training.  Here the published epochs are
    moved in proportion, so that a short training passes through the same stages.

    Raises SettingsError where ``recipe.rates_by_layer`` names a layer that no name in ``names``
    has.
    """

    def __init__(self, recipe: Recipe, epochs: int, names: Sequence[str] = NAMES) -> None:
        self.recipe, self.epochs, self.table = recipe, epochs, paper.SCHEDULES[recipe.schedule]
        self.names = names  # of the net's parameters, in the order of its layers
        self.plateau = Plateau()
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        for layer in recipe.rates_by_layer:
            if layer not in layers:
                refuse_choice("recipe.rates_by_layer", layer, layers)
        self.published = {layers[0]: "conv1", layers[-1]: "fc8"}  # the names in a schedule
        self.biases = self.table.biases
        if recipe.bias_drop is not None:
            first = self.biases.get(0, 1.0)
            drops = [start for start in self.table.weights if start > 0]
            at = {"none": [], "first": drops[:1], "last": drops[-1:]}[recipe.bias_drop]
            self.biases = {0: first, **dict.fromkeys(at, first / paper.RATE_DIVISOR)}

    @property
    def shown(self) -> tuple[str, str, str]:
        """The parameters whose rates a run shows: first and last weight, last bias."""
        weights = [name for name in self.names if name.endswith(".weight")]
        return weights[0], weights[-1], weights[-1].replace(".weight", ".bias")

    def rates(self, epoch: int) -> dict[str, float]:
        """Return the learning rate of each parameter, ``conv1.weight`` to ``fc8.bias``.

        ``epoch`` counts from 0.  A parameter with a rate of 0 is not updated at all.
        """
        recipe = self.recipe
        factors = {"weight": self._factor(self.table.weights, epoch)}
        if recipe.schedule == "plateau":
            factors["weight"] = paper.RATE_DIVISOR**-self.plateau.drops
        if recipe.rates == "double_bias":  # the code's biases had a schedule of their own
            factors["bias"] = self._factor(self.biases, epoch)
        rates: dict[str, float] = {}
        for name in self.names:
            layer, _, kind = name.rpartition(".")
            kind = kind if kind in factors else "weight"
            own = self.table.own.get(f"{self.published.get(layer, layer)}.{kind}", {})
            rate = recipe.lr * self._factor(own, epoch, factors[kind])
            ratio = paper.BIAS_RATIO if kind == "bias" else 1.0
            rates[name] = rate * ratio * recipe.rates_by_layer.get(layer, 1.0)
        return rates

    def _factor(self, changes: paper.Changes, epoch: int, before: float = 1.0) -> float:
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
        if self.recipe.colour_noise == "added":
            return paper.COLOUR_NOISE
        changes = self.table.noise
        if changes is None:
            of_145 = paper.SCHEDULES["run145"]
            scale = self.table.length / of_145.length
            changes = {start * scale: factor for start, factor in (of_145.noise or {}).items()}
        return paper.COLOUR_NOISE * self._factor(changes, epoch)
