"""conv1's input in one pass: patches of 4 x 4 pixels as 48 maps, see ``net.fused``."""

# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917 - a kernel's arguments and how Triton reads them
# pyright: reportMissingParameterType=false

from __future__ import annotations  # tl is None without Triton

from typing import Final

import torch
from torch import Tensor

from modelpar.gpu.language import jit, tl

BLOCK: Final = 1024  # numbers per program


@jit
def _patches(
    images, out, side, count, left, top, of_image, of_channel, of_row, of_column,
    step: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    maps: tl.constexpr = 3 * step * step
    at = tl.program_id(1) * block + tl.arange(0, block)  # in the memory of one image's patches
    inside = at < count * count * maps
    place, number = at // maps, at % maps  # maps are ordered by row, column, channel
    y = place // count * step + number // (3 * step) - top
    x = place % count * step + number // 3 % step - left
    source = images + image * of_image + number % 3 * of_channel + y * of_row + x * of_column
    known = inside & (y >= 0) & (y < side) & (x >= 0) & (x < side)
    value = tl.load(source, mask=known, other=0.0)
    tl.store(out + image * (count * count * maps) + at, value, mask=inside)


def patches(images: Tensor, count: int, step: int, left: int, top: int) -> Tensor:
    """Return (N, 3, S, S) as (N, 3 step^2, count, count) in channels_last memory.

    The first patch begins ``left`` columns and ``top`` rows outside the image.  Numbers outside
    the image are 0.  There is no gradient.
    """
    shape = (len(images), count, count, 3 * step * step)
    out = torch.empty(shape, dtype=images.dtype, device=images.device)
    grid = (len(images), -(-out[0].numel() // BLOCK))
    sizes = (images.shape[-1], count, left, top, *images.stride())
    with torch.cuda.device_of(images):  # Triton launches on the current one
        _patches[grid](images, out, *sizes, step=step, block=BLOCK)
    return out.permute(0, 3, 1, 2)
