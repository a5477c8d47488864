"""The Triton kernels of ``block``.

A tile is P positions by G groups of eight maps: a thread loads eight neighbouring maps at once, so
that the sum over neighbours stays in its registers but for two maps on either side.  C is the
number of maps; G times 8 may be more.  Memory is NHWC.
"""

# Triton has a language of its own.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations  # tl is None without Triton

from modelpar.gpu.language import jit, tl


@jit
def load(maps, bias, offset, mask, FIRST: tl.constexpr):
    """Return response plus bias; if FIRST rectified, and 0 outside the maps.  NaN stays NaN."""
    outside = float("-inf") if FIRST else 0.0
    x = tl.load(maps + offset, mask=mask, other=outside).to(tl.float32) + bias[None, :, :]
    if FIRST:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@jit
def _from_group(values, step: tl.constexpr):
    """Return for each group the value of the group ``step`` further, or 0 where there is none."""
    P: tl.constexpr = values.shape[0]
    G: tl.constexpr = values.shape[1]
    g = tl.arange(0, G)[None, :] + tl.zeros([P, 1], tl.int32) + step
    inside = (g >= 0) & (g < G)
    return tl.where(inside, tl.gather(values, tl.where(inside, g, 0), 1), 0.0)


@jit
def _around(v):
    """Return the sums over five neighbouring maps of ``v`` (P, G, 8)."""
    P: tl.constexpr = v.shape[0]
    G: tl.constexpr = v.shape[1]
    even, odd = tl.split(tl.reshape(v, [P, G, 4, 2]))
    v04, v26 = tl.split(tl.reshape(even, [P, G, 2, 2]))
    v15, v37 = tl.split(tl.reshape(odd, [P, G, 2, 2]))
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    before6, before7 = _from_group(v6, -1), _from_group(v7, -1)
    after0, after1 = _from_group(v0, 1), _from_group(v1, 1)
    v01, v23, v45, v67 = v0 + v1, v2 + v3, v4 + v5, v6 + v7
    s0 = before6 + before7 + v01 + v2
    s1 = before7 + v01 + v23
    s2 = v01 + v23 + v4
    s3 = v1 + v23 + v45
    s4 = v23 + v45 + v6
    s5 = v3 + v45 + v67
    s6 = v45 + v67 + after0
    s7 = v5 + v67 + (after0 + after1)
    even = tl.reshape(tl.join(tl.join(s0, s4), tl.join(s2, s6)), [P, G, 4])
    odd = tl.reshape(tl.join(tl.join(s1, s5), tl.join(s3, s7)), [P, G, 4])
    return tl.reshape(tl.join(even, odd), [P, G, 8])


@jit
def _inverse_root(x, k, slope):
    """Return (k + slope * the sum of squares over neighbouring maps) ** -1/2."""
    return tl.rsqrt(k + slope * _around(x * x))


@jit
def groups(first, G: tl.constexpr):
    """Return the numbers (G, 8) of the maps from ``first`` on."""
    return first + tl.arange(0, G)[:, None] * 8 + tl.arange(0, 8)[None, :]


