"""What stands between the layers with weights: padding, norms, activations, pools and dropout."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelpar import gpu
from modelpar.device import check_compiled
from modelpar.gpu.block import Block, block
from modelpar.net.exchange import Link, swap
from modelpar.net.fused import block_of, patches
from modelpar.net.layers import (
    ACTIVATIONS,
    AcrossMaps,
    Dropout,
    as_weight,
    compile_norm,
    norm,
    pool,
)
from modelpar.net.plan import Plan
from modelpar.seeding import generator


class Blocks(nn.Module):
    """The layers without weights: padding, norms, activations, pools and dropout.

    They process the maps and units of the column of ``link``; None: those of all columns.
    """

    def __init__(self, plan: Plan, link: Link | None = None) -> None:
        super().__init__()
        self.plan = plan
        column = None if link is None else link.column
        self.columns = plan.columns if column is None else 1
        self.activations = nn.ModuleDict(
            {name: ACTIVATIONS[plan.activation]() for name in plan.layers if name != "fc8"}
        )
        self.pool = pool(plan.pool)
        self.norm1 = _norm_of(plan, "conv1", link)
        self.norm2 = _norm_of(plan, "conv2", link)
        # Run 145 normalizes conv1's linear response, run 166 conv2's: the ReLU follows the pool.
        # CaffeNet normalizes the pooled maps.
        self.norm_inputs = plan.norm_inputs
        self.compiled_norms: dict[str, Callable[[Tensor], Tensor]] = {}  # by layer, for training
        self.fused: dict[str, Block] = {}  # by convolution: what our kernel does after it
        rates = {"conv4": plan.conv4_dropout, "fc6": plan.dropout, "fc7": plan.dropout}
        self.dropouts = nn.ModuleDict(
            {name: _dropout(plan, name, column, rate) for name, rate in rates.items() if rate}
        )

    def compile(self, weight: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Use our kernels, or where these do not run compile the response normalizations.

        Compiled normalizations are for training and have the ReLU before them.  All else runs as
        it is, also the pools, whose compiled backward is several times slower.  ``weight`` has the
        device and dtype of the net.  Raises CompileError, and changes nothing, if a function fails
        or differs from the plain one.
        """
        if gpu.available(weight.device) and weight.dtype in gpu.DTYPES:
            self._fuse(weight)
        if not self.fused:
            self._compile_norms(weight)

    def _fuse(self, weight: Tensor) -> None:
        """Use our kernels if they have all that follows the convolutions."""
        norms = {"conv1": self.norm1, "conv2": self.norm2}
        fused: dict[str, Block] = {}
        for name, row in self.plan.layers.items():
            if not row.kernel:
                continue
            what = block_of(self.plan, name, norms.get(name, nn.Identity()))
            if what is None:
                return
            check_compiled(
                f"the kernel after {name}",
                partial(block, what=what),
                partial(self._wide_block, name),
                _distinct_values(row.outputs, weight),
                torch.linspace(-1, 1, row.outputs).to(weight),
            )
            fused[name] = what
        self.fused = fused

    def _wide_block(self, name: str, response: Tensor, bias: Tensor) -> Tensor:
        """Return the reference of a kernel, computed in float64: no tf32, no rounded maxima."""
        return self.after(name, response.double() + bias.double()[:, None, None]).to(response)

    def _compile_norms(self, weight: Tensor) -> None:
        compiled: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, layer in (("conv1", self.norm1), ("conv2", self.norm2)):
            rectify = self.norm_inputs[name] == "rectified"
            function = compile_norm(layer, rectify=rectify)
            if function is None or (rectify and self.plan.activation != "relu"):
                continue
            maps = self.plan.layers[name].outputs * self.columns
            example = _example((2, maps, 7, 7), weight)
            check_compiled(
                f"the normalization after {name}", function, partial(self._norm, name), example
            )
            compiled[name] = function
        self.compiled_norms = compiled

    def run_eager(self) -> None:
        """Run eagerly: without torch.compile and Triton kernels."""
        self.compiled_norms, self.fused = {}, {}

    @property
    def fuses(self) -> bool:
        """Whether the next forward uses our kernels; hooks need activations to run as modules."""
        hooked = any(one._forward_hooks for one in self.activations.values())  # noqa: SLF001
        return bool(self.fused) and not hooked

    def pad(self, images: Tensor, weight: Tensor) -> Tensor:
        """Add the zeros that 224 -> 55 needs: (N, 3, 224, 224) -> (N, 3, 227, 227).

        The result has the dtype and memory format of conv1's ``weight``, for our kernels in
        ``patches``.
        """
        if self.fuses:
            return patches(images, weight, self.plan)
        return functional.pad(as_weight(images, weight), self.plan.conv1_padding)

    def normalize_and_pool(self, name: str, maps: Tensor) -> Tensor:
        """Activate, normalize and pool: 55 x 55 -> 27 x 27, 27 x 27 -> 13 x 13 (section 3.5)."""
        activation = self.activations[name]
        # A hook on the activation needs it to run as a module.
        fused = self.training and not activation._forward_hooks  # noqa: SLF001
        compiled = self.compiled_norms.get(name) if fused else None
        reads = self.norm_inputs[name]
        if reads == "pooled":
            maps = self.pool(activation(maps))
        maps = compiled(maps) if compiled else self._norm(name, maps)
        if reads == "pooled":
            return maps
        if reads == "rectified":
            return self.pool(maps)
        if self.plan.pool == "average":
            return self.pool(activation(maps))
        return activation(self.pool(maps))  # an increasing function may follow the maximum

    def _norm(self, name: str, maps: Tensor) -> Tensor:
        norm = self.norm1 if name == "conv1" else self.norm2
        rectified = self.norm_inputs[name] == "rectified"
        return norm(self.activations[name](maps) if rectified else maps)

    def after(self, name: str, response: Tensor) -> Tensor:
        """Activate; normalize and pool, pool or drop what the layer ``name`` asks for.

        conv5's maps are pooled, 13 x 13 -> 6 x 6.  Units of fc6 and fc7 are dropped (section 4.2),
        in run 177 also of conv4.
        """
        if name in {"conv1", "conv2"}:
            return self.normalize_and_pool(name, response)
        x = self.activations[name](response)
        if name == "conv5":
            return self.pool(x)
        return self.dropouts[name](x) if name in self.dropouts else x


