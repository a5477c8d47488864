"""The Triton kernels of ``block`` for a normalization within each map (run 145, ``rnorm``).

A window is 5 x 5 places.  A program writes a strip, P columns of ROWS rows, from the top down: it
adds up five places of each row once, and five of these sums are those of a window.
"""

# Triton has a language of its own.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations  # tl is None without Triton

from modelpar.gpu.block_kernels import groups, input_gradient, load, offset_of
from modelpar.gpu.language import jit, tl


@jit
def _strip(H, W, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    """Return where the program's image begins, its first row, its columns and its maps."""
    bands, tiles = tl.cdiv(H, ROWS), tl.cdiv(W, P)
    number = tl.program_id(0)
    image = (number // (bands * tiles)).to(tl.int64) * H * W * C
    first = number // tiles % bands * ROWS
    w = number % tiles * P + tl.arange(0, P)
    return image, first, w, groups(tl.program_id(1) * G * 8, G)


@jit
def _places(image, h, w, c, H, W, C: tl.constexpr):
    """Return where the maps c at the columns w of row h are, and which exist."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    mask = inside[:, None, None] & (c < C)[None, :, :]
    return offset_of(image, h, w, W, c, C), mask


@jit
def _row_sum(values, image, h, w, c, H, W, C: tl.constexpr, SQUARE: tl.constexpr):
    """Return the sums over the columns w - 2 to w + 2 of row h, of values or of their squares."""
    total = tl.zeros([w.shape[0], c.shape[0], 8], tl.float32)
    for j in tl.static_range(5):
        offset, mask = _places(image, h, w + j - 2, c, H, W, C)
        value = tl.load(values + offset, mask=mask, other=0.0).to(tl.float32)
        total += value * value if SQUARE else value
    return total


@jit
def _four_rows(values, image, h, w, c, H, W, C: tl.constexpr, SQUARE: tl.constexpr):
    """Return the sums of the rows h - 2 to h + 1."""
    row0 = _row_sum(values, image, h - 2, w, c, H, W, C, SQUARE)
    row1 = _row_sum(values, image, h - 1, w, c, H, W, C, SQUARE)
    row2 = _row_sum(values, image, h, w, c, H, W, C, SQUARE)
    row3 = _row_sum(values, image, h + 1, w, c, H, W, C, SQUARE)
    return row0, row1, row2, row3


@jit
def within_places(
    maps, grads, out, H, W, k, slope,
    C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    CROSS_TERM: tl.constexpr,
):  # fmt: skip
    """Write the normalized maps, or g x s ** -7/4.

    The window sums of the latter are the part of the gradient that comes through the sums s.
    """
    image, first, w, c = _strip(H, W, C, G, P, ROWS)
    s0, s1, s2, s3 = _four_rows(maps, image, first, w, c, H, W, C, True)
    for step in range(ROWS):
        s4 = _row_sum(maps, image, first + step + 2, w, c, H, W, C, True)
        offset, mask = _places(image, first + step, w, c, H, W, C)
        x = tl.load(maps + offset, mask=mask, other=0.0).to(tl.float32)
        root = tl.rsqrt(k + slope * (s0 + s1 + s2 + s3 + s4))
        value = x * root * tl.sqrt(root)
        if CROSS_TERM:
            value *= tl.load(grads + offset, mask=mask, other=0.0).to(tl.float32) * root * root
        tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)
        s0, s1, s2, s3 = s1, s2, s3, s4


@jit
def within_backward(
    maps, bias, across, grads, cross_term, maps_grad, bias_grad, H, W,
    k, slope, within_k, within_slope,
    C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the response, and their sum over the strip."""
    image, first, w, c = _strip(H, W, C, G, P, ROWS)
    offsets = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([P, G, 8], tl.float32)
    s0, s1, s2, s3 = _four_rows(across, image, first, w, c, H, W, C, True)
    u0, u1, u2, u3 = _four_rows(cross_term, image, first, w, c, H, W, C, False)
    for step in range(ROWS):
        s4 = _row_sum(across, image, first + step + 2, w, c, H, W, C, True)
        u4 = _row_sum(cross_term, image, first + step + 2, w, c, H, W, C, False)
        offset, mask = _places(image, first + step, w, c, H, W, C)
        root = tl.rsqrt(within_k + within_slope * (s0 + s1 + s2 + s3 + s4))
        normalized = tl.load(across + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grads + offset, mask=mask, other=0.0).to(tl.float32)
        around = 1.5 * within_slope * normalized * (u0 + u1 + u2 + u3 + u4)
        grad = grad * root * tl.sqrt(root) - around
        x = load(maps, offsets, offset, mask, FIRST)
        grad = input_gradient(x, grad, k, slope, FIRST, ACROSS)
        tl.store(maps_grad + offset, grad.to(maps_grad.dtype.element_ty), mask=mask)
        total += tl.where(mask, grad, 0.0)
        s0, s1, s2, s3 = s1, s2, s3, s4
        u0, u1, u2, u3 = u1, u2, u3, u4
    tl.store(bias_grad + tl.program_id(0) * C + c, tl.sum(total, axis=0), mask=c < C)
