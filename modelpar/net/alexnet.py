"""The net of section 3.5: ``AlexNet``, the whole net on one device; ``Column``, one device's half.

Compare the two ``forward`` methods: they differ only where the columns exchange maps.
"""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

import modelpar
from modelpar.errors import SettingsError
from modelpar.gpu.block import block
from modelpar.net import paper
from modelpar.net.blocks import Blocks
from modelpar.net.exchange import Convolution, InFlight, Linear, Link, add_logits, read_both, send
from modelpar.net.fused import convolve
from modelpar.net.plan import Plan, Recipe
from modelpar.net.weights import load_initial


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
    """The layers of the column of ``link`` with their initial weights; None: of all columns.

    ``classes`` are the names, and ``statistics`` the mean image (3, T, T) with its colours, of the
    data that a loaded net was trained on.
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv5: nn.Conv2d
    fc8: nn.Linear
    classes: Sequence[str] = ()
    statistics: Any = None

    def __init__(self, plan: Plan, seed: int | None, link: Link | None) -> None:
        super().__init__()
        if plan.net in paper.BASELINES:
            fix = "use modelpar-predict, or whole_net of modelpar.net.four_layer"
            raise SettingsError(f"net={plan.net}: is not AlexNet; {fix}")
        if link and plan.columns == 1:
            raise SettingsError(f"net={plan.net}: has one column; use AlexNet")
        self.plan = plan
        column = None if link is None else link.column
        for name in plan.layers:
            self.add_module(name, _layer(plan, name, column))
        self.blocks = Blocks(plan, link)
        load_initial(self, plan, seed, column)

    def compile(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compile what ``Blocks.compile`` does; raises CompileError."""
        self.blocks.compile(self.conv1.weight.detach())

    def run_eager(self) -> None:
        """Run eagerly: without torch.compile and Triton kernels."""
        self.blocks.run_eager()

    def predict(self, images: Any, *, views: int = 1) -> list[Any]:
        """Return a ``modelpar.training.prediction.Prediction`` of each image.

        ``images`` is a path, a PIL image, or a list of them, of any size.  Each is prepared as for
        an evaluation: its central square, scaled, minus the mean image.  ``views`` is 1, 9 or 10.
        Raises DataError for an image that cannot be read, SettingsError for a net without mean
        image.  Of a Column it is a collective of the pair, with the same images on both.
        """
        return modelpar.load("training.prediction:predict")(self, images, views)


