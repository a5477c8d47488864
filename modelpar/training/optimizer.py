"""The momentum and decay update of section 5, and which parameters get which rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from modelpar.net.paper import Recipe


class MomentumDecay(Optimizer):
    """v <- .9 v - .0005 lr w - lr g;  w <- w + v  (section 5).

    The rate stands inside the velocity: unlike with torch's SGD, a lower rate does not shrink the
    velocity gathered so far.  A rate of 0 leaves weight and velocity untouched (weights.cu).
    One group a parameter, named as in the net.
    """

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        groups = [
            {
                "params": [weight],
                "name": name,
                "decay": recipe.weight_decay * decays(name, recipe),
            }
            for name, weight in net.named_parameters()
        ]
        super().__init__(groups, {"lr": recipe.lr, "momentum": recipe.momentum})
        for group in self.param_groups:
            (weight,) = group["params"]
            self.state[weight]["velocity"] = torch.zeros_like(
                weight, memory_format=torch.preserve_format
            )

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Give each parameter its learning rate, by name."""
        for group in self.param_groups:
            group["lr"] = rates[group["name"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter whose rate is not 0; return what ``closure`` returns, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (weight,), lr = group["params"], group["lr"]
            if lr == 0:
                continue
            velocity = self.state[weight]["velocity"]
            velocity.mul_(group["momentum"]).add_(weight.grad, alpha=-lr)
            if group["decay"]:
                velocity.add_(weight, alpha=-lr * group["decay"])
            weight.add_(velocity)
        return loss

    def velocities(self) -> dict[str, torch.Tensor]:
        """Return each parameter's velocity under the parameter's name."""
        return {
            group["name"]: self.state[group["params"][0]]["velocity"]
            for group in self.param_groups
        }


def decays(name: str, recipe: Recipe) -> bool:
    """Return whether the parameter ``name`` decays: all (section 5), or weights alone (code)."""
    return recipe.decay == "all" or name.endswith(".weight")
