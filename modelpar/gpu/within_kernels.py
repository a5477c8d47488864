"""The Triton kernels of ``block`` for a normalization within each map (run 145, ``rnorm``).

A thread adds up the 25 places of its window; neighbouring threads read them from the same cache.
Tiles are those of ``block_kernels``.
"""

# Triton has a language of its own.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations  # tl is None without Triton

from modelpar.gpu.block_kernels import groups, input_gradient, load, tile
from modelpar.gpu.language import jit, tl


@jit
def _window_sum(
    values, p, c, positions, H, W, C: tl.constexpr, REACH: tl.constexpr, SQUARE: tl.constexpr
):
    """Return the sums over the windows around the positions p of values, or of their squares."""
    w, h = p % W, p // W % H
    total = tl.zeros([p.shape[0], c.shape[0], 8], tl.float32)
    for i in range(-REACH, REACH + 1):
        for j in tl.static_range(2 * REACH + 1):
            column = w + j - REACH
            inside = (h + i >= 0) & (h + i < H) & (column >= 0) & (column < W) & (p < positions)
            mask = inside[:, None, None] & (c < C)[None, :, :]
            offset = (p + i * W + j - REACH).to(tl.int64)[:, None, None] * C + c[None, :, :]
            value = tl.load(values + offset, mask=mask, other=0.0).to(tl.float32)
            total += value * value if SQUARE else value
    return total


@jit
def within_forward(
    maps, out, positions, H, W, k, slope,
    C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Write the normalized maps at P positions."""
    p, c, offset, mask = tile(tl.program_id(0), positions, C, G, P)
    x = tl.load(maps + offset, mask=mask, other=0.0).to(tl.float32)
    root = tl.rsqrt(k + slope * _window_sum(maps, p, c, positions, H, W, C, REACH, True))
    tl.store(out + offset, (x * root * tl.sqrt(root)).to(out.dtype.element_ty), mask=mask)


@jit
def within_uneven(
    maps, grads, uneven, positions, H, W, k, slope,
    C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Write g x s ** -7/4, whose sum over each window is part of the gradient, at P positions."""
    p, c, offset, mask = tile(tl.program_id(0), positions, C, G, P)
    x = tl.load(maps + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grads + offset, mask=mask, other=0.0).to(tl.float32)
    root = tl.rsqrt(k + slope * _window_sum(maps, p, c, positions, H, W, C, REACH, True))
    value = grad * x * root * tl.sqrt(root) * root * root
    tl.store(uneven + offset, value.to(uneven.dtype.element_ty), mask=mask)


@jit
def within_backward(
    maps, bias, across, grads, uneven, maps_grad, bias_grad, positions, H, W,
    k, slope, within_k, within_slope,
    C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr, REACH: tl.constexpr,
    FIRST: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the response at TILES times P positions, and their sum over these."""
    c = groups(tl.program_id(1) * G * 8, G)
    offsets = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([P, G, 8], tl.float32)
    for number in range(TILES):
        p, _c, offset, mask = tile(tl.program_id(0) * TILES + number, positions, C, G, P)
        squares = _window_sum(across, p, c, positions, H, W, C, REACH, True)
        around = _window_sum(uneven, p, c, positions, H, W, C, REACH, False)
        root = tl.rsqrt(within_k + within_slope * squares)
        normalized = tl.load(across + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grads + offset, mask=mask, other=0.0).to(tl.float32)
        grad = grad * root * tl.sqrt(root) - 1.5 * within_slope * normalized * around
        x = load(maps, offsets, offset, mask, FIRST)
        grad = input_gradient(x, grad, k, slope, FIRST, ACROSS)
        tl.store(maps_grad + offset, grad.to(maps_grad.dtype.element_ty), mask=mask)
        total += tl.where(mask, grad, 0.0)
    tl.store(bias_grad + tl.program_id(0) * C + c, tl.sum(total, axis=0), mask=c < C)
