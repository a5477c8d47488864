"""Section 4.1 in one pass: crop, flip, mean, colour noise, type and memory order."""

# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917 - a kernel's arguments and how Triton reads them
# pyright: reportMissingParameterType=false

from __future__ import annotations  # tl is None without Triton

from typing import Final

import torch
from torch import Tensor

from modelpar.gpu.language import jit, tl

BLOCK: Final = 1024  # numbers per program


@jit
def _crop(
    images, corner, flip, colour, axes, mean, out, noise, divisor,
    of_image, of_channel, of_row, of_column, size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)  # in the memory of one crop
    inside = at < size * size * 3
    channel = at % 3
    pixel = at // 3
    x = pixel % size
    row = tl.load(corner + 2 * image) + pixel // size
    column = tl.load(corner + 2 * image + 1) + tl.where(tl.load(flip + image), size - 1 - x, x)
    source = images + image * of_image + channel * of_channel + row * of_row + column * of_column
    value = tl.load(source, mask=inside, other=0).to(tl.float32)
    value -= tl.load(mean + channel * size * size + pixel, mask=inside, other=0.0)
    for axis in tl.static_range(3):  # pyright: ignore[reportGeneralTypeIssues]
        strength = noise * tl.load(colour + 3 * image + axis)
        value += strength * tl.load(axes + 3 * axis + channel)
    to = out + image * (size * size * 3) + at
    tl.store(to, (value / divisor).to(out.dtype.element_ty), mask=inside)


def crop(
    images: Tensor,
    draws: tuple[Tensor, Tensor, Tensor],
    mean: Tensor,
    axes: Tensor,
    noise: float,
    divisor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return crops (N, 3, S, S) of ``images``, in channels_last memory.

    ``images``: (N, 3, T, T) uint8 with any strides.  ``draws``: the corners (N, 2) int64, flips
    (N,) bool and colours (N, 3) float32 of ``CropFlipColour``.  ``mean`` (3, S, S) float32 is
    subtracted.  ``noise`` times the colours times the rows of ``axes`` (3, 3) float32 is added,
    and the sum is divided by ``divisor``.  All tensors are on one device.
    """
    corner, flip, colour = (part.contiguous() for part in draws)
    count, size = len(images), mean.shape[-1]
    order = torch.channels_last
    out = torch.empty(
        (count, 3, size, size), dtype=dtype, device=images.device, memory_format=order
    )
    how = {"size": size, "block": BLOCK}
    inputs = (images, corner, flip, colour, axes.contiguous(), mean.contiguous(), out)
    grid = (count, -(-3 * size * size // BLOCK))
    with torch.cuda.device_of(images):  # Triton launches on the current one
        _crop[grid](*inputs, float(noise), float(divisor), *images.stride(), **how)
    return out
