"""Learning rates over the epochs: constant, a tenth when stalled or at fixed epochs, dexp."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from modelpar.net import paper
from modelpar.net.plan import Recipe

# Differs: section 5 gives no number for "stopped improving"; here it is five epochs without a new
# best error, and the test images stand in for its validation images.
PATIENCE: Final = 5


@dataclass
class Plateau:
    """Section 5's rule: a tenth of the rate when the validation error stops improving."""

    best: float | None = None  # %
    best_epoch: int = 0
    drops: int = 0

    def observe(self, epoch: int, error: float) -> None:
        """Take the validation error in % at the end of ``epoch``."""
        if self.best is None or error < self.best:
            self.best, self.best_epoch = error, epoch
        elif epoch - self.best_epoch >= PATIENCE and self.drops < paper.PLATEAU_DROPS:
            self.drops += 1
            self.best_epoch = epoch  # the lower rate has its own five epochs


def dexp(progress: float, divisor: float, steps: int) -> float:
    """Return 1 to 1/divisor in ``steps`` equal stretches of ``progress`` 0 to 1 (lr.cu)."""
    stretch = min(int(progress * steps), steps - 1)
    return divisor ** -(stretch / (steps - 1))


DROPS: Final = {  # epochs at which the weights' rate falls to a tenth
    "run145": paper.RUN145_DROPS,
    "cifar": paper.CIFAR_DROPS,
    "every_30": paper.EVERY_30_DROPS,
    "constant": (),
}
NAMES: Final = tuple(f"{layer}.{kind}" for layer in paper.LAYERS for kind in ("weight", "bias"))


class Schedule:
    """The learning rates of a recipe over ``epochs``; fixed epochs scale with the length.

    Differs: the paper and its code know one length of training; run 145's and run 170's epochs,
    the CIFAR-10 net's and torchvision's are moved in proportion, so that a short training passes
    through the same stages.
    """

    def __init__(self, recipe: Recipe, epochs: int, names: Sequence[str] = NAMES) -> None:
        self.recipe = recipe
        self.epochs = epochs
        self.names = names  # of the net's parameters, in the order of its layers
        self.plateau = Plateau()

    @property
    def shown(self) -> tuple[str, str, str]:
        """The parameters whose rates a run shows: first and last weight, last bias."""
        weights = [name for name in self.names if name.endswith(".weight")]
        return weights[0], weights[-1], weights[-1].replace(".weight", ".bias")

    def _reached(self, epoch: int, run: str, published: int) -> bool:
        """Whether ``epoch`` (from 0) has come to the published run's epoch ``published``."""
        return epoch * paper.LENGTHS[run] >= published * self.epochs

    def rates(self, epoch: int) -> dict[str, float]:
        """Return the learning rate of each parameter, ``conv1.weight`` to ``fc8.bias``.

        ``epoch`` counts from 0.  A rate of 0 means that the parameter is not updated at all.
        """
        recipe = self.recipe
        weight, bias = self._factors(epoch)
        ratio = paper.BIAS_RATIO if recipe.rates == "double_bias" else 1.0
        rates = {
            name: recipe.lr * (weight if name.endswith(".weight") else ratio * bias)
            for name in self.names
        }
        first = self.shown[0]
        run = recipe.schedule
        if run == "run145" and self._reached(epoch, run, paper.RUN145_CONV1_SLOW):
            rates[first] = paper.RUN145_CONV1_RATE * recipe.lr / paper.RATE
        frozen = paper.CONV1_FROZEN.get(run)
        # Both rates are 0 in the runs' last files; their notes tell of the weights' alone, when.
        if frozen is not None and self._reached(epoch, run, frozen):
            rates[first] = rates[first.replace(".weight", ".bias")] = 0.0
        return rates

    def _factors(self, epoch: int) -> tuple[float, float]:
        """Return what multiplies the first rates of weights and of biases in ``epoch``.

        With equal rates the biases follow the weights; the code's went their own way.
        """
        run, progress = self.recipe.schedule, epoch / self.epochs
        bias = 1.0  # run 145's stay at .02 throughout, the CIFAR-10 net's at .002
        if run in paper.WEIGHT_STEPS:
            weight = dexp(progress, *paper.WEIGHT_STEPS[run])
            bias = dexp(progress, *paper.BIAS_STEPS)
        elif run == "plateau":
            weight = paper.RATE_DIVISOR**-self.plateau.drops
        else:
            drops = sum(self._reached(epoch, run, drop) for drop in DROPS[run])
            weight = paper.RATE_DIVISOR**-drops
        return weight, weight if self.recipe.rates == "equal" else bias

    def colour_noise(self, epoch: int) -> float:
        """Return the standard deviation of the colour draws in ``epoch``: 0.1, or 0 when off.

        The code's noise, which scales the image, went off towards the end; the paper's stays.
        """
        run = self.recipe.schedule if self.recipe.schedule in paper.NOISE_OFF else "run145"
        if self.recipe.colour_noise == "none":
            return 0.0
        if self.recipe.colour_noise == "added_and_scaled" and self._reached(
            epoch, run, paper.NOISE_OFF[run]
        ):
            return 0.0
        return paper.COLOUR_NOISE

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of it."""
        return asdict(self.plateau)

    def load(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` returned."""
        self.plateau = Plateau(**state)
