"""Statistics of each layer's activations: size, share of zeros, dead maps (section 3.1)."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from modelpar.analysis.histograms import sample
from modelpar.distributed import Mesh, all_reduce_sum
from modelpar.net.layers import ACTIVATIONS

LOGITS: Final = "logits"
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
        elif isinstance(module, tuple(ACTIVATIONS.values())):
            group, _, key = name.rpartition(".")  # our nets have a group of them by layer
            found[key if group.endswith("activations") else layer] = module
    return found


class ActivationStats(ExitStack):
    """Context manager that collects statistics of all images that the net sees.

    Its forward hooks do not change the net's results, but our kernels are not used while they are
    there.  The net may run a batch in parts, as the pair's chunks are.  ``samples`` has about
    ``kept`` values of each part, by layer and column of this process, see ``histograms``.
    """

    def __init__(self, net: nn.Module, columns: int, mesh: Mesh, kept: int = 0) -> None:
        super().__init__()
        self.net, self.columns, self.mesh = net, columns, mesh
        self.layers = {**activations_of(net), LOGITS: net}
        # By layer, (local columns, maps, 4): number of values, their sum, squares, zeros.
        self.sums: dict[str, Tensor] = {}
        self.kept = kept
        self.samples: dict[str, list[Tensor]] = {}

    def __enter__(self) -> Self:
        """Register the hooks."""
        for name, module in self.layers.items():
            handle = module.register_forward_hook(partial(self._collect, name))
            self.callback(handle.remove)
        return self

    @torch.no_grad()
    def _collect(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        columns = 1 if name == LOGITS or self.mesh.pair is not None else self.columns
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        maps = wide.reshape(len(wide), columns, wide.shape[1] // columns, -1)
        measures = (torch.ones_like(maps), maps, maps.square(), maps == 0)
        sums = [measure.sum((0, 3), dtype=torch.float64) for measure in measures]
        self.sums[name] = self.sums.get(name, 0) + torch.stack(sums, dim=2)
        if self.kept and name != LOGITS:
            new = [sample(column, self.kept) for column in maps.unbind(1)]
            old = self.samples.get(name, [column[:0] for column in new])
            self.samples[name] = [torch.cat(both) for both in zip(old, new, strict=True)]

    def result(self) -> list[Activity]:
        """Return the statistics of all layers and columns.  Collective over the pair."""
        first, device = self.mesh.column, self.mesh.device
        total = torch.zeros(len(self.layers), self.columns, 6, dtype=torch.float64, device=device)
        for row, name in zip(total, self.layers, strict=True):
            if name == LOGITS and first:
                continue  # both columns have the same logits: count them once
            sums = self.sums[name]
            dead = (sums[:, :, 3] == sums[:, :, 0]).double()
            counts = [dead.sum(1), torch.ones_like(dead).sum(1)]
            row[first : first + len(sums)] = torch.cat([sums.sum(1), torch.stack(counts, 1)], 1)
        count, values, squares, zeros, dead, maps = all_reduce_sum(total, self.mesh.pair).unbind(2)
        mean = values / count
        std = (squares / count - mean * mean).clamp(min=0).sqrt()
        found = torch.stack([mean, std, zeros / count, dead / maps], dim=2).tolist()
        return [
            Activity(name, None if name == LOGITS else column, *measures)
            for name, columns in zip(self.layers, found, strict=True)
            for column, measures in enumerate(columns[:1] if name == LOGITS else columns)
        ]
