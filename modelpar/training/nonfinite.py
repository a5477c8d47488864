"""Where a NaN or an infinity came from: the step is computed again with hooks on the layers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.analysis.activations import activations_of
from modelpar.images.loader import Batch
from modelpar.training.engine import Learner


def first_nonfinite(learner: Learner, batch: Batch, step: int, loss: Tensor) -> str:
    """Return which layer has the first value that is not finite; its update must not be made.

    Layers are searched in the order of forward over both columns.  If only gradients are not
    finite they are searched in the order of backward.  A collective of the world, the same on
    every rank.
    """
    net, mesh = learner.net, learner.mesh
    weights = dict(net.named_parameters())
    place_of = {name: number for number, name in enumerate(map(_layer, weights))}
    bad_layers = _layers_not_finite(learner, batch, step)  # all ranks compute it again
    found = [(-1, "the images")] if not _finite(batch.images) else []
    found += [(place_of[_layer(name)], name) for name in weights if not _finite(weights[name])]
    found += [(place_of[layer], f"the output of {layer}") for layer in bad_layers]
    found += [
        (2 * len(weights) - place_of[_layer(name)], f"the gradient of {name}")
        for name, weight in weights.items()
        if weight.grad is not None and not _finite(weight.grad)
    ]
    place, what = min(found, default=(3 * len(weights), "the loss"))
    column = f" in column {mesh.column}" if mesh.columns > 1 else ""
    places = [one for (one,) in mesh.gather_ints((place,))]
    whats = mesh.gather_text(what + column)
    return f"the loss is {loss.item():.4g}; first not finite: {whats[places.index(min(places))]}"


@torch.no_grad()
def _layers_not_finite(learner: Learner, batch: Batch, step: int) -> list[str]:
    """Repeat forward; return the layers whose output is not finite before or after activation."""
    activations = activations_of(learner.net)
    last = [_layer(name) for name, _ in learner.net.named_parameters()][-1]
    found: list[str] = []

    def look(layer: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not all(map(_finite, (*inputs, output))):
            found.append(layer)

    hooks: list[Any] = [
        module.register_forward_hook(partial(look, layer)) for layer, module in activations.items()
    ]
    logits = learner.logits(batch, step)
    for hook in hooks:
        hook.remove()
    return found if _finite(logits) else [*found, last]


def _layer(name: str) -> str:
    """Return the layer of a parameter: fc6 of fc6.weight."""
    return name.rpartition(".")[0]


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
