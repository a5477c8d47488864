"""The momentum and decay update of section 5, and which parameters get which rates."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modelpar.device import check_compiled
from modelpar.net.plan import Recipe


class MomentumDecay(Optimizer):
    """v <- .9 v - .0005 lr w - lr g;  w <- w + v  (section 5).

    The rate is inside the velocity: unlike with torch's SGD, a lower rate does not shrink the
    velocity so far.  A rate of 0 changes neither weight nor velocity (weights.cu).  Each parameter
    is a group, named as in the net.

    With ``dtype`` bfloat16 the net is converted to it, and the float32 master weights are kept
    here; each step updates these and rounds them into the net.  ``factors`` multiply the decay of
    layers, by name.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Recipe,
        dtype: torch.dtype = torch.float32,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self.masters: dict[str, Tensor] = {}  # none if the net has the precision of the update
        if dtype.itemsize < torch.float32.itemsize:
            self.masters = {name: weight.detach() for name, weight in net.named_parameters()}
            net.to(dtype)  # the masters keep theirs
        self.named = dict(net.named_parameters())
        groups = [
            {"params": [weight], "name": name, "decay": _decay(name, recipe, factors or {})}
            for name, weight in self.named.items()
        ]
        super().__init__(groups, {"lr": recipe.lr, "momentum": recipe.momentum})
        for name, weight in self.weights().items():
            velocity = torch.zeros_like(weight, memory_format=torch.preserve_format)
            self.state[self.named[name]] = {"velocity": velocity}
        self.update = _update

    def compile(self) -> None:
        """Compile the update: one pass over each parameter.

        Raises CompileError, and compiles nothing, if that fails or differs from the eager update.
        """
        compiled = torch.compile(_update, dynamic=False)
        grad, weight = next(iter(self.named.values())), next(iter(self.weights().values()))
        example = torch.linspace(-1, 1, 8, dtype=weight.dtype)
        examples = [example.to(weight.device), example.flip(0).to(grad)]
        name, after = "the update of the weights", partial(_updated, rounds=bool(self.masters))
        check_compiled(name, partial(after, compiled), partial(after, _update), *examples)
        self.update = compiled

    def run_eager(self) -> None:
        """Use nothing that is compiled."""
        self.update = _update

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate of each parameter, by name."""
        for group in self.param_groups:
            group["lr"] = rates[group["name"]]

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter whose rate is not 0."""
        active = [group for group in self.param_groups if group["lr"] != 0]
        weights, updated = [group["params"][0] for group in active], self.weights()
        self.update(
            [updated[group["name"]] for group in active],
            [self.state[weight]["velocity"] for weight in weights],
            [weight.grad for weight in weights],
            # tensors, so that another rate needs no new compilation
            [torch.tensor(group["lr"], dtype=torch.float64, device="cpu") for group in active],
            [group["decay"] for group in active],
            [group["momentum"] for group in active],
            weights if self.masters else [None] * len(weights),
        )

    def velocities(self) -> dict[str, Tensor]:
        """Return each parameter's velocity under the parameter's name."""
        return {name: self.state[weight]["velocity"] for name, weight in self.named.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights by name: the float32 masters if there are any."""
        return self.masters or {name: weight.detach() for name, weight in self.named.items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], velocities: Mapping[str, Tensor]) -> None:
        """Restore weights and velocities by name, with the weights rounded to the net's dtype."""
        for name, weight in self.named.items():
            self.masters.get(name, weight).copy_(weights[name])
            weight.copy_(weights[name])
            self.state[weight]["velocity"].copy_(velocities[name])


def _update(
    weights: Sequence[Tensor],
    velocities: Sequence[Tensor],
    grads: Sequence[Tensor],
    rates: Sequence[Tensor],
    decays: Sequence[float],
    momenta: Sequence[float],
    rounded: Sequence[Tensor | None],
) -> None:
    """Update in place, and copy each new weight into its entry of ``rounded``, if there is one."""
    for weight, velocity, grad, rate, decay, momentum, copy in zip(
        weights, velocities, grads, rates, decays, momenta, rounded, strict=True
    ):
        slope = grad.to(weight.dtype)
        if decay:
            slope = slope + decay * weight
        velocity.mul_(momentum).sub_(rate * slope)
        weight.add_(velocity)
        if copy is not None:
            copy.copy_(weight)


@torch.no_grad()
def _updated(update: Callable[..., None], weight: Tensor, grad: Tensor, *, rounds: bool) -> Tensor:
    """Return a weight and a velocity after one ``update``, and the weight rounded to bfloat16."""
    weight, velocity = weight.clone(), weight.square()
    copy = grad.clone() if rounds else None
    rate = torch.tensor(0.1, dtype=torch.float64, device="cpu")
    update([weight], [velocity], [grad], [rate], [0.01], [0.9], [copy])
    return torch.cat([weight, velocity, *([] if copy is None else [copy.to(weight)])])


def _decay(name: str, recipe: Recipe, factors: Mapping[str, float]) -> float:
    """Return the decay of a parameter: of all (section 5) or of weights only (the code)."""
    if recipe.decay == "weights" and not name.endswith(".weight"):
        return 0.0
    return recipe.weight_decay * factors.get(name.rpartition(".")[0], 1.0)
