"""What follows a convolution, in one kernel for each direction, and its reference in torch.

    bias, ReLU, response normalizations, max pool, ReLU: each but the bias only if asked for

Maps are in channels_last memory and belong to one column.  The backward pass computes activations
and norms again.  A pool records in one byte which place of its window was the largest.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from modelpar import gpu
from modelpar.gpu import block_kernels, within_kernels
from modelpar.net import paper

# The first three were the fastest of those tried on an H100 at batch 128 with the paper's shapes.
# The others were not compared.
THREADS: Final = 32  # of a program that pools; each has eight neighbouring maps at one position
FORWARD_ROWS: Final = 4  # rows of the pooled maps that a program writes
BACKWARD_PAIRS: Final = 1  # pairs of rows of which a program writes the gradient
POSITIONS: Final = 16  # of a tile without a pool
TILES: Final = 8  # of them whose bias gradient a program adds up
STRIP_ROWS: Final = 9  # of a program of a normalization within maps
STRIP: Final = 128  # groups of eight maps in a row of it: as many as it has threads
GROUPS: Final = 8  # groups of eight maps of a tile, where no sum over maps needs all of them
WARPS: Final = 4  # of a program without a pool


class Norm(NamedTuple):
    """A response normalization: y = x * (k + slope * sum of squares) ** -3/4.

    The sum is over ``size`` neighbouring maps, or over a window of that side.
    """

    k: float
    slope: float
    size: int


@dataclass(frozen=True)
class Block:
    """What follows a convolution; ``rectify``: whether the ReLU comes ``first`` or ``last``."""

    rectify: str
    across: Norm | None = None  # over neighbouring maps
    within: Norm | None = None  # over neighbouring places of the same map, before a pool only
    pool: bool = False  # 3 x 3 with stride 2, output sizes rounded up


def block(response: Tensor, bias: Tensor, what: Block) -> Tensor:
    """Return what follows a convolution with output ``response`` (N, C, H, W), without its bias.

    The result is (N, C, H', W') in channels_last memory, in the dtype of ``response``.
    """
    runs = gpu.available(response.device) and response.dtype in gpu.DTYPES
    sizes = ((what.across, paper.NORM_SIZE), (what.within, paper.WITHIN_SIZE))
    if not runs or any(norm and norm.size != size for norm, size in sizes):
        return plain(response, bias, what)
    with torch.cuda.device_of(response):  # Triton launches on the current one
        return _Block.apply(response, bias, what)


def plain(response: Tensor, bias: Tensor, what: Block) -> Tensor:
    """Return what ``block`` does, from torch's own functions."""
    x = response + bias[:, None, None]
    x = x.relu() if what.rectify == "first" else x
    if what.across:
        k, slope, size = what.across
        squares = functional.pad(x * x, (0, 0, 0, 0, size // 2, size // 2))
        total = squares.unfold(1, size, 1).sum(-1)
        x = x * (k + slope * total) ** -paper.NORM_BETA
    if what.within:
        k, slope, size = what.within
        total = functional.avg_pool2d(x * x, size, 1, size // 2, divisor_override=1)
        x = x * (k + slope * total) ** -paper.NORM_BETA
    x = functional.max_pool2d(x, 3, 2, ceil_mode=True) if what.pool else x
    return x.relu() if what.rectify == "last" else x


class _Shape:
    """Sizes and settings that the kernels of a block take."""

    def __init__(self, maps: Tensor, what: Block) -> None:
        self.images, self.count, *sides = maps.shape
        self.sides = tuple(sides)
        self.pooled = tuple(-(-(side - 3) // 2) + 1 for side in sides)
        self.positions = self.images * sides[0] * sides[1]
        norm = what.across or Norm(0.0, 0.0, 1)
        self.norm = (norm.k, norm.slope)
        self.flags = {"FIRST": what.rectify == "first", "ACROSS": what.across is not None}
        groups = 1 << (-(-self.count // 8) - 1).bit_length()
        # A thread has one position in a pool.  Without a sum over maps a program may have some.
        self.pool = {"C": self.count, "G": groups, "P": max(1, THREADS // groups)}
        groups = groups if what.across else GROUPS
        self.point = {"C": self.count, "G": groups, "P": POSITIONS}
        self.parts = -(-self.count // (8 * groups))
        columns = min(POSITIONS, STRIP // groups)
        self.strip = {"C": self.count, "G": groups, "P": columns, "ROWS": STRIP_ROWS}

    def tiles(self, positions: int, tiles: int = 1) -> tuple[int, int]:
        """Return how many programs there are for ``tiles`` tiles each: places, maps."""
        return -(-self.positions // (positions * tiles)), self.parts

    def strips(self) -> tuple[int, int]:
        """Return how many programs there are for a strip each: places, maps."""
        height, width = self.sides
        bands, tiles = -(-height // self.strip["ROWS"]), -(-width // self.strip["P"])
        return self.images * bands * tiles, self.parts


def _like(maps: Tensor, sides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    shape = (*maps.shape[:2], *sides)
    return torch.empty(shape, dtype=dtype, device=maps.device, memory_format=torch.channels_last)


def _total(sums: Tensor) -> Tensor:
    """Return the sums of the columns: a product, since torch's sum is slow for few columns."""
    return sums.new_ones(len(sums)) @ sums


class _Block(Function):
    """``block`` by our kernels: across maps, within maps, pool, each if asked for.

    Without a normalization within maps the pool does everything.
    """

    @staticmethod
    def forward(ctx: Any, response: Tensor, bias: Tensor, what: Block) -> Tensor:
        maps = response.contiguous(memory_format=torch.channels_last)
        shape = _Shape(maps, what)
        ctx.what, ctx.shape = what, shape
        last = {"LAST": what.rectify == "last"}
        if what.pool and not what.within:
            out, places = _pool(maps, bias, maps.dtype, shape, **shape.flags, **last)
            ctx.save_for_backward(maps, bias, places)
            return out
        # Rounded to bfloat16, many values are equal, and a pool takes other ones.
        between = torch.float32 if what.within else maps.dtype
        across = torch.empty_like(maps, dtype=between)
        block_kernels.pointwise_forward[shape.tiles(POSITIONS)](
            maps, bias, across, shape.positions, *shape.norm, **shape.point, **shape.flags,
            num_warps=WARPS,
        )  # fmt: skip
        if not what.within:
            ctx.save_for_backward(maps, bias)
            return across
        normalized = torch.empty_like(across)
        _within(what.within, shape, across, across, normalized)
        zeros = torch.zeros_like(bias)
        out, places = _pool(
            normalized, zeros, maps.dtype, shape, FIRST=False, ACROSS=False, **last
        )
        ctx.save_for_backward(maps, bias, places, across, zeros)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        maps, bias, *saved = ctx.saved_tensors
        what: Block = ctx.what
        shape: _Shape = ctx.shape
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        if what.pool and not what.within:
            maps_grad, sums = _pool_backward(maps, bias, grad, saved[0], shape, **shape.flags)
            return maps_grad, _total(sums).to(bias.dtype), None
        maps_grad = torch.empty_like(maps)
        grid = shape.strips() if what.within else shape.tiles(POSITIONS, TILES)
        sums = torch.empty(grid[0], shape.count, dtype=torch.float32, device=maps.device)
        if what.within:
            places, across, zeros = saved
            grad, _ = _pool_backward(across, zeros, grad, places, shape, FIRST=False, ACROSS=False)
            cross_term = torch.empty_like(maps)
            _within(what.within, shape, across, grad, cross_term, cross_term=True)
            within_kernels.within_backward[grid](
                maps, bias, across, grad, cross_term, maps_grad, sums,
                *shape.sides, *shape.norm, what.within.k, what.within.slope,
                **shape.strip, **shape.flags, num_warps=WARPS,
            )  # fmt: skip
        else:
            block_kernels.pointwise_backward[grid](
                maps, bias, grad, maps_grad, sums, shape.positions, *shape.norm,
                **shape.point, TILES=TILES, **shape.flags, num_warps=WARPS,
            )  # fmt: skip
        return maps_grad, _total(sums).to(bias.dtype), None


def _pool(
    maps: Tensor, bias: Tensor, dtype: torch.dtype, shape: _Shape, **flags: bool
) -> tuple[Tensor, Tensor]:
    """Return the pooled maps in ``dtype``, and the places of their windows that they are from."""
    out = _like(maps, shape.pooled, dtype)
    places = _like(maps, shape.pooled, torch.uint8)
    rows, columns = shape.pooled
    grid = shape.images * -(-rows // FORWARD_ROWS), -(-columns // shape.pool["P"])
    block_kernels.pool_forward[grid](
        maps, bias, out, places, *shape.sides, *shape.pooled, *shape.norm,
        **shape.pool, ROWS=FORWARD_ROWS, **flags, num_warps=1,
    )  # fmt: skip
    return out, places


def _pool_backward(
    maps: Tensor, bias: Tensor, grad: Tensor, places: Tensor, shape: _Shape, **flags: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the maps, and its sums over the positions of each program."""
    maps_grad = torch.empty_like(maps)
    rows, columns = (-(-side // 2) for side in shape.sides)  # pairs of them
    grid = shape.images * -(-rows // BACKWARD_PAIRS), -(-columns // shape.pool["P"])
    size = (grid[0] * grid[1], shape.count)
    sums = torch.empty(size, dtype=torch.float32, device=maps.device)
    block_kernels.pool_backward[grid](
        maps, bias, grad, places, maps_grad, sums, *shape.sides, *shape.pooled, *shape.norm,
        **shape.pool, PAIRS=BACKWARD_PAIRS, **flags, num_warps=1,
    )  # fmt: skip
    return maps_grad, sums


def _within(
    norm: Norm,
    shape: _Shape,
    maps: Tensor,
    grads: Tensor,
    out: Tensor,
    *,
    cross_term: bool = False,
) -> None:
    """Normalize within maps into ``out``; ``cross_term``: see ``within_places``."""
    within_kernels.within_places[shape.strips()](
        maps, grads, out, *shape.sides, norm.k, norm.slope,
        **shape.strip, CROSS_TERM=cross_term, num_warps=WARPS,
    )  # fmt: skip
