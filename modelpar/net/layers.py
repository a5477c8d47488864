"""The layers torch does not have as the paper needs them: response normalization and dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
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


class AcrossMaps(nn.Module):
    """Response normalization over neighbouring maps of one column (section 3.3).

    ``columns`` is how many columns' maps the input holds: (N, C, H, W) with C a multiple of it;
    no window reaches over the seam between two.  ``alpha`` counts over the whole window, as in
    torch: y = x / (k + alpha / n * sum of n squares) ** beta.
    """

    def __init__(self, alpha: float, columns: int = 1) -> None:
        super().__init__()
        self.alpha = alpha
        self.columns = columns

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps, shaped as ``maps``."""
        apart = maps.unflatten(1, (self.columns, -1)).flatten(0, 1)  # (N * columns, C / columns)
        normal = functional.local_response_norm(
            apart.float() if apart.dtype.itemsize < torch.float32.itemsize else apart,
            paper.NORM_SIZE,
            alpha=self.alpha,
            beta=paper.NORM_BETA,
            k=paper.NORM_K,
        )
        return normal.to(maps.dtype).view_as(maps)

    def extra_repr(self) -> str:
        """Name what is not a default."""
        return f"alpha={self.alpha}, columns={self.columns}"


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