@jit
def tile(number, positions, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """Return positions and maps of a tile without a pool, where they are, and which exist."""
    p = number * P + tl.arange(0, P)
    c = groups(tl.program_id(1) * G * 8, G)
    offset = p.to(tl.int64)[:, None, None] * C + c[None, :, :]
    return p, c, offset, (p < positions)[:, None, None] & (c < C)[None, :, :]


@jit
def offset_of(image, h, w, W, c, C: tl.constexpr):
    """Return where the maps c (G, 8) at the columns w (P) of row h are."""
    return image + (h * W + w)[:, None, None] * C + c[None, :, :]


@jit
def _larger(value, place, best, where):
    """Keep the first of the largest values, as torch does, or the last NaN."""
    better = (value > best) | (value != value)  # noqa: PLR0124 - NaN
    return tl.where(better, value, best), tl.where(better, place, where)


@jit
def _row_maximum(
    maps, bias, image, h, p, c, H, W, k, slope,
    C: tl.constexpr, FIRST: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Return the largest of the values at columns 2 p, 2 p + 1 and 2 p + 2, and which it is."""
    best, where = 0.0, 0  # replaced by those of the first place
    for j in tl.static_range(3):
        w = 2 * p + j
        inside = (w < W) & (h < H)
        mask = inside[:, None, None] & (c < C)[None, :, :]
        x = load(maps, bias, offset_of(image, h, w, W, c, C), mask, FIRST)
        if ACROSS:
            root = _inverse_root(x, k, slope)
            x = x * root * tl.sqrt(root)
        if not FIRST:  # else 0, and the first place of a window, which exists, is no less
            x = tl.where(inside[:, None, None], x, float("-inf"))
        best, where = (x, tl.zeros_like(x).to(tl.int32)) if j == 0 else _larger(x, j, best, where)
    return best, where


@jit
def pool_forward(
    maps, bias, out, places, H, W, OH, OW, k, slope,
    C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, ACROSS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Write P columns of ROWS pooled rows, and which place of its window each value is from."""
    bands = tl.cdiv(OH, ROWS)
    n = (tl.program_id(0) // bands).to(tl.int64)
    first = (tl.program_id(0) % bands) * ROWS
    c, p = groups(0, G), tl.program_id(1) * P + tl.arange(0, P)
    offsets = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    image = n * H * W * C
    best, where = _row_maximum(
        maps, offsets, image, 2 * first, p, c, H, W, k, slope, C, FIRST, ACROSS
    )
    for step in range(ROWS):
        oh = first + step
        middle, middle_place = _row_maximum(
            maps, offsets, image, 2 * oh + 1, p, c, H, W, k, slope, C, FIRST, ACROSS
        )
        after, after_place = _row_maximum(
            maps, offsets, image, 2 * oh + 2, p, c, H, W, k, slope, C, FIRST, ACROSS
        )
        best, where = _larger(middle, middle_place + 3, best, where)
        best, where = _larger(after, after_place + 6, best, where)
        if LAST:  # place 9 is in no window: no gradient passes
            where = tl.where(best <= 0.0, 9, where)
            best = tl.where(best < 0.0, 0.0, best)
        offset = offset_of(n * OH * OW * C, oh, p, OW, c, C)
        mask = ((oh < OH) & (p < OW))[:, None, None] & (c < C)[None, :, :]
        tl.store(out + offset, best.to(out.dtype.element_ty), mask=mask)
        tl.store(places + offset, where.to(tl.uint8), mask=mask)
        best, where = after, after_place


@jit
def input_gradient(x, grad, k, slope, FIRST: tl.constexpr, ACROSS: tl.constexpr):
    """Return the gradient of the response from that of the normalized value of ``x``."""
    if ACROSS:
        root = _inverse_root(x, k, slope)
        grad *= root * tl.sqrt(root)
        grad -= 1.5 * slope * x * _around(grad * x * (root * root))
    if FIRST:
        grad = tl.where(x <= 0.0, 0.0, grad)
    return grad


@jit
def _window(grads, places, image, oh, ow, c, OH, OW, C: tl.constexpr):
    """Return gradients and places of the windows ``ow`` of row ``oh``; outside, place 255."""
    inside = (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
    mask = inside[:, None, None] & (c < C)[None, :, :]
    offset = offset_of(image, oh, ow, OW, c, C)
    grad = tl.load(grads + offset, mask=mask, other=0.0)
    return grad, tl.load(places + offset, mask=mask, other=255)


@jit
def pool_backward(
    maps, bias, grads, places, maps_grad, bias_grad, H, W, OH, OW, k, slope,
    C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr,
    FIRST: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of P pairs of columns of PAIRS pairs of rows, and their sum over these.

    The place (h, w) is in one window if both are odd, in two or four if one or both are even.
    """
    bands = tl.cdiv(tl.cdiv(H, 2), PAIRS)
    n = (tl.program_id(0) // bands).to(tl.int64)
    first = (tl.program_id(0) % bands) * PAIRS
    c, p = groups(0, G), tl.program_id(1) * P + tl.arange(0, P)
    offsets = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    image, pooled = n * H * W * C, n * OH * OW * C
    total = tl.zeros([P, G, 8], tl.float32)
    g10, at10 = _window(grads, places, pooled, first - 1, p, c, OH, OW, C)  # the row above
    g11, at11 = _window(grads, places, pooled, first - 1, p - 1, c, OH, OW, C)
    for step in range(PAIRS):
        row = first + step
        g00, at00 = _window(grads, places, pooled, row, p, c, OH, OW, C)
        g01, at01 = _window(grads, places, pooled, row, p - 1, c, OH, OW, C)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                h, w = 2 * row + i, 2 * p + j
                mask = ((h < H) & (w < W))[:, None, None] & (c < C)[None, :, :]
                grad = tl.where(at00 == i * 3 + j, g00.to(tl.float32), 0.0)
                if j == 0:
                    grad += tl.where(at01 == i * 3 + 2, g01.to(tl.float32), 0.0)
                if i == 0:
                    grad += tl.where(at10 == 6 + j, g10.to(tl.float32), 0.0)
                if i == 0 and j == 0:
                    grad += tl.where(at11 == 8, g11.to(tl.float32), 0.0)
                offset = offset_of(image, h, w, W, c, C)
                x = load(maps, offsets, offset, mask, FIRST)
                grad = input_gradient(x, grad, k, slope, FIRST, ACROSS)
                tl.store(maps_grad + offset, grad.to(maps_grad.dtype.element_ty), mask=mask)
                total += grad  # 0 outside, since k > 0
        g10, at10, g11, at11 = g00, at00, g01, at01
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(bias_grad + program * C + c, tl.sum(total, axis=0), mask=c < C)


@jit
def pointwise_forward(
    maps, bias, out, positions, k, slope,
    C: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    FIRST: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Write the maps at P positions."""
    _p, c, offset, mask = tile(tl.program_id(0), positions, C, G, P)
    offsets = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    x = load(maps, offsets, offset, mask, FIRST)
    if ACROSS:
        root = _inverse_root(x, k, slope)
        x = x * root * tl.sqrt(root)
    tl.store(out + offset, x.to(out.dtype.element_ty), mask=mask)


@jit
def pointwise_backward(
    maps, bias, grads, maps_grad, bias_grad, positions, k, slope,
    C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
    FIRST: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Write the gradients at TILES times P positions, and their sum over these."""
    c = groups(tl.program_id(1) * G * 8, G)
    offsets = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([P, G, 8], tl.float32)
    for number in range(TILES):
        _p, _c, offset, mask = tile(tl.program_id(0) * TILES + number, positions, C, G, P)
        x = load(maps, offsets, offset, mask, FIRST)
        grad = tl.load(grads + offset, mask=mask, other=0.0).to(tl.float32)
        grad = input_gradient(x, grad, k, slope, FIRST, ACROSS)
        tl.store(maps_grad + offset, grad.to(maps_grad.dtype.element_ty), mask=mask)
        total += tl.where(mask, grad, 0.0)
    tl.store(bias_grad + tl.program_id(0) * C + c, tl.sum(total, axis=0), mask=c < C)
