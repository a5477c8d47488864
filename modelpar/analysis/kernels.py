"""How far conv1's columns have specialised, in numbers: figure 3 and section 6.1.

The paper says of its picture that the kernels of one GPU are largely colour-agnostic, those of the
other largely colour-specific, in every run.
"""

from dataclasses import dataclass
from math import hypot, sqrt
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.utils import make_grid

COLOURS: Final = 3
RANDOM_SHARE: Final = (
    1 - 1 / COLOURS
)  # share off the grey axis of weights that have learnt nothing
# An 11 x 11 kernel of random weights has .67 +- .035: 1 in 100 of them is called colour.
COLOUR_SHARE: Final = 0.75

KERNELS_PER_ROW: Final = 16  # three rows per column, as in figure 3
GAP: Final = 3  # pixels between the columns, before the picture is enlarged


def colour_share(kernels: Tensor) -> Tensor:
    """Return the share of each kernel's energy off the grey axis: (C, 3, K, K) -> (C,).

    1 less the squared length of each pixel's projection on (1, 1, 1) / sqrt(3), over all pixels,
    as a share of the kernel's energy.  0: grey; 1: colour alone; random weights: 2/3.
    """
    wide = kernels.double()
    energy = wide.square().sum((1, 2, 3))
    grey = (wide.sum(1) / sqrt(COLOURS)).square().sum((1, 2))
    return ((energy - grey) / energy.clamp(min=torch.finfo(wide.dtype).tiny)).clamp(0, 1)


def frequency(kernels: Tensor) -> Tensor:
    """Return the spatial frequency of each kernel in cycles a pixel: (C, 3, K, K) -> (C,).

    The mean distance from 0 in the plane of the two-dimensional Fourier transform, weighed with
    the power, which is summed over the colours.  What is constant counts too, at frequency 0: a
    blob of one colour is low.  Random weights have the plane's own mean (.38 for 11 pixels).
    """
    power = torch.fft.fft2(kernels.double()).abs().square().sum(1)
    cycles = torch.fft.fftfreq(kernels.shape[-1], dtype=power.dtype, device=power.device)
    radius = torch.hypot(cycles[:, None], cycles)
    total = power.sum((1, 2)).clamp(min=torch.finfo(power.dtype).tiny)
    return (power * radius).sum((1, 2)) / total


@dataclass(frozen=True)
class Specialisation:
    """Of each of a column's kernels: share off the grey axis, frequency in cycles a pixel."""

    colour_share: Tensor
    frequency: Tensor

    @property
    def colour_kernels(self) -> int:
        """How many kernels have more than ``COLOUR_SHARE`` of their energy off the grey axis."""
        return int((self.colour_share > COLOUR_SHARE).sum())


def specialisation(kernels: Tensor, columns: int) -> list[Specialisation]:
    """Return what the kernels (C, 3, K, K) of each column are."""
    return [Specialisation(colour_share(own), frequency(own)) for own in kernels.chunk(columns)]


def colour_difference(columns: list[Specialisation]) -> tuple[float, float] | None:
    """Return column 0's mean share off the grey axis less column 1's, and its standard error.

    The error is that of two means over kernels.  None where there is one column.
    """
    if len(columns) == 1:
        return None
    one, other = (column.colour_share for column in columns)
    error = hypot(*(float(own.std()) / sqrt(len(own)) for own in (one, other)))
    return float(one.mean() - other.mean()), error


def kernel_picture(kernels: Tensor, columns: int = 2) -> Tensor:
    """Return conv1's kernels (96, 3, 11, 11) as one picture (3, H, W) in 0..1, like figure 3.

    The kernels of column 0 are above those of column 1, with a gap between them.  Each kernel is
    scaled by its largest absolute weight around mid-grey, and enlarged four times.
    """
    largest = kernels.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    scaled = kernels.float() / largest / 2 + 0.5
    parts: list[Tensor] = []
    for own in scaled.chunk(columns):
        grid = make_grid(own, nrow=KERNELS_PER_ROW, padding=1, pad_value=1.0)
        parts += [torch.ones(3, GAP, grid.shape[2]), grid]
    picture = torch.cat(parts[1:], dim=1)
    return functional.interpolate(picture[None], scale_factor=4, mode="nearest")[0]
