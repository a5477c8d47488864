"""The net of section 3.5: ``AlexNet``, the whole on one device; ``Column``, one device's half.

Compare the two ``forward`` methods: they differ only where the columns exchange maps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelpar.device import check_compiled
from modelpar.net import paper
from modelpar.net.exchange import (
    Convolution,
    InFlight,
    Linear,
    Link,
    add_logits,
    read_both,
    send,
)
from modelpar.net.layers import Activation, Dropout, DropoutSeed, compile_norm, norm, pool
from modelpar.net.plan import Plan, Recipe, plan_from
from modelpar.net.weights import load_initial
from modelpar.seeding import generator


class Blocks(nn.Module):
    """The layers without weights: padding, norms, activations, pools and dropout.

    ``column`` is the one whose maps and units they process; None: all columns.
    """

    def __init__(self, plan: Plan, column: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.activations = nn.ModuleDict(
            {name: Activation(name, plan.activation) for name in plan.layers if name != "fc8"}
        )
        self.pool = pool(plan.pool)
        self.columns = plan.columns if column is None else 1
        self.norm1 = norm(plan, "conv1", self.columns)
        self.norm2 = norm(plan, "conv2", self.columns)
        self.compiled_norms: dict[str, Callable[[Tensor], Tensor]] = {}  # by layer, for training
        self.drop4 = _dropout(plan, "conv4", column, plan.conv4_dropout, plan.sizes[1] ** 2)
        self.drop6 = _dropout(plan, "fc6", column, plan.dropout)
        self.drop7 = _dropout(plan, "fc7", column, plan.dropout)

    def compile(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compile the response normalizations for training, each with the ReLU before it.

        Convolutions, products and crossings run as they are, and so do the pools, whose compiled
        backward is several times slower.  Raises CompileError, and compiles nothing, if a
        compiled normalization fails or differs from the eager one.
        """
        compiled: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, layer in (("conv1", self.norm1), ("conv2", self.norm2)):
            rectify = not self._normalizes_linear(name)
            function = compile_norm(layer, rectify=rectify)
            if function is None or (rectify and self.plan.activation != "relu"):
                continue
            band = next(layer.buffers())
            maps = self.plan.layers[name].outputs * self.columns
            example = 60 * torch.randn(2, maps, 7, 7, generator=generator(0, "compile"))
            example = example.to(band, memory_format=torch.channels_last)
            check_compiled(
                f"the normalization after {name}", function, partial(self._norm, name), example
            )
            compiled[name] = function
        self.compiled_norms = compiled

    def run_eager(self) -> None:
        """Use nothing that is compiled."""
        self.compiled_norms = {}

    def pad(self, images: Tensor, weight: Tensor) -> Tensor:
        """Add the zeros that 224 -> 55 needs: (N, 3, 224, 224) -> (N, 3, 227, 227).

        The result has the dtype and memory format of conv1's ``weight``.
        """
        last = weight.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if last else torch.contiguous_format
        return functional.pad(
            images.to(weight.dtype, memory_format=order), self.plan.conv1_padding
        )

    def activate(self, name: str, response: Tensor) -> Tensor:
        """Return the activations of layer ``name``, in the shape of ``response`` (section 3.1)."""
        return self.activations[name](response)

    def normalize_and_pool(self, name: str, maps: Tensor) -> Tensor:
        """Activate, normalize, pool: conv1's 55 x 55 -> 27 x 27, conv2's 27 -> 13 (section 3.5).

        Run 145 normalizes conv1's linear response and rectifies after the pool, run 166 conv2's.
        """
        # A hook on the activation needs it to run as a module.
        fused = self.training and not self.activations[name]._forward_hooks  # noqa: SLF001
        compiled = self.compiled_norms.get(name) if fused else None
        maps = self._norm(name, maps) if compiled is None else compiled(maps)
        return self._pooled(name, maps) if self._normalizes_linear(name) else self.pool(maps)

    def _normalizes_linear(self, name: str) -> bool:
        recipe = self.plan.recipe
        return (recipe.norm1_input if name == "conv1" else recipe.norm2_input) == "linear"

    def _norm(self, name: str, maps: Tensor) -> Tensor:
        linear = self._normalizes_linear(name)
        norm = self.norm1 if name == "conv1" else self.norm2
        return norm(maps if linear else self.activate(name, maps))

    def _pooled(self, name: str, maps: Tensor) -> Tensor:
        """Activate and pool; the pool comes first, on fewer values, if the result is the same."""
        if self.plan.pool == "average":  # an increasing function and a maximum may change places
            return self.pool(self.activate(name, maps))
        return self.activate(name, self.pool(maps))

    def after_middle(self, name: str, maps: Tensor) -> Tensor:
        """Activate the maps of conv3 or conv4 (N, C, 13, 13); run 177 drops units of conv4."""
        maps = self.activate(name, maps)
        if name != "conv4" or self.drop4.rate == 0:
            return maps
        return self.drop4(maps.flatten(1)).view(maps.shape)

    def after_conv5(self, maps: Tensor) -> Tensor:
        """Activate and pool: (N, C, 13, 13) -> (N, C, 6, 6)."""
        return self.pool(self.activate("conv5", maps))

    def after_fc6(self, units: Tensor) -> Tensor:
        """Activate and drop the units (N, C)."""
        return self.drop6(self.activate("fc6", units))

    def after_fc7(self, units: Tensor) -> Tensor:
        """Activate and drop the units (N, C)."""
        return self.drop7(self.activate("fc7", units))

    def fix_dropout(self, seed: DropoutSeed | None) -> None:
        """Make the next forward's masks a function of ``seed``; None: torch's generator."""
        self.drop4.seed = self.drop6.seed = self.drop7.seed = seed