class AcrossBoth(nn.Module):
    """One column's part of a response normalization over the maps of both columns, as in Caffe.

    ``norm`` is that of ``maps`` neighbouring maps.  The maps next to the seam are exchanged.
    """

    def __init__(self, norm: AcrossMaps, layer: str, link: Link) -> None:
        super().__init__()
        self.norm, self.layer, self.link = norm, layer, link

    def forward(self, maps: Tensor) -> Tensor:
        """Return this column's normalized maps (N, C, H, W).  A collective of the pair."""
        reach, count = self.norm.size // 2, maps.shape[1]
        if self.link.column == 0:
            peer = swap(maps[:, -reach:], self.link, self.layer)
            return self.norm(torch.cat([maps, peer], 1))[:, :count]
        peer = swap(maps[:, :reach], self.link, self.layer)
        return self.norm(torch.cat([peer, maps], 1))[:, reach:]


def _norm_of(plan: Plan, layer: str, link: Link | None) -> nn.Module:
    """Return the normalization after conv1 or conv2 for the column of ``link``, or for all."""
    found = norm(plan, layer, plan.columns if link is None else 1)
    if link is None or plan.recipe.norms != "across_both" or not isinstance(found, AcrossMaps):
        return found
    reach = found.size // 2
    wider = AcrossMaps(plan.layers[layer].outputs + reach, plan.recipe.alpha, found.size, found.k)
    return AcrossBoth(wider, layer, link)


def _example(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return numbers as large as conv1's responses, with the dtype and device of ``like``."""
    value = 60 * torch.randn(shape, generator=generator(0, "compile"))
    return value.to(like.device, like.dtype, memory_format=torch.channels_last)


def _distinct_values(maps: int, like: Tensor) -> Tensor:
    """Return (2, maps, 7, 7) in which the nine values of any pool's window differ by 30 %.

    Rounding to bfloat16 then does not change which one is the largest.
    """
    place = 3 * (torch.arange(7)[:, None] % 3) + torch.arange(7) % 3
    rank = torch.stack([place, (place + 4) % 9])[:, None].expand(2, maps, 7, 7)
    value = torch.where(rank < 4, -8, 8) * 1.3**rank  # noqa: PLR2004 - some are negative
    value = value * (1 + 0.01 * torch.rand(value.shape, generator=generator(0, "compile")))
    return value.to(like.device, like.dtype, memory_format=torch.channels_last)


def _dropout(plan: Plan, name: str, column: int | None, rate: float) -> Dropout:
    """Return the dropout of a layer, whose masks cover all columns."""
    units = plan.layers[name].outputs * (plan.sizes[1] ** 2 if name == "conv4" else 1)
    own = slice(None) if column is None else slice(column * units, (column + 1) * units)
    return Dropout(name, plan.columns * units, rate, own)
