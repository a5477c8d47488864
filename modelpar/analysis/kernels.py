"""How conv1's columns have specialised, in numbers (figure 3 and section 6.1).

The paper reports that in every run the kernels of one GPU are largely colour-agnostic, and those
of the other GPU largely colour-specific.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.utils import make_grid

COLOURS: Final = 3
RANDOM_SHARE: Final = 1 - 1 / COLOURS  # colour share of random weights
# An 11 x 11 kernel of random weights has 0.67 +- 0.035: 1 in 170 of them counts as colour.
COLOUR_SHARE: Final = 0.75
KERNELS_PER_ROW: Final = 16  # three rows per column, as in figure 3
GAP: Final = 3  # pixels between the columns, before the picture is enlarged


def colour_share(kernels: Tensor) -> Tensor:
    """Return the share of each kernel's energy that is off the grey axis: (C, 3, K, K) -> (C,).

    The energy on the grey axis is the squared length of each pixel's projection on
    (1, 1, 1) / sqrt(3), summed over all pixels.  0: grey; 1: no grey; random weights: 2/3.
    """
    wide = kernels.double()
    energy = wide.square().sum((1, 2, 3))
    grey = (wide.sum(1) / sqrt(COLOURS)).square().sum((1, 2))
    return ((energy - grey) / energy.clamp(min=torch.finfo(wide.dtype).tiny)).clamp(0, 1)


def frequency(kernels: Tensor) -> Tensor:
    """Return the spatial frequency of each kernel in cycles per pixel: (C, 3, K, K) -> (C,).

    This is the mean distance from 0 in the plane of the two-dimensional Fourier transform,
    weighted by the power summed over the colours.  The constant part counts at frequency 0, so a
    blob of one colour is low.  Random weights have the mean of the plane (0.38 for 11 pixels).
    """
    power = torch.fft.fft2(kernels.double()).abs().square().sum(1)
    cycles = torch.fft.fftfreq(kernels.shape[-1], dtype=power.dtype, device=power.device)
    radius = torch.hypot(cycles[:, None], cycles)
    total = power.sum((1, 2)).clamp(min=torch.finfo(power.dtype).tiny)
    return (power * radius).sum((1, 2)) / total


@dataclass(frozen=True)
class Specialisation:
    """The kernels (C, 3, K, K) of one column, their colour shares and cycles per pixel."""

    kernels: Tensor
    colour_share: Tensor
    frequency: Tensor

    @property
    def colour_kernels(self) -> int:
        """The number of kernels whose colour share is above ``COLOUR_SHARE``."""
        return int((self.colour_share > COLOUR_SHARE).sum())


def specialisation(kernels: Tensor, columns: int) -> list[Specialisation]:
    """Return the specialisation of each column; ``kernels`` (C, 3, K, K) are of all columns."""
    parts = kernels.chunk(columns)
    return [Specialisation(part, colour_share(part), frequency(part)) for part in parts]


def colour_difference(columns: list[Specialisation]) -> float | None:
    """Return column 0's mean colour share minus column 1's; None for one column."""
    means = [float(column.colour_share.mean()) for column in columns]
    return means[0] - means[1] if len(means) > 1 else None


def kernel_picture(kernels: Tensor, columns: int = 2) -> Tensor:
    """Return conv1's kernels (96, 3, 11, 11) as one picture (3, H, W) in 0..1, like figure 3.

    The kernels of column 0 are above those of column 1, with a gap between them.  Each kernel is
    scaled by its largest absolute weight around mid-grey, and enlarged four times.
    """
    largest = kernels.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    scaled = kernels.float() / largest / 2 + 0.5
    parts: list[Tensor] = []
    for part in scaled.chunk(columns):
        grid = make_grid(part, nrow=KERNELS_PER_ROW, padding=1, pad_value=1.0)
        parts += [torch.ones(3, GAP, grid.shape[2]), grid]
    picture = torch.cat(parts[1:], dim=1)
    return functional.interpolate(picture[None], scale_factor=4, mode="nearest")[0]
