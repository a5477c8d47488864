"""The layers torch lacks in the paper's form: response normalization, dropout, batch norm.

``Activation`` is a module that knows which layer it follows, so that hooks can find it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from modelpar.net import paper
from modelpar.net.plan import Plan
from modelpar.seeding import generator

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": functional.relu,  # section 3.1
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": functional.elu,
}

# -- response normalization ----------------------------------------------------------------------


class Window(NamedTuple):
    """One response normalization: y = x * s ** -3/4, s = k + slope * sum of squares around x.

    ``kernel`` (M, C, K, K) has ones where a neighbour is part of the sum.
    """

    kernel: Tensor
    k: float
    slope: float


def _sum_around(maps: Tensor, kernel: Tensor) -> Tensor:
    """Sum over the neighbours: a convolution with ones, symmetric and so its own adjoint."""
    groups = maps.shape[1] // kernel.shape[1]
    return functional.conv2d(maps, kernel, padding=kernel.shape[-1] // 2, groups=groups)


def _inverse_root(total: Tensor, window: Window) -> Tensor:
    """Return s ** -1/2 in float32, or in float64 if ``total`` is."""
    wide = torch.promote_types(total.dtype, torch.float32)
    return total.to(wide, copy=True).mul_(window.slope).add_(window.k).rsqrt_()


def _normalize(maps: Tensor, windows: Sequence[Window]) -> tuple[Tensor, list[Tensor]]:
    """Apply the normalizations in order; return the result and what the backward needs.

    That is the sum of squares of each, and the input of each but the first.  The sum is a
    convolution, which runs on the device's matrix units, and s ** -3/4 is r * sqrt(r) with
    r = 1 / sqrt(s): several times faster than torch's pooling over maps and a power.
    """
    saved: list[Tensor] = []
    for window in windows:
        total = _sum_around(maps * maps, window.kernel)
        saved += [maps, total]
        root = _inverse_root(total, window)
        maps = root.sqrt().mul_(root).mul_(maps).to(maps.dtype)
    return maps, saved[1:]


def _normalize_backward(
    grad: Tensor, maps: Tensor, saved: Sequence[Tensor], windows: Sequence[Window]
) -> Tensor:
    """Return the gradient of ``maps``.

    For one normalization: dx = g s^-b - 2 b slope x * sum_around(g x s^-b / s), b = 3/4.
    """
    saved = [maps, *saved]
    for x, total, window in reversed(list(zip(saved[::2], saved[1::2], windows, strict=True))):
        root = _inverse_root(total, window)
        direct = root.sqrt().mul_(root).mul_(grad)
        uneven = root.square_().mul_(direct).mul_(x)
        around = _sum_around(uneven.to(x.dtype), window.kernel)
        factor = -2 * paper.NORM_BETA * window.slope
        grad = direct.addcmul_(x, around, value=factor).to(x.dtype)
    return grad


def _rectify_normalize(maps: Tensor, windows: Sequence[Window]) -> tuple[Tensor, list[Tensor]]:
    return _normalize(functional.relu(maps), windows)


def _rectify_normalize_backward(
    grad: Tensor, maps: Tensor, saved: Sequence[Tensor], windows: Sequence[Window]
) -> Tensor:
    rectified = functional.relu(maps)
    grad = _normalize_backward(grad, rectified, saved, windows)
    return torch.where(rectified <= 0, 0, grad)  # keeps the memory format, unlike masked_fill


class _Response(Function):
    """Response normalizations, computed by ``functions``: the forward and the backward one.

    ``functions`` may be compiled.  torch.compile must never trace this class itself: under torch
    2.11 the gradients of a Function with in-place operations in its forward are then zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        windows: Sequence[Window],
        functions: tuple[Callable[..., Any], Callable[..., Any]],
    ) -> Tensor:
        forward, ctx.backward_function = functions
        normalized, saved = forward(maps, windows)
        ctx.windows = windows
        ctx.save_for_backward(maps, *saved)
        return normalized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        maps, *saved = ctx.saved_tensors
        return ctx.backward_function(*grads, maps, saved, ctx.windows), None, None


def _apply(
    maps: Tensor,
    windows: Sequence[Window],
    forward: Callable[..., Any] = _normalize,
    backward: Callable[..., Any] = _normalize_backward,
) -> Tensor:
    return _Response.apply(maps, windows, (forward, backward))


_respond: Any = torch.compiler.disable(_apply)


