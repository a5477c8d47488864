"""Histograms of what each column holds, small enough to be gathered from both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from modelpar.distributed import Mesh, all_reduce_sum

BINS: Final = 40
SAMPLE: Final = 2**14  # values of a tensor that are counted: the shape of its distribution


@dataclass(frozen=True)
class Histogram:
    """Counts of the values of ``name`` in ``column``.

    ``counts`` (BINS,) are of equal intervals from ``least`` to ``most``.
    """

    name: str
    column: int
    least: float
    most: float
    total: float
    squares: float
    counts: list[float]


def sample(values: Tensor, count: int = SAMPLE) -> Tensor:
    """Return a copy of about ``count`` evenly spaced values, in float32 and in one dimension.

    Their distance is odd, so that those of a matrix are not all of the same few columns.
    """
    flat = values.detach().flatten()
    return flat[:: (len(flat) // max(count, 1)) | 1].to(torch.float32, copy=True)


def _counted(values: Tensor) -> Tensor:
    """Return least, most, sum, sum of squares and counts (4 + BINS,) of finite ``values``."""
    values = values.cpu().double()  # on a GPU histc is not deterministic
    values = values[values.isfinite()]
    if not len(values):
        return torch.zeros(4 + BINS, dtype=torch.float64)
    least, most = (float(end) for end in values.aminmax())
    if least == most:
        least, most = least - 0.5, most + 0.5
    counts = torch.histc(values, BINS, least, most)
    sums = torch.tensor([least, most, float(values.sum()), float(values.square().sum())])
    return torch.cat([sums.double(), counts])


def gathered(samples: Mapping[str, Sequence[Tensor]], columns: int, mesh: Mesh) -> list[Histogram]:
    """Return the histograms of all columns, by the samples of this process's columns.

    A collective of the pair.  Both columns have the same names.  A histogram without values is
    left out.
    """
    rows = torch.zeros(len(samples), columns, 4 + BINS, dtype=torch.float64)
    for row, parts in zip(rows, samples.values(), strict=True):
        for place, values in enumerate(parts, mesh.column):
            row[place] = _counted(values)
    rows = all_reduce_sum(rows.to(mesh.device), mesh.pair).cpu()
    return [
        Histogram(name, column, *one[:4], counts=one[4:])
        for name, each in zip(samples, rows.tolist(), strict=True)
        for column, one in enumerate(each)
        if any(one[4:])
    ]
