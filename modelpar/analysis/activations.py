"""Statistics of each layer's activations: size, share of zeros, dead maps (section 3.1)."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelpar.distributed import Mesh, all_reduce_sum
from modelpar.net.layers import Activation

LOGITS: Final = "logits"
TORCH_ACTIVATIONS: Final = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU)  # of torchvision's net
MEASURES: Final = ("mean", "std", "zeros", "dead")


@dataclass(frozen=True)
class Activity:
    """Statistics of one layer of one column over some images, after the activation function.

    ``mean`` and ``std`` are of all values.  ``zeros`` is the share of values that are zero,
    ``dead`` the share of maps or units that are zero at all places of all images.  ``column`` is
    None for the logits, which belong to no single column.
    """

    layer: str
    column: int | None
    mean: float
    std: float
    zeros: float
    dead: float


def activations_of(net: nn.Module) -> dict[str, nn.Module]:
    """Return the activation modules by the names of the layers before them, in forward order."""
    found: dict[str, nn.Module] = {}
    layer = ""
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layer = name
        elif isinstance(module, Activation):
            found[module.layer] = module
        elif isinstance(module, TORCH_ACTIVATIONS):
            found[layer] = module
    return found


class ActivationStats:
    """Context manager that collects statistics of the first ``images`` of each batch.

    Its forward hooks do not change the net's results and are removed on exit.  The net may run a
    batch in parts, as the pair's chunks are.
    """

    def __init__(self, net: nn.Module, columns: int, mesh: Mesh, images: int) -> None:
        self.net, self.columns, self.mesh, self.images = net, columns, mesh, images
        self.layers = {**activations_of(net), LOGITS: net}
        self.sums: dict[str, Tensor] = {}  # (local columns, 4): number, sum, squares, zeros
        self.alive: dict[str, Tensor] = {}  # (local columns, maps): whether ever nonzero
        self.passed: dict[str, int] = {}  # images of the current batch
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Register the hooks."""
        self.handles.append(self.net.register_forward_pre_hook(lambda *_: self.passed.clear()))
        for name, module in self.layers.items():
            self.handles.append(module.register_forward_hook(partial(self._collect, name)))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        while self.handles:
            self.handles.pop().remove()

    @torch.no_grad()
    def _collect(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        passed = self.passed.get(name, 0)
        self.passed[name] = passed + len(output)
        values = output[: max(0, self.images - passed)]
        if not len(values):
            return
        columns = 1 if name == LOGITS or self.mesh.pair is not None else self.columns
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        maps = wide.reshape(len(wide), columns, wide.shape[1] // columns, -1)
        parts = maps.flatten(2)
        sums = torch.stack(
            [
                torch.full_like(parts[0, :, 0], parts[:, 0].numel(), dtype=torch.float64),
                parts.sum((0, 2), dtype=torch.float64),
                parts.square().sum((0, 2), dtype=torch.float64),
                (parts == 0).sum((0, 2)).double(),
            ],
            dim=1,
        )
        alive = maps.abs().amax(3).amax(0) != 0
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.alive[name] = self.alive[name] | alive if name in self.alive else alive

    def result(self) -> list[Activity]:
        """Return the statistics of all layers and columns.  Collective over the pair."""
        first, device = self.mesh.column, self.mesh.device
        total = torch.zeros(len(self.layers), self.columns, 6, dtype=torch.float64, device=device)
        for row, name in zip(total, self.layers, strict=True):
            if name == LOGITS and first:
                continue  # both columns have the same logits: count them once
            dead = (~self.alive[name]).double()
            counts = torch.stack([dead.sum(1), torch.ones_like(dead).sum(1)], dim=1)
            row[first : first + len(dead)] = torch.cat([self.sums[name], counts], dim=1)
        count, values, squares, zeros, dead, maps = all_reduce_sum(total, self.mesh.pair).unbind(2)
        mean = values / count
        std = (squares / count - mean * mean).clamp(min=0).sqrt()
        found = torch.stack([mean, std, zeros / count, dead / maps], dim=2).tolist()
        return [
            Activity(name, None if name == LOGITS else column, *measures)
            for name, columns in zip(self.layers, found, strict=True)
            for column, measures in enumerate(columns[:1] if name == LOGITS else columns)
        ]
