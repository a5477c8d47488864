"""The momentum and decay update of section 5, and which parameters get which rates."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modelpar import gpu
from modelpar.device import check_compiled
from modelpar.gpu.update import update
from modelpar.net.plan import Recipe


class MomentumDecay(Optimizer):
    """v <- .9 v - .0005 lr w - lr g;  w <- w + v  (section 5).

    The rate multiplies each gradient as it enters the velocity.  So a lower rate does not shrink
    what has accumulated, whereas torch's SGD multiplies the whole velocity by it.  A rate of 0
    changes neither weight nor velocity (weights.cu).  Each parameter is a group, named as in the
    net.

    With ``dtype`` bfloat16 the net is converted to it, and the float32 master weights are kept
    here; each step updates these and rounds them into the net.  ``factors`` multiply the decay of
    layers, by name.  With ``recipe.ema`` each step also moves ``averages`` towards the weights.
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
        self.averages: dict[str, Tensor] = {}  # e <- ema e + (1 - ema) w, from the first weights
        if recipe.ema:
            self.averages = {name: weight.clone() for name, weight in self.weights().items()}
        self.share = 1 - recipe.ema
        self.update: Callable[..., None] = _update
        # One rate per group, where the update reads them: in memory, so that a captured graph
        # sees new ones.
        some = next(iter(self.weights().values()))
        where = (some.dtype, some.device) if some.is_cuda else (torch.float64, "cpu")
        self.rates = torch.full((len(groups),), recipe.lr, dtype=where[0], device=where[1])
        self.scalars = self.rates.unbind()

    def compile(self) -> None:
        """Compile the update: one pass over each parameter, on a GPU in float32 by our kernel.

        Raises CompileError, and compiles nothing, if that fails or differs from the eager update.
        """
        grad, weight = next(iter(self.named.values())), next(iter(self.weights().values()))
        if weight.dtype == torch.float32 and gpu.available(weight.device):
            compiled = _fused_update
        else:
            compiled = torch.compile(_update, dynamic=False)
        example = torch.linspace(-1, 1, 8, dtype=weight.dtype)
        examples = [example.to(weight.device), example.flip(0).to(grad)]
        rate = torch.full_like(self.scalars[0], 0.1)
        after = partial(_updated, rate=rate, rounds=bool(self.masters))
        name = "the update of the weights"
        check_compiled(name, partial(after, compiled), partial(after, _update), *examples)
        self.update = compiled

    def run_eager(self) -> None:
        """Run eagerly."""
        self.update = _update

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate of each parameter, by name.

        On a GPU the next steps in the current stream use them, also those of a CUDA graph that
        was captured before.  The host does not wait.  Must not be captured itself.
        """
        new = [rates[group["name"]] for group in self.param_groups]
        if new == [group["lr"] for group in self.param_groups]:
            return
        for group, rate in zip(self.param_groups, new, strict=True):
            group["lr"] = rate
        pinned = self.rates.is_cuda
        sent = torch.tensor(new, dtype=self.rates.dtype, device="cpu", pin_memory=pinned)
        # torch does not use the pinned memory again before this copy is done.
        self.rates.copy_(sent, non_blocking=True)

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, ok: Tensor | None = None
    ) -> None:
        """Update every parameter whose rate is not 0, unless the scalar ``ok`` is 0.

        ``ok``, int32 or bool, is on the weights' device, and the host does not read it on a GPU.
        Copies nothing between host and device, so it can be captured in a CUDA graph.  Unless the
        kernel does the update, a graph omits the parameters whose rate was 0 at its capture.
        """
        fused = self.update is _fused_update
        active = [
            (rate, group)
            for rate, group in zip(self.scalars, self.param_groups, strict=True)
            if group["lr"] != 0 or (fused and group["params"][0].grad is not None)
        ]
        groups = [group for _, group in active]
        weights, updated = [group["params"][0] for group in groups], self.weights()
        inputs = (
            [updated[group["name"]] for group in groups],
            [self.state[weight]["velocity"] for weight in weights],
            [weight.grad for weight in weights],
            [rate for rate, _ in active],
            [group["decay"] for group in groups],
            [group["momentum"] for group in groups],
            weights if self.masters else [None] * len(weights),
        )
        if fused:
            self.update(*inputs, ok=ok)
        elif ok is None or (not ok.is_cuda and bool(ok)):
            self.update(*inputs)
        elif ok.is_cuda:
            _update_if(ok, self.update, *inputs)
        if self.averages:
            self._average(ok)

    def _average(self, ok: Tensor | None) -> None:
        """Move the averages by ``share`` towards the weights, and not at all if ``ok`` is 0."""
        share: Any = self.share
        if ok is not None:
            share = torch.full_like(self.scalars[0], self.share).mul(ok != 0)
        for name, weight in self.weights().items():
            average = self.averages[name]
            average.lerp_(weight, share if ok is None else share.to(weight))

    def velocities(self) -> dict[str, Tensor]:
        """Return each parameter's velocity under the parameter's name."""
        return {name: self.state[weight]["velocity"] for name, weight in self.named.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights by name: the float32 masters if there are any."""
        return self.masters or {name: weight.detach() for name, weight in self.named.items()}

    @torch.no_grad()
    def load(
        self,
        weights: Mapping[str, Tensor],
        velocities: Mapping[str, Tensor],
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Restore weights and velocities by name, with the weights rounded to the net's dtype.

        Without ``averages`` they begin again at the weights.
        """
        for name, average in self.averages.items():
            average.copy_((averages or weights)[name])
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


def _fused_update(*inputs: Sequence[Any], ok: Tensor | None = None) -> None:
    """Do what ``_update`` does, by one kernel per parameter, and nothing if ``ok`` is 0."""
    for one in zip(*inputs, strict=True):
        update(*one, ok=ok)


def _update_if(
    ok: Tensor,
    update: Callable[..., None],
    weights: Sequence[Tensor],
    velocities: Sequence[Tensor],
    *others: Sequence[Any],
) -> None:
    """Do a plain ``update`` on a GPU, and undo it there if ``ok`` is 0."""
    rounded = [copy for copy in others[-1] if copy is not None]
    changed = [*weights, *velocities, *rounded]
    before = [tensor.clone() for tensor in changed]
    update(weights, velocities, *others)
    for tensor, old in zip(changed, before, strict=True):
        tensor.copy_(torch.where(ok != 0, tensor, old))


@torch.no_grad()
def _updated(
    update: Callable[..., None], weight: Tensor, grad: Tensor, *, rate: Tensor, rounds: bool
) -> Tensor:
    """Return a weight and a velocity after one ``update``, and the weight rounded to bfloat16."""
    weight, velocity = weight.clone(), weight.square()
    copy = grad.clone() if rounds else None
    update([weight], [velocity], [grad], [rate], [0.01], [0.9], [copy])
    return torch.cat([weight, velocity, *([] if copy is None else [copy.to(weight)])])


def _decay(name: str, recipe: Recipe, factors: Mapping[str, float]) -> float:
    """Return the decay of a parameter: of all (section 5) or of weights only (the code)."""
    if recipe.decay == "weights" and not name.endswith(".weight"):
        return 0.0
    return recipe.weight_decay * factors.get(name.rpartition(".")[0], 1.0)
