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
from modelpar.net.exchange import Convolution, InFlight, Linear, Link, add_logits, read_both, send
from modelpar.net.layers import Activation, Dropout, as_weight, compile_norm, norm, pool
from modelpar.net.plan import Plan, Recipe
from modelpar.net.weights import load_initial
from modelpar.seeding import generator


class Blocks(nn.Module):
    """The layers without weights: padding, norms, activations, pools and dropout.

    ``column`` is the one whose maps and units they process; None: all columns.
    """

    def __init__(self, plan: Plan, column: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.columns = plan.columns if column is None else 1
        self.activations = nn.ModuleDict(
            {name: Activation(name, plan.activation) for name in plan.layers if name != "fc8"}
        )
        self.pool = pool(plan.pool)
        self.norm1 = norm(plan, "conv1", self.columns)
        self.norm2 = norm(plan, "conv2", self.columns)
        # Run 145 normalizes conv1's linear response, run 166 conv2's: the ReLU follows the pool.
        linear = {"conv1": plan.recipe.norm1_input, "conv2": plan.recipe.norm2_input}
        self.normalizes_linear = {name: kind == "linear" for name, kind in linear.items()}
        self.compiled_norms: dict[str, Callable[[Tensor], Tensor]] = {}  # by layer, for training
        rates = {"conv4": plan.conv4_dropout, "fc6": plan.dropout, "fc7": plan.dropout}
        self.dropouts = nn.ModuleDict(
            {name: _dropout(plan, name, column, rate) for name, rate in rates.items() if rate}
        )

    def compile(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compile the response normalizations for training, each with the ReLU before it.

        Convolutions, products and crossings run as they are, and so do the pools, whose compiled
        backward is several times slower.  Raises CompileError, and compiles nothing, if a
        compiled normalization fails or differs from the eager one.
        """
        compiled: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, layer in (("conv1", self.norm1), ("conv2", self.norm2)):
            rectify = not self.normalizes_linear[name]
            function = compile_norm(layer, rectify=rectify)
            if function is None or (rectify and self.plan.activation != "relu"):
                continue
            shape = (2, self.plan.layers[name].outputs * self.columns, 7, 7)
            example = 60 * torch.randn(shape, generator=generator(0, "compile"))
            example = example.to(next(layer.buffers()), memory_format=torch.channels_last)
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
        return functional.pad(as_weight(images, weight), self.plan.conv1_padding)

    def normalize_and_pool(self, name: str, maps: Tensor) -> Tensor:
        """Activate, normalize and pool: 55 x 55 -> 27 x 27, 27 x 27 -> 13 x 13 (section 3.5)."""
        activation = self.activations[name]
        # A hook on the activation needs it to run as a module.
        fused = self.training and not activation._forward_hooks  # noqa: SLF001
        compiled = self.compiled_norms.get(name) if fused else None
        maps = compiled(maps) if compiled else self._norm(name, maps)
        if not self.normalizes_linear[name]:
            return self.pool(maps)
        if self.plan.pool == "average":
            return self.pool(activation(maps))
        return activation(self.pool(maps))  # an increasing function may follow the maximum

    def _norm(self, name: str, maps: Tensor) -> Tensor:
        norm = self.norm1 if name == "conv1" else self.norm2
        return norm(maps if self.normalizes_linear[name] else self.activations[name](maps))

    def after(self, name: str, response: Tensor) -> Tensor:
        """Activate; then pool conv5's maps, 13 x 13 -> 6 x 6, or drop units (section 4.2).

        Units of fc6 and fc7 are dropped, in run 177 also of conv4.
        """
        x = self.activations[name](response)
        if name == "conv5":
            return self.pool(x)
        return self.dropouts[name](x) if name in self.dropouts else x


def _dropout(plan: Plan, name: str, column: int | None, rate: float) -> Dropout:
    """Return the dropout of a layer, whose masks cover all columns."""
    units = plan.layers[name].outputs * (plan.sizes[1] ** 2 if name == "conv4" else 1)
    own = slice(None) if column is None else slice(column * units, (column + 1) * units)
    return Dropout(name, plan.columns * units, rate, own)


def _layer(plan: Plan, name: str, column: int | None) -> nn.Module:
    """Return a layer of ``column``, or of all columns for None; ``load_initial`` sets its values.

    A convolution has one group per column, unless it is a crossing, which reads all columns.

    Differs: the code computed fc8 on one GPU.  Here it is split by its inputs, so that both
    devices do equal work: each column has the weights from its units to all classes.
    """
    row, inputs = plan.layers[name], plan.inputs(name)
    columns = plan.columns if column is None else 1
    if name == "fc8":
        bias = column in {None, 0}
        return nn.Linear(inputs * columns, plan.num_classes, bias=bias, device="meta")
    crossing = name in plan.crossing_at
    inputs *= plan.columns if crossing else 1
    outputs = row.outputs * columns
    if not row.kernel:
        return nn.Linear(inputs, outputs, device="meta")
    groups = 1 if crossing or name == "conv1" else columns
    window = (row.kernel, row.stride, plan.padding(name))
    return nn.Conv2d(inputs * groups, outputs, *window, groups=groups, device="meta")


class _Layers(nn.Module):
    """The layers of ``column`` with their initial weights; None: those of all columns."""

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv5: nn.Conv2d
    fc8: nn.Linear

    def __init__(self, plan: Plan, seed: int | None, column: int | None) -> None:
        super().__init__()
        self.plan = plan
        for name in plan.layers:
            self.add_module(name, _layer(plan, name, column))
        self.blocks = Blocks(plan, column)
        load_initial(self, plan, seed, column)


class AlexNet(_Layers):
    """The whole net on one device; its columns are the groups of its convolutions.

    Input (N, 3, S, S), pixels 0-255 less the mean; output (N, classes) logits.
    """

    def __init__(self, plan: Plan, seed: int | None = None) -> None:
        super().__init__(plan, seed, column=None)

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
        return cls(Plan(Recipe.named(recipe), num_classes, image_size, **switches), seed)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of ``images`` (N, 3, S, S)."""
        blocks = self.blocks
        x = blocks.pad(images, self.conv1.weight)
        x = blocks.normalize_and_pool("conv1", self.conv1(x))  # (N, 96, 27, 27)
        x = blocks.normalize_and_pool("conv2", self.conv2(x))  # (N, 256, 13, 13)
        for name in self.plan.middle:  # conv3 and conv4; conv3 reads both columns
            x = blocks.after(name, self.get_submodule(name)(x))  # (N, 384, 13, 13)
        x = blocks.after("conv5", self.conv5(x))  # (N, 256, 6, 6)
        if "conv6" in self.plan.layers:
            x = blocks.after("conv6", self.get_submodule("conv6")(x))
        x = x.flatten(1)  # (N, 9216)
        x = blocks.after("fc6", self._units("fc6", x))  # (N, 4096), reads both
        x = blocks.after("fc7", self._units("fc7", x))  # (N, 4096), reads both
        return self.fc8(x)

    def _units(self, name: str, units: Tensor) -> Tensor:
        """Apply fc6 or fc7; without a crossing each column reads only its half of the units."""
        layer: nn.Linear = self.get_submodule(name)  # pyright: ignore[reportAssignmentType]
        if name in self.plan.crossing_at:
            return layer(units)
        count = self.plan.columns
        weights, biases = layer.weight.chunk(count), layer.bias.chunk(count)
        parts = zip(units.chunk(count, 1), weights, biases, strict=True)
        return torch.cat([functional.linear(*part) for part in parts], dim=1)


class Column(_Layers):
    """One device's half of the net: 48, 128, 192, 192, 128 kernels, 2048 and 2048 units.

    Its state dict has the whole net's keys with this column's slices; only column 0 has fc8's
    bias.  ``link`` connects it to the other column.  Forward and backward are collectives of the
    pair.
    """

    def __init__(self, plan: Plan, link: Link, seed: int | None = None) -> None:
        super().__init__(plan, seed, link.column)
        self.link = link

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
        return cls(Plan(Recipe.named(recipe), num_classes, image_size, **switches), link, seed)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of ``images`` (N, 3, S, S), the same on both columns.

        conv1-5 process the batch in the link's chunks if each image is computed independently:
        the maps of a chunk are sent while those of the next are computed.
        """
        blocks = self.blocks
        chunks = self.link.chunks if self.plan.by_image else 1
        maps = [self._maps(part) for part in images.chunk(chunks)]
        x = torch.cat([self._units(part) for part in maps])  # (N, 4608)
        x = blocks.after("fc6", self._read("fc6", x))  # (N, 2048), crossing
        x = blocks.after("fc7", self._read("fc7", x))  # (N, 2048), crossing
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
            x = blocks.after(name, self._read(name, x))  # (N, 192, 13, 13)
        x = blocks.after("conv5", self._read("conv5", x))  # (N, 128, 6, 6)
        if "conv6" in self.plan.layers:
            x = blocks.after("conv6", self._read("conv6", x))  # crossing
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
        row = self.plan.layers[name]
        op = Convolution(row.stride, self.plan.padding(name)) if row.kernel else Linear()
        return read_both(sent, layer.weight, layer.get_parameter("bias"), op)
