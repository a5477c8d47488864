"""The layers torch does not have as the paper needs them: response normalization and dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional

from modelpar.mesh import generator
from modelpar.net import paper

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": functional.relu,  # section 3.1
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": functional.elu,
}


class _AcrossMaps(Function):
    """y = x * s ** -beta, s = k + alpha / n * (sum of n squares), with a backward of its own.

    The sum over neighbouring maps is a 1 x 1 convolution with a banded matrix of ones, which runs
    as a matrix product: several times faster than torch's pooling over maps.  With beta = 3/4,
    s ** -beta is r * sqrt(r) for r = 1 / sqrt(s).
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, band: Tensor, slope: float) -> Tensor:
        r = functional.conv2d(maps * maps, band).mul_(slope).add_(paper.NORM_K).rsqrt_()
        scale = r.sqrt().mul_(r)
        ctx.save_for_backward(maps, band, r, scale)
        ctx.slope = slope
        return maps * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        maps, band, r, scale = ctx.saved_tensors
        # dx = g s^-b - 2 b alpha/n x * sum over the same neighbours of (g x s^-b / s)
        straight = grads[0] * scale
        around = functional.conv2d((straight * maps).mul_(r).mul_(r), band)
        factor = -2 * paper.NORM_BETA * ctx.slope
        return torch.addcmul(straight, maps, around, value=factor), None, None


class AcrossMaps(nn.Module):
    """Response normalization over neighbouring maps of one column (section 3.3).

    ``maps`` is how many maps a column has, so that no window reaches over the seam between two;
    the input (N, C, H, W) may hold several columns.  ``alpha`` counts over the whole window, as
    torch does: y = x / (k + alpha / n * sum of n squares) ** beta.
    """

    def __init__(self, maps: int, alpha: float) -> None:
        super().__init__()
        self.maps = maps
        self.alpha = alpha
        place = torch.arange(maps)
        near = (place[:, None] - place).abs() <= paper.NORM_SIZE // 2
        self.register_buffer("band", near.float()[:, :, None, None], persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps, shaped as ``maps``."""
        apart = maps.unflatten(1, (-1, self.maps)).flatten(0, 1)  # (N * columns, maps, H, W)
        band = self.get_buffer("band")
        slope = self.alpha / paper.NORM_SIZE
        if maps.dtype.itemsize < band.dtype.itemsize:  # half precision: in float32 all the same
            with torch.autocast(maps.device.type, enabled=False):
                normal: Tensor = _AcrossMaps.apply(apart.float(), band, slope)
        else:
            normal = _AcrossMaps.apply(apart, band.to(maps.dtype), slope)
        return normal.to(maps.dtype).view_as(maps)

    def extra_repr(self) -> str:
        """Name what makes it."""
        return f"{self.maps} maps, alpha={self.alpha}"


class WithinMap(nn.Module):
    """Response normalization over 5 x 5 pixels of the same map (run 145, ``rnorm``).

    y = x * (1 + 1e-3 / 25 * sum of 25 squares) ** -0.75; pixels outside the map count as zero.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps (N, C, H, W)."""
        wide = maps.float() if maps.dtype.itemsize < torch.float32.itemsize else maps
        mean_square = functional.avg_pool2d(
            wide * wide, paper.WITHIN_SIZE, stride=1, padding=paper.WITHIN_SIZE // 2
        )
        scale = (paper.WITHIN_K + paper.WITHIN_ALPHA * mean_square) ** -paper.WITHIN_BETA
        return (wide * scale).to(maps.dtype)


@dataclass(frozen=True)
class Draw:
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
        self.draw: Draw | None = None

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


def pool(kind: str) -> nn.Module:
    """Return the pooling layer of that kind, see ``paper.Plan``; outputs are rounded up."""
    if kind == "tiled":
        return nn.MaxPool2d(2, stride=2, ceil_mode=True)
    if kind == "average":
        return nn.AvgPool2d(3, stride=2, ceil_mode=True)
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
