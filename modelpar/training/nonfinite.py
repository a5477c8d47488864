"""Where a NaN or an infinity came from: the step is computed again with hooks on the layers."""

from functools import partial
from operator import itemgetter

from torch import Tensor, nn

from modelpar.analysis.activations import activations_of
from modelpar.images.loader import Batch
from modelpar.training.engine import Learner


def first_nonfinite(learner: Learner, batch: Batch, step: int) -> str:
    """Recompute the step without its update; return the first layer with a non-finite value.

    Layers are searched in the order of forward over both columns.  If only gradients are not
    finite they are searched in the order of backward.  A collective of the world: the layer is the
    same on every rank, the loss is that of the replica.
    """
    net, mesh = learner.net, learner.mesh
    weights = dict(net.named_parameters())
    place_of = {name: number for number, name in enumerate(map(_layer, weights))}
    outputs: list[str] = []  # layers whose output is not finite before or after activation

    def look(layer: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not all(map(_finite, (*inputs, output))):
            outputs.append(layer)

    activations = activations_of(net).items()
    hooks = [module.register_forward_hook(partial(look, layer)) for layer, module in activations]
    loss = learner.gradients(batch, step)
    if not _finite(learner.last_logits):
        outputs.append(list(place_of)[-1])
    for hook in hooks:
        hook.remove()
    found = [(-1, "the images")] if not _finite(batch.images) else []
    found += [(place_of[_layer(name)], name) for name in weights if not _finite(weights[name])]
    found += [(place_of[layer], f"output of {layer}") for layer in outputs]
    found += [
        (2 * len(weights) - place_of[_layer(name)], f"gradient of {name}")
        for name, weight in weights.items()
        if weight.grad is not None and not _finite(weight.grad)
    ]
    total = "norm of all gradients" if _finite(loss) else "loss"
    place, what = min(found, default=(3 * len(weights), total))
    column = f" in column {mesh.column}" if mesh.columns > 1 else ""
    _, first = min(mesh.gather_objects((place, what + column)), key=itemgetter(0))
    return f"loss is {loss.item():.4g}; first non-finite value: {first}"


def _layer(name: str) -> str:
    """Return the layer of a parameter: fc6 of fc6.weight."""
    return name.rpartition(".")[0]


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