class AlexNet(_Layers):
    """The whole net on one device; its columns are the groups of its convolutions.

    Input (N, 3, S, S), pixels 0-255 minus the mean; output (N, classes) logits.
    """

    def __init__(self, plan: Plan, seed: int | None = None) -> None:
        super().__init__(plan, seed, link=None)

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
        """Return the net of ``paper``, ``code2012``, ``clean`` or ``caffe``, with initial weights.

        ``switches`` are the fields of ``Plan``.  Raises SettingsError.
        """
        return cls(Plan(Recipe.named(recipe), num_classes, image_size, **switches), seed)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return a trained net in evaluation mode, with its ``classes`` and ``statistics``.

        ``path`` is a run (its newest step), the folder of a step, or an exported file.
        ``statistics`` is None for a file of a version that did not record it.  Raises
        CheckpointError, and SettingsError for a net of another kind.
        """
        return modelpar.load("training.prediction:load")(cls, path)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of ``images`` (N, 3, S, S)."""
        return self.fc8(self.fc7_units(images))

    def features(self, images: Tensor) -> Tensor:
        """Return conv5's maps after its pool, (N, 256, 6, 6) at 224 pixels."""
        blocks = self.blocks
        x = blocks.pad(images, self.conv1.weight)
        return self._by_column(x) if blocks.fuses else self._grouped(x)

    def fc7_units(self, images: Tensor) -> Tensor:
        """Return the units of fc7 as fc8 reads them, (N, 4096); in evaluation half of each."""
        blocks = self.blocks
        x = self.features(images).flatten(1)  # (N, 9216)
        x = blocks.after("fc6", self._units("fc6", x))  # (N, 4096), reads both
        return blocks.after("fc7", self._units("fc7", x))  # (N, 4096), reads both

    def _grouped(self, x: Tensor) -> Tensor:
        """Return conv5's maps, after its pool, of padded images."""
        blocks = self.blocks
        x = blocks.after("conv1", self.conv1(x))  # (N, 96, 27, 27)
        x = blocks.after("conv2", self.conv2(x))  # (N, 256, 13, 13)
        for name in self.plan.middle:  # conv3 and conv4; conv3 reads both columns
            x = blocks.after(name, self.get_submodule(name)(x))  # (N, 384, 13, 13)
        x = blocks.after("conv5", self.conv5(x))  # (N, 256, 6, 6)
        if "conv6" in self.plan.layers:
            x = blocks.after("conv6", self.get_submodule("conv6")(x))
        return x

    def _by_column(self, x: Tensor) -> Tensor:
        """Return what ``_grouped`` does, of patches, by our kernels.

        Each column has convolutions of its own.  With groups they are many times slower in
        channels_last memory (torch/_inductor/graph.py, decide_layout_opt).
        """
        columns = self.plan.columns
        maps = [x] * columns
        for name, what in self.blocks.fused.items():
            if name in self.plan.crossing_at:
                maps = [torch.cat(maps, 1)] * columns
            layer = self.get_submodule(name)
            weights = layer.get_parameter("weight").chunk(columns)
            biases = layer.get_parameter("bias").chunk(columns)
            maps = [
                block(convolve(name, own, weight, self.plan), bias, what)
                for own, weight, bias in zip(maps, weights, biases, strict=True)
            ]
        return torch.cat(maps, 1)

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
        super().__init__(plan, seed, link)
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

    @classmethod
    def load(cls, path: str | os.PathLike[str], link: Link) -> Self:
        """Return column ``link.column`` of the net that ``AlexNet.load`` returns."""
        return modelpar.load("training.prediction:load")(cls, path, link)

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
        x = self.blocks.pad(images, self.conv1.weight)
        x = self._convolve("conv1", x)  # (N, 48, 27, 27)
        x = self._convolve("conv2", x)  # (N, 128, 13, 13)
        return self._send(self.plan.middle[0], x)

    def _units(self, x: Tensor | InFlight) -> Tensor:
        """Return conv5's maps as units, from conv2's maps."""
        for name in self.plan.middle:  # conv3 and conv4; conv3 is a crossing
            x = self._convolve(name, x)  # (N, 192, 13, 13)
        x = self._convolve("conv5", x)  # (N, 128, 6, 6)
        if "conv6" in self.plan.layers:
            x = self._convolve("conv6", x)  # crossing
        return x.flatten(1)  # (N, 4608)

    def _convolve(self, name: str, maps: Tensor | InFlight) -> Tensor:
        """Apply convolution ``name`` and what follows it."""
        if not self.blocks.fuses:
            return self.blocks.after(name, self._read(name, maps))
        bias = self.get_submodule(name).get_parameter("bias")
        return block(self._read(name, maps), bias, self.blocks.fused[name])

    def _send(self, name: str, maps: Tensor) -> Tensor | InFlight:
        """Start sending the input of layer ``name`` if it is a crossing."""
        return send(maps, self.link, name) if name in self.plan.crossing_at else maps

    def _read(self, name: str, maps: Tensor | InFlight) -> Tensor:
        """Apply layer ``name`` to this column's maps or units, at a crossing to both columns'.

        A convolution before one of our kernels adds no bias.
        """
        layer: nn.Conv2d | nn.Linear = self.get_submodule(name)  # pyright: ignore[reportAssignmentType]
        sent = self._send(name, maps) if isinstance(maps, torch.Tensor) else maps
        row = self.plan.layers[name]
        fused = self.blocks.fuses and row.kernel > 0
        if isinstance(sent, torch.Tensor):
            return convolve(name, sent, layer.weight, self.plan) if fused else layer(sent)
        op = Convolution(row.stride, self.plan.padding(name)) if row.kernel else Linear()
        bias = None if fused else layer.get_parameter("bias")
        return read_both(sent, layer.weight, bias, op)
