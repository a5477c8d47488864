"""Response normalization and unscaled dropout as in the paper, and batch norm in float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from modelpar.net import paper
from modelpar.net.plan import Plan
from modelpar.seeding import generator

ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {
    "relu": nn.ReLU,  # section 3.1
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
}


def as_weight(images: Tensor, weight: Tensor) -> Tensor:
    """Return ``images`` in the dtype and memory format of a convolution's ``weight``."""
    last = weight.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    return images.to(weight.dtype, memory_format=order)


# -- response normalization ----------------------------------------------------------------------


class Window(NamedTuple):
    """One response normalization: y = x * s ** -3/4, s = k + slope * sum of squares around x.

    ``kernel`` (M, C, K, K) has ones where a neighbour is part of the sum.
    """

    kernel: Tensor
    k: float
    slope: float


Windows = Sequence[Window]


def _sum_around(maps: Tensor, kernel: Tensor) -> Tensor:
    """Sum over the neighbours: a convolution with ones, symmetric and so its own adjoint."""
    groups = maps.shape[1] // kernel.shape[1]
    return functional.conv2d(maps, kernel, padding=kernel.shape[-1] // 2, groups=groups)


def _inverse_root(total: Tensor, window: Window) -> Tensor:
    """Return s ** -1/2 in float32, or in float64 if ``total`` is."""
    wide = torch.promote_types(total.dtype, torch.float32)
    return total.to(wide, copy=True).mul_(window.slope).add_(window.k).rsqrt_()


def _normalize(
    maps: Tensor, windows: Windows, *, rectify: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Apply the normalizations in order; return the result and what the backward needs.

    That is the sum of squares of each, and the input of each but the first.  The sum is a
    convolution, which runs on the device's matrix units, and s ** -3/4 is r * sqrt(r) with
    r = 1 / sqrt(s): several times faster than torch's pooling over maps and a power.
    """
    maps = functional.relu(maps) if rectify else maps
    saved: list[Tensor] = []
    for window in windows:
        total = _sum_around(maps * maps, window.kernel)
        saved += [maps, total]
        root = _inverse_root(total, window)
        maps = root.sqrt().mul_(root).mul_(maps).to(maps.dtype)
    return maps, saved[1:]


def _normalize_backward(
    grad: Tensor, maps: Tensor, saved: list[Tensor], windows: Windows, *, rectify: bool = False
) -> Tensor:
    """Return the gradient of ``maps``.

    For one normalization: dx = g s^-b - 2 b slope x * sum_around(g x s^-b / s), b = 3/4.
    """
    first = functional.relu(maps) if rectify else maps
    saved = [first, *saved]
    for x, total, window in reversed(list(zip(saved[::2], saved[1::2], windows, strict=True))):
        root = _inverse_root(total, window)
        direct = root.sqrt().mul_(root).mul_(grad)
        cross_term = root.square_().mul_(direct).mul_(x)
        around = _sum_around(cross_term.to(x.dtype), window.kernel)
        factor = -2 * paper.NORM_BETA * window.slope
        grad = direct.addcmul_(x, around, value=factor).to(x.dtype)
    # Unlike masked_fill, torch.where keeps the memory format.
    return torch.where(first <= 0, 0, grad) if rectify else grad


class _Response(Function):
    """Response normalizations, computed by the functions ``forward`` and ``backward``.

    These may be compiled.  torch.compile must never trace this class itself: under torch 2.11 the
    gradients of a Function with in-place operations in its forward are then zero.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, windows: Windows, forward: Any, backward: Any) -> Tensor:
        normalized, saved = forward(maps, windows)
        ctx.windows, ctx.backward_function = windows, backward
        ctx.save_for_backward(maps, *saved)
        return normalized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        maps, *saved = ctx.saved_tensors
        return ctx.backward_function(*grads, maps, saved, ctx.windows), None, None, None


@torch.compiler.disable()
def _respond(
    maps: Tensor, windows: Windows, forward: Any = _normalize, backward: Any = _normalize_backward
) -> Tensor:
    return _Response.apply(maps, windows, forward, backward)


class ResponseNorm(nn.Module):
    """Response normalization, see ``Window``; ``kernel`` is that of one column or of one map.

    ``size`` is the number of neighbours, or the side of a window of them.
    """

    def __init__(self, kernel: Tensor, k: float, slope: float, size: int) -> None:
        super().__init__()
        self.k, self.slope, self.size = k, slope, size
        self.register_buffer("kernel", kernel, persistent=False)

    def window(self, maps: Tensor) -> Window:
        """Return what is summed for ``maps``."""
        kernel = self.get_buffer("kernel").to(maps.dtype)
        return Window(kernel.repeat(maps.shape[1] // len(kernel), 1, 1, 1), self.k, self.slope)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps (N, C, H, W)."""
        # torch.export takes no Function of one's own.  In torch.compile of torch 2.11 the first
        # question is also answered with yes, and there only ``_respond`` has the right gradient.
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            return _normalize(maps, [self.window(maps)])[0]
        return _respond(maps, [self.window(maps)])


class AcrossMaps(ResponseNorm):
    """Response normalization over neighbouring maps of one column (section 3.3).

    No window reaches across a multiple of ``maps``.  With the number of one column's maps the
    columns are normalized apart, as in the paper; with that of both, together, as in Caffe.
    The input (N, C, H, W) may hold several columns.  ``alpha`` counts over the whole window, as
    in torch: y = x / (k + alpha / n * sum of n squares) ** beta.  ``size`` is n, an odd number.
    """

    def __init__(
        self, maps: int, alpha: float, size: int = paper.NORM_SIZE, k: float = paper.NORM_K
    ) -> None:
        index = torch.arange(maps)
        near = (index[:, None] - index).abs() <= size // 2
        super().__init__(near.float()[:, :, None, None], k, alpha / size, size)


class WithinMap(ResponseNorm):
    """Response normalization over 5 x 5 pixels of the same map (run 145, ``rnorm``).

    y = x * (1 + 1e-3 / 25 * sum of 25 squares) ** -0.75; pixels outside the map count as zero.
    """

    def __init__(self) -> None:
        side = paper.WITHIN_SIZE
        slope = paper.WITHIN_ALPHA / side**2
        super().__init__(torch.ones(1, 1, side, side), paper.WITHIN_K, slope, side)


def response_norms(norm: nn.Module) -> list[ResponseNorm] | None:
    """Return the response normalizations of ``norm`` in order; None if it has others."""
    layers = list(norm) if isinstance(norm, nn.Sequential) else [norm]
    norms = [layer for layer in layers if isinstance(layer, ResponseNorm)]
    others = [layer for layer in layers if not isinstance(layer, (ResponseNorm, nn.Identity))]
    return None if others else norms


def compile_norm(norm: nn.Module, *, rectify: bool) -> Callable[[Tensor], Tensor] | None:
    """Return the response normalizations of ``norm``, compiled; None if it has others, or none.

    ``rectify`` puts a ReLU before them.  Forward and backward are one compiled function of tensors
    each.
    """
    norms = response_norms(norm)
    if not norms:
        return None
    forward = partial(torch.compile(_normalize, dynamic=False), rectify=rectify)
    backward = partial(torch.compile(_normalize_backward, dynamic=False), rectify=rectify)
    return lambda maps: _respond(maps, [each.window(maps) for each in norms], forward, backward)


class BatchNorm(nn.Module):
    """torch's batch normalization without scale and shift, in place of response normalization.

    Each column normalizes its maps, so a split net computes what the whole net computes.
    """

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(maps))
        self.register_buffer("running_var", torch.ones(maps))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's signature
        """Follow the net's dtype, except to bfloat16: updates by a tenth would round away."""

        def wide(value: Tensor) -> Tensor:
            moved = fn(value)
            return value.to(moved.device) if moved.dtype == torch.bfloat16 else moved

        return super()._apply(wide, recurse)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps (N, C, H, W); training uses the batch's statistics."""
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return functional.batch_norm(maps, mean, var, training=self.training)


# -- dropout -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropoutSeed:
    """Determines the dropout masks of a step, with the layer and not with the rank.

    ``rows`` are this replica's images within the ``total`` images of the global batch.
    """

    seed: int
    step: int
    rows: slice
    total: int


class Dropout(nn.Module):
    """Multiply by a 0/1 mask in training, by the keep probability in evaluation (section 4.2).

    Never scaled in training.  ``units`` is the width of the whole layer, ``columns`` the slice of
    it that this module receives.  The mask is drawn for the whole layer and sliced, so that a
    split net drops what the whole net drops.  ``rate`` is the dropout probability.  Unless
    ``draw`` has been called, each forward takes a mask from torch's global generator.
    """

    def __init__(self, layer: str, units: int, rate: float, columns: slice = slice(None)) -> None:
        super().__init__()
        self.layer, self.units, self.rate, self.columns = layer, units, rate, columns
        self.whole = torch.empty(0, dtype=torch.bool)  # the mask of the whole layer
        self.kept: Tensor | None = None  # this column's part of it

    def forward(self, units: Tensor) -> Tensor:
        """Return ``units`` (N, C) or maps (N, C, H, W), masked or scaled."""
        flat = units.flatten(1)
        if not self.training:
            return (flat * (1 - self.rate)).view(units.shape)
        kept = self.kept
        if kept is None:
            kept = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - self.rate)
        return (flat * kept.to(flat.dtype)).view(units.shape)

    def draw(self, seed: DropoutSeed, device: torch.device) -> None:
        """Draw the mask of a step, in the memory of the last one, which a CUDA graph reads."""
        if self.whole.shape != (seed.total, self.units) or self.whole.device != device:
            self.whole = torch.empty(seed.total, self.units, dtype=torch.bool, device=device)
        source = generator(seed.seed, "dropout", self.layer, seed.step, device=device)
        self.whole.bernoulli_(1 - self.rate, generator=source)
        self.select(seed.rows)

    def select(self, rows: slice) -> None:
        """Use the mask of these images of the global batch in the next forwards."""
        self.kept = self.whole[rows, self.columns]


def fix_dropout(net: nn.Module, seed: DropoutSeed | None) -> None:
    """Draw the masks of the next forwards from ``seed``; None: from torch's generator in each."""
    device = next(net.parameters()).device
    for module in net.modules():
        if isinstance(module, Dropout):
            if seed is None:
                module.kept = None
            else:
                module.draw(seed, device)


def select_masks(net: nn.Module, rows: slice) -> None:
    """Let the next forwards use the masks of these images of the global batch."""
    for module in net.modules():
        if isinstance(module, Dropout):
            module.select(rows)


# -- what a plan chooses -------------------------------------------------------------------------


def norm(plan: Plan, layer: str, columns: int) -> nn.Module:
    """Return the normalization after conv1 or conv2 for ``columns`` columns, see ``Plan``."""
    maps = plan.layers[layer].outputs
    if plan.norm == "batch":
        return BatchNorm(maps * columns)
    if plan.norm == "within_channel":
        return WithinMap()
    if plan.norm == "none" or (plan.norm == "first_only" and layer == "conv2"):
        return nn.Identity()
    if plan.net == "four_layer":
        size, k = paper.FOUR_LAYER_NORM_SIZE, paper.FOUR_LAYER_NORM_K
        return AcrossMaps(maps, paper.FOUR_LAYER_NORM_ALPHA, size, k)
    if plan.recipe.norms == "across_both":  # of a column: see ``AcrossBoth`` in net.blocks
        maps *= columns
    across = AcrossMaps(maps, plan.recipe.alpha, k=plan.recipe.norm_k)
    within = layer == "conv2" and plan.recipe.norms == "across_and_within"
    return nn.Sequential(across, WithinMap()) if within else across


def pool(kind: str) -> nn.Module:
    """Return the pooling layer of that kind, see ``Plan``; output sizes are rounded up.

    Differs: where several places of a window have the largest value, one of them gets the
    gradient.  In the code each did (cuda-convnet2's conv_util.cu).
    """
    layer = nn.AvgPool2d if kind == "average" else nn.MaxPool2d
    return layer(2 if kind == "non_overlapping" else 3, stride=2, ceil_mode=True)