def _dropout(plan: Plan, name: str, column: int | None, rate: float, places: int = 1) -> Dropout:
    """Return the dropout of a layer with ``places`` units a map; masks cover the whole net."""
    units = plan.layers[name].outputs * places if name in plan.layers else 0
    first = 0 if column is None else column * units
    last = plan.columns * units if column is None else first + units
    return Dropout(name, plan.columns * units, slice(first, last), rate)


def _conv(plan: Plan, name: str, columns: int) -> nn.Conv2d:
    """Return a convolution for ``columns`` columns: one group each, except at a crossing."""
    row = plan.layers[name]
    image, crossing = name == "conv1", name in plan.crossing_at
    return nn.Conv2d(
        plan.inputs(name) * (1 if image else plan.columns if crossing else columns),
        row.outputs * columns,
        row.kernel,
        stride=row.stride,
        padding=plan.padding(name),
        groups=1 if image or crossing else columns,
        device="meta",  # load_initial sets the values
    )


def _linear(plan: Plan, name: str, columns: int, *, bias: bool = True) -> nn.Linear:
    """Return a fully connected layer; it reads both columns only at a crossing.

    Differs: the code computed fc8 on one GPU.  Here it is split by its inputs, so that both
    devices do equal work: each column has the weights from its units to all classes.
    """
    crossing = name in plan.crossing_at
    inputs = plan.inputs(name) * (columns if name == "fc8" else plan.columns if crossing else 1)
    outputs = plan.outputs(name) * (1 if name == "fc8" else columns)
    return nn.Linear(inputs, outputs, bias=bias, device="meta")


