"""The momentum and decay update of section 5 in one pass over each parameter."""

# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917 - a kernel's arguments and how Triton reads them
# pyright: reportMissingParameterType=false

from __future__ import annotations  # tl is None without Triton

from typing import Final

import torch
from torch import Tensor

from modelpar.gpu.language import jit, tl

LARGE: Final = 1 << 16  # numbers of a large weight
# Numbers and warps per program.  Small weights take small blocks, to spread over the whole GPU.
LARGE_BLOCK: Final = {"block": 4096, "num_warps": 8}
SMALL_BLOCK: Final = {"block": 256, "num_warps": 1}


@jit
def _update(
    weight, velocity, grad, rounded, rate, ok, decay, momentum, count, block: tl.constexpr
):
    step = tl.load(rate).to(tl.float32)
    changes = step != 0
    if ok is not None:
        changes = changes & (tl.load(ok) != 0)
    if changes:
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = at < count
        old = tl.load(weight + at, mask=inside)
        slope = tl.load(grad + at, mask=inside).to(tl.float32) + decay * old
        change = momentum * tl.load(velocity + at, mask=inside) - step * slope
        new = old + change
        tl.store(velocity + at, change, mask=inside)
        tl.store(weight + at, new, mask=inside)
        if rounded is not None:
            tl.store(rounded + at, new.to(rounded.dtype.element_ty), mask=inside)


def update(
    weight: Tensor,
    velocity: Tensor,
    grad: Tensor,
    rate: Tensor,
    decay: float,
    momentum: float,
    rounded: Tensor | None = None,
    ok: Tensor | None = None,
) -> None:
    """Do v <- momentum v - rate (decay w + grad);  w <- w + v;  rounded <- w, in place.

    ``weight`` and ``velocity`` are float32, dense, and with equal strides, as is ``rounded``.
    ``grad`` has the same shape.  ``rate`` is a scalar on the device, and so is ``ok``, int32 or
    bool.  If one of them is 0, nothing changes.  Each operation rounds to float32 by itself, so
    the result is bit for bit that of the plain update.  Raises ValueError for other strides.
    """
    for other in (velocity, rounded):
        if other is not None and other.stride() != weight.stride():
            raise ValueError(f"strides {other.stride()} differ from {weight.stride()}")
    if grad.stride() != weight.stride():  # the kernel goes through memory in its order
        grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    count = weight.numel()
    how = LARGE_BLOCK if count > LARGE else SMALL_BLOCK
    inputs = (weight, velocity, grad, rounded, rate, ok, decay, momentum, count)
    with torch.cuda.device_of(weight):  # Triton launches on the current one
        # A fused multiply-add would round differently, and memory is what limits the kernel.
        _update[(-(-count // how["block"]),)](*inputs, **how, enable_fp_fusion=False)
