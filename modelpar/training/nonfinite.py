"""Where a number that is not finite came from: the same step once more, every layer watched."""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modelpar.images.loader import Batch
from modelpar.training.engine import Learner

COPIES: Final = ("clone", "_to_copy", "contiguous")


def first_nonfinite(learner: Learner, batch: Batch, step: int, loss: Tensor) -> str:
    """Say which layer is the first that is not finite in this step, whose update was not made.

    Forward in the order of the layers, over both columns; then, where only gradients are not
    finite, backward.  A collective of the whole mesh; the same on every process.
    """
    forward = _forward(learner, batch, step)  # all take part, whatever each has found
    own = _weights(learner.net) or forward or _backward(learner.net)
    where = f" in column {learner.mesh.column}" if learner.mesh.columns > 1 else ""
    told = learner.mesh.gather_text(f"{own}{where}" if own else "")
    found = min(filter(None, told), default="99 the loss")
    return f"the loss is {loss.item():.4g}, first {found.partition(' ')[2]}"


def _layers(net: nn.Module) -> list[str]:
    """Return the names of the layers that have weights, in the order of forward."""
    return list(dict.fromkeys(_layer(key) for key, _ in net.named_parameters()))


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _weights(net: nn.Module) -> str:
    for key, weight in net.named_parameters():
        if not weight.isfinite().all():
            return f"{_layers(net).index(_layer(key)):02d} {key} is not finite"
    return ""


def _forward(learner: Learner, batch: Batch, step: int) -> str:
    # Compiled blocks are one call to a dispatch mode: they run as they are written.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _Layers(learner.net) as seen:
        learner.logits(batch, step)
    return seen.found


def _backward(net: nn.Module) -> str:
    """Name the last layer whose gradient is not finite: backward passes it first."""
    for number, name in enumerate(reversed(_layers(net))):
        for kind in ("weight", "bias"):
            weight = getattr(net.get_submodule(name), kind)
            if weight is not None and weight.grad is not None and not _finite(weight.grad):
                return f"{50 + number:02d} the gradient of {name}.{kind} is not finite"
    return ""


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


class _Layers(TorchDispatchMode):
    """Sees each operation that takes a weight, and what it reads and gives."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.found = ""
        self.order = _layers(net)
        self.owners = {
            weight.untyped_storage().data_ptr(): _layer(key)
            for key, weight in net.named_parameters()
        }
        self.held: list[Tensor] = []  # copies of weights: their memory is not given to others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        tensors = list(_tensors(args))
        owner = next((name for one in tensors if (name := self._owner(one))), None)
        if owner is None or self.found or not isinstance(out, torch.Tensor):
            return out
        if func.overloadpacket.__name__ in COPIES:
            self.held.append(out)
            self.owners[out.untyped_storage().data_ptr()] = owner
        elif not func.is_view and not all(
            _finite(one) for one in tensors if not self._owner(one) and one.is_floating_point()
        ):
            self.found = f"{self.order.index(owner):02d} what {owner} reads is not finite"
        elif not func.is_view and not _finite(out):
            self.found = f"{self.order.index(owner):02d} what {owner} gives is not finite"
        return out

    def _owner(self, tensor: Tensor) -> str | None:
        return self.owners.get(tensor.untyped_storage().data_ptr())


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
