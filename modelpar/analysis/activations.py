"""What the layers give in an evaluation: how large, how often zero, which maps are dead (3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelpar.distributed import Mesh, all_reduce_sum
from modelpar.net.layers import Activation

LOGITS: Final = "logits"
TORCHS: Final = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU)  # of nets that are not built from ours
MEASURES: Final = ("mean", "std", "zeros", "dead")


@dataclass(frozen=True)
class Activity:
    """What a layer of one column gave to some images, after its activation.

    Mean and standard deviation of all values; the share of them that are zero; the share of its
    maps, or units, that are zero for all images and places.  ``column`` None: the logits, which
    no column has for itself.
    """

    layer: str
    column: int | None
    mean: float
    std: float
    zeros: float
    dead: float


def activations_of(net: nn.Module) -> dict[str, nn.Module]:
    """Return the activations by the names of the layers they follow, in the order of forward."""
    found: dict[str, nn.Module] = {}
    layer = ""
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layer = name
        elif isinstance(module, Activation):
            found[module.layer] = module
        elif isinstance(module, TORCHS):
            found[layer] = module
    return found


class _Tally:
    """Sums over one layer's values, in each column that passes through this process."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.passed = 0  # images of the batch under way
        self.sums: Tensor | float = 0.0  # (columns, 4): number, sum, sum of squares, zeros
        self.alive: Tensor | bool = False  # (columns, maps)

    def add(self, values: Tensor) -> None:
        """Count (N, C, ...)."""
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        parts = wide.reshape(len(wide), self.columns, -1)
        self.sums = self.sums + torch.stack(
            [
                torch.full_like(parts[0, :, 0], parts[:, 0].numel(), dtype=torch.float64),
                parts.sum((0, 2), dtype=torch.float64),
                parts.square().sum((0, 2), dtype=torch.float64),
                (parts == 0).sum((0, 2)).double(),
            ],
            dim=1,
        )
        maps = parts.view(len(wide), self.columns, wide.shape[1] // self.columns, -1)
        self.alive = self.alive | (maps.abs().amax(3).amax(0) != 0)

    def row(self) -> Tensor:
        """Return all that adds up over columns: the four sums, dead maps, maps."""
        assert isinstance(self.sums, torch.Tensor)  # noqa: S101 - a batch has passed
        assert isinstance(self.alive, torch.Tensor)  # noqa: S101
        dead = (~self.alive).sum(1).double()
        maps = torch.full_like(dead, self.alive.shape[1])
        return torch.cat([self.sums, torch.stack([dead, maps], dim=1)], dim=1)


class ActivationStats:
    """Sees what each layer gives to the first ``images`` of each batch, while it is entered.

    It only looks: what the net computes is the same to the last bit, and its hooks are gone when
    it is left.  A batch may come in parts, as the pair's chunks do.
    """

    def __init__(self, net: nn.Module, columns: int, mesh: Mesh, images: int) -> None:
        self.net, self.columns, self.mesh, self.images = net, columns, mesh, images
        self.activations = activations_of(net)
        own = columns if mesh.pair is None else 1
        self.tallies = {name: _Tally(own) for name in self.activations} | {LOGITS: _Tally(1)}
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Put the hooks on."""
        self.handles.append(self.net.register_forward_pre_hook(self._begin))
        for name, module in [*self.activations.items(), (LOGITS, self.net)]:
            self.handles.append(module.register_forward_hook(partial(self._see, name)))
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        while self.handles:
            self.handles.pop().remove()

    def _begin(self, *_: Any) -> None:
        for tally in self.tallies.values():
            tally.passed = 0

    @torch.no_grad()
    def _see(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        tally = self.tallies[name]
        seen = output[: max(0, self.images - tally.passed)]
        tally.passed += len(output)
        if len(seen):
            tally.add(seen)

    def result(self) -> list[Activity]:
        """Return what was seen, layer by layer, of all columns; a collective of the pair."""
        names = list(self.tallies)
        sums = torch.zeros(len(names), self.columns, 6, dtype=torch.float64)
        first = 0 if self.mesh.pair is None else self.mesh.column
        for number, (name, tally) in enumerate(self.tallies.items()):
            row = tally.row().cpu()
            if name != LOGITS:
                sums[number, first : first + len(row)] = row
            elif first == 0:  # both columns have the same
                sums[number, :1] = row
        sums = all_reduce_sum(sums.to(self.mesh.device), self.mesh.pair).cpu()
        return [
            _activity(name, None if name == LOGITS else column, sums[number, column].tolist())
            for number, name in enumerate(names)
            for column in range(1 if name == LOGITS else self.columns)
        ]


def _activity(layer: str, column: int | None, sums: Sequence[float]) -> Activity:
    count, total, squares, zeros, dead, maps = sums
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    return Activity(layer, column, mean, variance**0.5, zeros / count, dead / maps)
