"""``debug=dry``: what each layer of each column computes, sends and needs, without training.

The net runs on torch's device ``meta``, where tensors have shapes and no values.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import prod
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from modelpar import config, tables
from modelpar.images.sets import open_set
from modelpar.net.alexnet import AlexNet, Column
from modelpar.net.exchange import Link
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import Plan, plan_for
from modelpar.settings import TrainSettings

HEAD: Final = ("layer", "col", "output", "parameters", "MACs", "sent, B")
MEMORY: Final = ("weights", "activations", "optimizer")
NOTE: Final = (
    "For one image: multiply-accumulates (MACs) and bytes sent, both of the forward pass. The\n"
    "backward pass sends as much again, but for the logits. For {images} images, in MB: weights;\n"
    "activations that are kept for the backward pass (torch.compile keeps fewer); gradients and\n"
    "momentum of the optimizer."
)


@dataclass
class Row:
    """A layer of one column: numbers of one image, and bytes of the whole batch.

    ``output``: of the layer itself, before its pool.  ``sent`` and ``returned``: bytes forward and
    backward.  ``optimizer``: gradients and velocities.  ``activations``: what is kept for the
    backward pass without torch.compile, which keeps less.
    """

    layer: str
    column: int
    output: tuple[int, ...] = ()
    parameters: int = 0
    products: int = 0
    sent: int = 0
    returned: int = 0
    weights: int = 0
    activations: int = 0
    optimizer: int = 0


def layer_rows(plan: Plan, settings: TrainSettings, column: int | None) -> list[Row]:
    """Return the layers of a column, or of the whole net for None, in their order."""
    dtype = getattr(torch, settings.precision)
    wide = torch.promote_types(dtype, torch.float32)
    link = Link(lambda sent: (torch.empty_like(sent), lambda: None), column or 0)
    link.dtype = getattr(torch, settings.crossing.dtype or settings.precision)
    with torch.device("meta"):
        net = whole_net(plan, seed=0) if column is None else Column(plan, link, seed=0)
    net.to("meta", dtype)
    rows: list[Row] = []
    for name, module in net.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            count = sum(value.numel() for value in own)
            row = Row(name, column or 0, parameters=count, weights=count * wide.itemsize)
            row.optimizer = count * (dtype.itemsize + wide.itemsize)  # gradients and velocities
            row.optimizer += row.weights * bool(settings.recipe.ema)
            row.weights += count * dtype.itemsize * (dtype != wide)
            rows.append(row)
    size = settings.batch_size
    images = torch.empty(size, 3, plan.image_size, plan.image_size, device="meta", dtype=dtype)
    with _watched(net, rows):
        logits = net(images)
    logits.sum().backward()
    for row in rows:
        weight = net.get_submodule(row.layer).get_parameter("weight")
        places = prod(row.output[1:]) if weight.dim() == 4 else 1  # noqa: PLR2004 - convolution
        row.products = weight.numel() * places
        row.sent, row.returned = (
            link.sent[row.layer, way] // size for way in ("forward", "backward")
        )
    return rows


def _watched(net: nn.Module, rows: list[Row]) -> AbstractContextManager[object]:
    """Note the output of each layer, and what it keeps for the backward pass, in its row."""
    named = {row.layer: row for row in rows}
    order = [row.layer for row in rows]
    place = [0]
    seen = {id(value) for value in net.parameters()}
    kept: list[Tensor] = []  # alive, so that no two have one identity

    def note(name: str, output: Tensor) -> None:
        named[name].output = tuple(output.shape[1:])

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor if tensor._base is None else tensor._base  # noqa: SLF001 - of a view
        if id(storage) not in seen and not isinstance(storage, nn.Parameter):
            seen.add(id(storage))
            kept.append(storage)
            row = named[order[min(place[0], len(order) - 1)]]
            row.activations += storage.numel() * storage.element_size()
        return tensor

    if isinstance(net, (AlexNet, Column)):
        after: Callable[[str, Tensor], Tensor] = net.blocks.after

        def watched_after(name: str, response: Tensor) -> Tensor:
            note(name, response)
            out = after(name, response)
            place[0] = order.index(name) + 1
            return out

        net.blocks.after = watched_after
        module: nn.Module = net
        module.register_forward_hook(lambda *call: note("fc8", call[-1]))
    else:
        for number, name in enumerate(order):
            module = net.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, here=number: place.__setitem__(0, here))
            module.register_forward_hook(lambda *call, name=name: note(name, call[-1]))
    return saved_tensors_hooks(keep, lambda tensor: tensor)


def plan_of_run(settings: TrainSettings) -> Plan:
    """Return the net that a training would train; raises SettingsError and DataError."""
    size = settings.model.image_size or settings.data.image_size
    data = replace(settings.data, image_size=size)
    classes = settings.model.num_classes or data.num_classes
    if classes is None:  # only the images know
        cache = config.cache_dir(settings.cache_dir)
        classes = len(open_set(data, cache, settings.seed, settings.batch_size).classes)
    return plan_for(settings.recipe, settings.model, classes, size)


def show(settings: TrainSettings) -> None:
    """Print the table of the net that ``settings`` describe; nothing is trained or written."""
    plan = plan_of_run(settings)
    columns = [None] if settings.columns == 1 or plan.columns == 1 else [0, 1]
    rows = [row for column in columns for row in layer_rows(plan, settings, column)]
    names = [row.layer for row in rows]
    rows.sort(key=lambda row: names.index(row.layer))
    cells = [
        (
            row.layer,
            str(row.column) if len(columns) > 1 else "",
            "x".join(map(str, row.output)),
            f"{row.parameters:,}",
            f"{row.products:,}",
            f"{row.sent:,}",
            *(f"{size / 1e6:.1f}" for size in (row.weights, row.activations, row.optimizer)),
        )
        for row in rows
    ]
    keys = ("parameters", "products", "sent", "weights", "activations", "optimizer")
    total = {key: sum(getattr(row, key) for row in rows) for key in keys}
    counts = [f"{total[key]:,}" for key in keys[:3]]
    sizes = [f"{total[key] / 1e6:.1f}" for key in keys[3:]]
    text = tables.aligned((*HEAD, *MEMORY), [*cells, ("all", "", "", *counts, *sizes)])
    print(  # noqa: T201
        f"{plan.net}, recipe {plan.recipe.name}, {plan.num_classes:,} classes, "
        f"{plan.image_size} pixels, {settings.precision}\n\n{text}\n\n"
        f"{NOTE.format(images=settings.batch_size)}"
    )