class AcrossMaps(nn.Module):
    """Response normalization over neighbouring maps of one column (section 3.3).

    ``maps`` is the number of maps of a column: no window reaches from one column into the next.
    The input (N, C, H, W) may hold several columns.  ``alpha`` counts over the whole window, as
    in torch: y = x / (k + alpha / n * sum of n squares) ** beta.  ``size`` is n, an odd number.
    """

    def __init__(
        self, maps: int, alpha: float, size: int = paper.NORM_SIZE, k: float = paper.NORM_K
    ) -> None:
        super().__init__()
        self.maps = maps
        self.alpha, self.size, self.k = alpha, size, k
        index = torch.arange(maps)
        near = (index[:, None] - index).abs() <= size // 2
        self.register_buffer("band", near.float()[:, :, None, None], persistent=False)

    def window(self, maps: Tensor) -> Window:
        """Return what is summed for ``maps``."""
        columns = maps.shape[1] // self.maps
        band = self.get_buffer("band").to(maps.dtype).repeat(columns, 1, 1, 1)
        return Window(band, self.k, self.alpha / self.size)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps, in the shape of ``maps``."""
        return _respond(maps, [self.window(maps)])

    def extra_repr(self) -> str:
        """Return the constants."""
        return f"{self.maps} maps, alpha={self.alpha}, size={self.size}, k={self.k:g}"


class WithinMap(nn.Module):
    """Response normalization over 5 x 5 pixels of the same map (run 145, ``rnorm``).

    y = x * (1 + 1e-3 / 25 * sum of 25 squares) ** -0.75; pixels outside the map count as zero.
    """

    def __init__(self) -> None:
        super().__init__()
        side = paper.WITHIN_SIZE
        self.register_buffer("ones", torch.ones(1, 1, side, side), persistent=False)

    def window(self, maps: Tensor) -> Window:
        """Return what is summed for ``maps``."""
        ones = self.get_buffer("ones").to(maps.dtype).repeat(maps.shape[1], 1, 1, 1)
        return Window(ones, paper.WITHIN_K, paper.WITHIN_ALPHA / paper.WITHIN_SIZE**2)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps (N, C, H, W)."""
        return _respond(maps, [self.window(maps)])


def compile_norm(norm: nn.Module, *, rectify: bool) -> Callable[[Tensor], Tensor] | None:
    """Return the response normalizations of ``norm``, compiled; None if it has no others.

    ``norm`` is an AcrossMaps, a WithinMap or a Sequential of these; ``rectify`` puts a ReLU
    before them.  Forward and backward are one compiled function of tensors each.
    """
    layers = list(norm) if isinstance(norm, nn.Sequential) else [norm]
    norms = [layer for layer in layers if isinstance(layer, (AcrossMaps, WithinMap))]
    if not norms or len(norms) != len(layers):
        return None
    forward: Callable[..., Any] = _rectify_normalize if rectify else _normalize
    backward: Callable[..., Any] = _rectify_normalize_backward if rectify else _normalize_backward
    forward = torch.compile(forward, dynamic=False)
    backward = torch.compile(backward, dynamic=False)

    def apply(maps: Tensor) -> Tensor:
        return _respond(maps, [layer.window(maps) for layer in norms], forward, backward)

    return apply


# -- activation and dropout ----------------------------------------------------------------------


class Activation(nn.Module):
    """The nonlinearity after ``layer`` (section 3.1); forward hooks see its output."""

    def __init__(self, layer: str, kind: str) -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind

    def forward(self, response: Tensor) -> Tensor:
        """Return the activations, in the shape of ``response``."""
        return ACTIVATIONS[self.kind](response)

    def extra_repr(self) -> str:
        """Return the layer and the function."""
        return f"{self.layer}, {self.kind}"


@dataclass(frozen=True)
class DropoutSeed:
    """What fixes a step's dropout: masks depend on this and the layer, not on the rank.

    ``rows`` are this replica's images within the ``total`` images of the global batch.
    """

    seed: int
    step: int
    rows: slice
    total: int


class Dropout(nn.Module):
    """Multiply by a 0/1 mask in training, by the share kept in evaluation (section 4.2).

    Never scaled in training.  ``units`` is the width of the whole layer, ``columns`` the slice of
    it that this module receives.  The mask is drawn for the whole layer and sliced, so that a
    split net drops what the whole net drops.  ``rate`` is the share dropped.  Without a ``seed``
    the mask comes from torch's global generator.
    """

    def __init__(self, layer: str, units: int, columns: slice, rate: float) -> None:
        super().__init__()
        self.layer = layer
        self.units = units
        self.columns = columns
        self.rate = rate
        self.seed: DropoutSeed | None = None

    def forward(self, units: Tensor) -> Tensor:
        """Return ``units`` (N, C), masked or scaled."""
        if self.rate == 0:
            return units
        if not self.training:
            return units * (1 - self.rate)
        return units * self._mask(units)

    def _mask(self, units: Tensor) -> Tensor:
        seed = self.seed
        if seed is None:
            source, total, rows = None, len(units), slice(None)
        else:
            source = generator(seed.seed, "dropout", self.layer, seed.step, device=units.device)
            total, rows = seed.total, seed.rows
        whole = torch.empty(total, self.units, dtype=torch.bool, device=units.device)
        kept = whole.bernoulli_(1 - self.rate, generator=source)
        return kept[rows, self.columns].to(units.dtype)

    def extra_repr(self) -> str:
        """Return the layer, the share dropped and the slice."""
        return f"{self.layer}, rate={self.rate}, columns={self.columns.start}:{self.columns.stop}"


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
    across = AcrossMaps(maps, plan.recipe.alpha)
    within = layer == "conv2" and plan.recipe.norms == "across_and_within"
    return nn.Sequential(across, WithinMap()) if within else across


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
        wide = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            before = wide[name]
            if moved is not None and before is not None and moved.dtype == torch.bfloat16:
                self._buffers[name] = before.to(moved.device)
        return self

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalized maps (N, C, H, W); training uses the batch's statistics."""
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return functional.batch_norm(maps, mean, var, training=self.training)


def pool(kind: str) -> nn.Module:
    """Return the pooling layer of that kind, see ``Plan``; output sizes are rounded up."""
    if kind == "non_overlapping":
        return nn.MaxPool2d(2, stride=2, ceil_mode=True)
    if kind == "average":
        return nn.AvgPool2d(3, stride=2, ceil_mode=True)
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