class AlexNet(nn.Module):
    """The whole net on one device; its columns are the groups of its convolutions.

    Input (N, 3, S, S), pixels 0-255 less the mean; output (N, classes) logits.
    """

    def __init__(self, plan: Plan, seed: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.conv1 = _conv(plan, "conv1", plan.columns)
        self.conv2 = _conv(plan, "conv2", plan.columns)
        self.conv3 = _conv(plan, "conv3", plan.columns) if "conv3" in plan.layers else None
        self.conv4 = _conv(plan, "conv4", plan.columns) if "conv4" in plan.layers else None
        self.conv5 = _conv(plan, "conv5", plan.columns)
        self.conv6 = _conv(plan, "conv6", plan.columns) if "conv6" in plan.layers else None
        self.fc6 = _linear(plan, "fc6", plan.columns)
        self.fc7 = _linear(plan, "fc7", plan.columns)
        self.fc8 = _linear(plan, "fc8", plan.columns)
        self.blocks = Blocks(plan)
        load_initial(self, plan, seed, column=None)

    @classmethod
    def from_recipe(
        cls,
        recipe: str | Recipe,
        num_classes: int = paper.NUM_CLASSES,
        image_size: int = paper.IMAGE_SIZE,
        *,
        seed: int | None = None,
        **switches: Any,
    ) -> Self:
        """Return the net of ``paper``, ``code2012`` or ``clean``, with initial weights.

        ``switches`` are the fields of ``Plan``.  Raises SettingsError.
        """
        return cls(plan_from(recipe, num_classes, image_size, switches), seed)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of ``images`` (N, 3, S, S)."""
        blocks = self.blocks
        x = blocks.pad(images, self.conv1.weight)
        x = blocks.normalize_and_pool("conv1", self.conv1(x))  # (N, 96, 27, 27)
        x = blocks.normalize_and_pool("conv2", self.conv2(x))  # (N, 256, 13, 13)
        for name in self.plan.middle:  # conv3 and conv4; conv3 reads both columns
            x = blocks.after_middle(name, self.get_submodule(name)(x))  # (N, 384, 13, 13)
        x = blocks.after_conv5(self.conv5(x))  # (N, 256, 6, 6)
        if self.conv6 is not None:
            x = blocks.activate("conv6", self.conv6(x))
        x = x.flatten(1)  # (N, 9216)
        x = blocks.after_fc6(self._units("fc6", x))  # (N, 4096), reads both
        x = blocks.after_fc7(self._units("fc7", x))  # (N, 4096), reads both
        return self.fc8(x)

    def _units(self, name: str, units: Tensor) -> Tensor:
        """Apply fc6 or fc7; without a crossing each column reads only its half of the units."""
        layer: nn.Linear = self.get_submodule(name)  # pyright: ignore[reportAssignmentType]
        if name in self.plan.crossing_at:
            return layer(units)
        columns = self.plan.columns
        parts = zip(
            units.chunk(columns, 1),
            layer.weight.chunk(columns),
            layer.bias.chunk(columns),
            strict=True,
        )
        return torch.cat([functional.linear(*part) for part in parts], dim=1)

    def fix_dropout(self, seed: DropoutSeed | None) -> None:
        """Make the next forward's masks a function of ``seed``; None: torch's generator."""
        self.blocks.fix_dropout(seed)


class Column(nn.Module):
    """One device's half of the net: 48, 128, 192, 192, 128 kernels, 2048 and 2048 units.

    Its state dict has the whole net's keys with this column's slices; only column 0 has fc8's
    bias.  ``link`` connects it to the other column.  Forward and backward are collectives of the
    pair.
    """

    def __init__(self, plan: Plan, link: Link, seed: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.link = link
        self.conv1 = _conv(plan, "conv1", 1)
        self.conv2 = _conv(plan, "conv2", 1)
        self.conv3 = _conv(plan, "conv3", 1) if "conv3" in plan.layers else None
        self.conv4 = _conv(plan, "conv4", 1) if "conv4" in plan.layers else None
        self.conv5 = _conv(plan, "conv5", 1)
        self.conv6 = _conv(plan, "conv6", 1) if "conv6" in plan.layers else None
        self.fc6 = _linear(plan, "fc6", 1)
        self.fc7 = _linear(plan, "fc7", 1)
        self.fc8 = _linear(plan, "fc8", 1, bias=link.column == 0)
        self.blocks = Blocks(plan, link.column)
        load_initial(self, plan, seed, link.column)

    @classmethod
    def from_recipe(
        cls,
        recipe: str | Recipe,
        link: Link,
        num_classes: int = paper.NUM_CLASSES,
        image_size: int = paper.IMAGE_SIZE,
        *,
        seed: int | None = None,
        **switches: Any,
    ) -> Self:
        """Return column ``link.column`` of the net that ``AlexNet.from_recipe`` returns.

        Without a ``seed``, torch's generator must be in the same state in both processes.
        """
        return cls(plan_from(recipe, num_classes, image_size, switches), link, seed)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of ``images`` (N, 3, S, S), the same on both columns.

        conv1-5 process the batch in the link's chunks if each image is computed independently:
        the maps of a chunk are sent while those of the next are computed.
        """
        blocks = self.blocks
        chunks = self.link.chunks if self.plan.by_image else 1
        maps = [self._maps(part) for part in images.chunk(chunks)]
        x = torch.cat([self._units(part) for part in maps])  # (N, 4608)
        x = blocks.after_fc6(self._read("fc6", x))  # (N, 2048), crossing
        x = blocks.after_fc7(self._read("fc7", x))  # (N, 2048), crossing
        return add_logits(self.fc8(x), self.link)  # crossing

    def _maps(self, images: Tensor) -> Tensor | InFlight:
        """Return conv2's maps; where the next layer is a crossing they are being sent."""
        blocks = self.blocks
        x = blocks.pad(images, self.conv1.weight)
        x = blocks.normalize_and_pool("conv1", self.conv1(x))  # (N, 48, 27, 27)
        x = blocks.normalize_and_pool("conv2", self._read("conv2", x))  # (N, 128, 13, 13)
        return self._send(self.plan.middle[0], x)

    def _units(self, x: Tensor | InFlight) -> Tensor:
        """Return conv5's maps as units, from conv2's maps."""
        blocks = self.blocks
        for name in self.plan.middle:  # conv3 and conv4; conv3 is a crossing
            x = blocks.after_middle(name, self._read(name, x))  # (N, 192, 13, 13)
        x = blocks.after_conv5(self._read("conv5", x))  # (N, 128, 6, 6)
        if self.conv6 is not None:
            x = blocks.activate("conv6", self._read("conv6", x))  # crossing
        return x.flatten(1)  # (N, 4608)

    def _send(self, name: str, maps: Tensor) -> Tensor | InFlight:
        """Start sending the input of layer ``name`` if it is a crossing."""
        return send(maps, self.link, name) if name in self.plan.crossing_at else maps

    def _read(self, name: str, maps: Tensor | InFlight) -> Tensor:
        """Apply layer ``name`` to this column's maps or units, at a crossing to both columns'."""
        layer: nn.Conv2d | nn.Linear = self.get_submodule(name)  # pyright: ignore[reportAssignmentType]
        sent = self._send(name, maps) if isinstance(maps, torch.Tensor) else maps
        if isinstance(sent, torch.Tensor):
            return layer(sent)
        convolution = Convolution(self.plan.layers[name].stride, self.plan.padding(name))
        op = Linear() if isinstance(layer, nn.Linear) else convolution
        return read_both(sent, layer.weight, layer.get_parameter("bias"), op)

    def fix_dropout(self, seed: DropoutSeed | None) -> None:
        """Make the next forward's masks a function of ``seed``; None: torch's generator."""
        self.blocks.fix_dropout(seed)
