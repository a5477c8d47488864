"""How far conv1's columns have specialised, in numbers: figure 3 and section 6.1.

The paper says of its picture that the kernels of one GPU are largely colour-agnostic, those of the
other largely colour-specific, in every run.
"""

from dataclasses import dataclass
from math import hypot, sqrt
from typing import Final

import torch
from torch import Tensor

COLOURS: Final = 3
RANDOM: Final = 1 - 1 / COLOURS  # share off the grey axis of weights that have learnt nothing
# An 11 x 11 kernel of random weights has .67 +- .035: 1 in 100 of them is called colour.
COLOUR: Final = 0.75


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
    def colour(self) -> int:
        """How many kernels have more than ``COLOUR`` of their energy off the grey axis."""
        return int((self.colour_share > COLOUR).sum())


def specialisation(kernels: Tensor, columns: int) -> list[Specialisation]:
    """Return what the kernels (C, 3, K, K) of each column are."""
    return [Specialisation(colour_share(own), frequency(own)) for own in kernels.chunk(columns)]


def difference(columns: list[Specialisation]) -> tuple[float, float] | None:
    """Return column 0's mean share off the grey axis less column 1's, and its standard error.

    The error is that of two means over kernels.  None where there is one column.
    """
    if len(columns) == 1:
        return None
    one, other = (column.colour_share for column in columns)
    error = hypot(*(float(own.std()) / sqrt(len(own)) for own in (one, other)))
    return float(one.mean() - other.mean()), error
