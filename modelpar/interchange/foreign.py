"""Weights of another program under our names, and how damaged files of it are reported."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from modelpar import errors
from modelpar.errors import CheckpointError, LaunchError
from modelpar.net import paper


@dataclass(frozen=True)
class Foreign:
    """What a file holds, as this package has it: colours are RGB, layers are called conv1 to fc8.

    ``weights``: the state dict of the whole net.  ``recipe``: the one that computes what the other
    program does; None: the file does not record it.  ``switches``: the settings of the recipe that
    the file decides.  ``mean`` (3,): the mean colour of the training; None: not recorded.
    """

    kind: str
    weights: dict[str, Tensor]
    recipe: str | None = None
    switches: dict[str, Any] = field(default_factory=dict[str, Any])
    mean: Tensor | None = None
    image_size: int = paper.IMAGE_SIZE
    bgr: bool = False  # whether a mean image that is given is in the order blue, green, red


def readable(what: str) -> AbstractContextManager[None]:
    """Turn whatever a library raises for a damaged file, or one of another kind, into one line."""
    what = f"{what}: damaged, or not what its name says"
    return errors.readable(what, "get the file again", CheckpointError)


def onnx_package(module: str, setting: str) -> Any:
    """Import and return a package of the extra ``onnx``; raises LaunchError."""
    try:
        return import_module(module)
    except ImportError as error:
        raise LaunchError(
            f"{setting}: an .onnx file requires {error.name}; run pip install 'modelpar[onnx]'"
        ) from None


def named(
    tensors: Sequence[tuple[Tensor, Tensor]], where: str, *, scaled_dropout: bool
) -> dict[str, Tensor]:
    """Return the state dict of weights and biases in the order of the layers, in float32.

    ``scaled_dropout``: the other program multiplies what dropout keeps by 1 / (1 - rate) in
    training.  Differs: we multiply by 1 - rate in evaluation, so the weights that follow dropout
    are divided by it here, without rounding.  Raises CheckpointError for another number of layers.
    """
    if len(tensors) != len(paper.LAYERS):
        raise CheckpointError(
            f"{where}: has {len(tensors)} layers with weights and biases; AlexNet has "
            f"{len(paper.LAYERS)}"
        )
    state: dict[str, Tensor] = {}
    for layer, (weight, bias) in zip(paper.LAYERS, tensors, strict=True):
        scale = 1 - paper.DROPOUT if scaled_dropout and layer in {"fc7", "fc8"} else 1
        state[f"{layer}.weight"] = (weight / scale).to(torch.float32).contiguous()
        state[f"{layer}.bias"] = bias.to(torch.float32).flatten()
    return state
