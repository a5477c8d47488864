"""The layers torch does not have as the paper needs them: response normalization and dropout.

And the activation as a layer that knows whose output it rectifies, so that hooks find it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from modelpar.net import paper
from modelpar.net.plan import Plan
from modelpar.seeding import generator

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": functional.relu,  # section 3.1
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": functional.elu,
}


def _around(maps: Tensor, kernel: Tensor) -> Tensor:
    """Sum over neighbours: a convolution with ones, symmetric and so its own adjoint."""
    groups = maps.shape[1] // kernel.shape[1]
    return functional.conv2d(maps, kernel, padding=kernel.shape[-1] // 2, groups=groups)


def _inverse_root(total: Tensor, k: float, slope: float) -> Tensor:
    """Return s ** -1/2 of s = k + slope * total, in float32 at least."""
    wide = torch.promote_types(total.dtype, torch.float32)
    return total.to(wide, copy=True).mul_(slope).add_(k).rsqrt_()


class _Response(Function):
    """y = x * s ** -3/4, s = k + slope * sum of squares around x, with a backward of its own.

    The sum runs as a convolution, on whatever the device has for products, and s ** -3/4 is
    r * sqrt(r) for r = 1 / sqrt(s): several times faster than torch's pooling over maps and a
    power.  Adjoint, b = 3/4 in both norms: dx = g s^-b - 2 b slope x * around(g x s^-b / s).
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, kernel: Tensor, k: float, slope: float) -> Tensor:
        total = _around(maps * maps, kernel)
        ctx.save_for_backward(maps, kernel, total)
        ctx.k, ctx.slope = k, slope
        root = _inverse_root(total, k, slope)
        return root.sqrt().mul_(root).mul_(maps).to(maps.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        maps, kernel, total = ctx.saved_tensors
        root = _inverse_root(total, ctx.k, ctx.slope)
        straight = root.sqrt().mul_(root).mul_(grad)
        uneven = root.square_().mul_(straight).mul_(maps)
        around = _around(uneven.to(maps.dtype), kernel)
        factor = -2 * paper.NORM_BETA * ctx.slope
        return straight.addcmul_(maps, around, value=factor).to(maps.dtype), None, None, None


class AcrossMaps(nn.Module):
    """Response normalization over neighbouring maps of one column (section 3.3).

    ``maps`` is how many maps a column has, so that no window reaches over the seam between two;
    the input (N, C, H, W) may hold several columns.  ``alpha`` counts over the whole window, as
    torch does: y = x / (k + alpha / n * sum of n squares) ** beta.  ``size`` is n, an odd number.
    """

    def __init__(
        self, maps: int, alpha: float, size: int = paper.NORM_SIZE, k: float = paper.NORM_K
    ) -> None:
        super().__init__()
        self.maps = maps
        self.alpha, self.size, self.k = alpha, size, k
        place = torch.arange(maps)
        near = (place[:, None] - place).abs() <= size // 2
        self.register_buffer("band", near.float()[:, :, None, None], persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps, shaped as ``maps``."""
        columns = maps.shape[1] // self.maps
        band = self.get_buffer("band").to(maps.dtype).repeat(columns, 1, 1, 1)
        return _Response.apply(maps, band, self.k, self.alpha / self.size)

    def extra_repr(self) -> str:
        """Name what makes it."""
        return f"{self.maps} maps, alpha={self.alpha}, size={self.size}, k={self.k:g}"


class WithinMap(nn.Module):
    """Response normalization over 5 x 5 pixels of the same map (run 145, ``rnorm``).

    y = x * (1 + 1e-3 / 25 * sum of 25 squares) ** -0.75; pixels outside the map count as zero.
    """

    def __init__(self) -> None:
        super().__init__()
        side = paper.WITHIN_SIZE
        self.register_buffer("window", torch.ones(1, 1, side, side), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps (N, C, H, W)."""
        window = self.get_buffer("window").to(maps.dtype).repeat(maps.shape[1], 1, 1, 1)
        slope = paper.WITHIN_ALPHA / paper.WITHIN_SIZE**2
        return _Response.apply(maps, window, paper.WITHIN_K, slope)


class Activation(nn.Module):
    """What follows the response of ``layer`` (section 3.1); forward hooks see what it gives."""

    def __init__(self, layer: str, kind: str) -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind

    def forward(self, response: Tensor) -> Tensor:
        """Return the activations, shaped as ``response``."""
        return ACTIVATIONS[self.kind](response)

    def extra_repr(self) -> str:
        """Name the layer and the function."""
        return f"{self.layer}, {self.kind}"


@dataclass(frozen=True)
class DropoutSeed:
    """What fixes a step's dropout: masks are a function of this and the layer, not of the rank.

    ``rows`` are this replica's images within the ``total`` images of the global batch.
    """

    seed: int
    step: int
    rows: slice
    total: int


class Dropout(nn.Module):
    """Multiply by a 0/1 mask in training, by the share kept in evaluation (section 4.2).

    Never scaled in training.  ``units`` is the width of the whole layer, ``own`` the slice of it
    that this module sees; the mask is drawn whole and sliced, so that a split net drops what the
    whole net drops.  Without a ``draw`` the mask comes from torch's global generator.
    """

    def __init__(self, layer: str, units: int, own: slice, share: float) -> None:
        super().__init__()
        self.layer = layer
        self.units = units
        self.own = own
        self.share = share
        self.draw: DropoutSeed | None = None

    def forward(self, units: Tensor) -> Tensor:
        """Return ``units`` (N, C), masked or scaled."""
        if self.share == 0:
            return units
        if not self.training:
            return units * (1 - self.share)
        return units * self._mask(units)

    def _mask(self, units: Tensor) -> Tensor:
        draw = self.draw
        if draw is None:
            source, total, rows = None, len(units), slice(None)
        else:
            source = generator(draw.seed, "dropout", self.layer, draw.step, device=units.device)
            total, rows = draw.total, draw.rows
        whole = torch.empty(total, self.units, dtype=torch.bool, device=units.device)
        return whole.bernoulli_(1 - self.share, generator=source)[rows, self.own].to(units.dtype)

    def extra_repr(self) -> str:
        """Name the layer, the share dropped and the own slice."""
        return f"{self.layer}, share={self.share}, own={self.own.start}:{self.own.stop}"


def norm(plan: Plan, layer: str, columns: int) -> nn.Module:
    """Return what stands after conv1 or conv2 for ``columns`` columns, see ``paper.Plan.norm``."""
    maps = plan.layers[layer].outputs
    if plan.norm == "batch":
        return BatchNorm(maps * columns)
    if plan.norm == "within_channel":
        return WithinMap()
    if plan.norm == "none" or (plan.norm == "first_only" and layer == "conv2"):
        return nn.Identity()
    across = AcrossMaps(maps, plan.recipe.alpha)
    within = layer == "conv2" and plan.recipe.norms == "across_and_within"
    return nn.Sequential(across, WithinMap()) if within else across


class BatchNorm(nn.Module):
    """torch's batch normalization without scale and shift, where response normalization stood.

    Each column normalizes its own maps, so a split net computes what the whole net computes.
    """

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(maps))
        self.register_buffer("running_var", torch.ones(maps))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's own
        """Follow the net, but not to bfloat16: running means of a tenth of a batch stall there."""
        wide = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            before = wide[name]
            if moved is not None and before is not None and moved.dtype == torch.bfloat16:
                self._buffers[name] = before.to(moved.device)
        return self

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps (N, C, H, W); in training by this batch's own statistics."""
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return functional.batch_norm(maps, mean, var, training=self.training)


def pool(kind: str) -> nn.Module:
    """Return the pooling layer of that kind, see ``paper.Plan``; outputs are rounded up."""
    if kind == "non_overlapping":
        return nn.MaxPool2d(2, stride=2, ceil_mode=True)
    if kind == "average":
        return nn.AvgPool2d(3, stride=2, ceil_mode=True)
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
