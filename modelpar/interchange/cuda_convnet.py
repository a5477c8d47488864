"""Checkpoints and ``batches.meta`` of cuda-convnet, which are pickles of Python 2.

They are read by an unpickler that makes numbers, texts, lists, tuples, dicts and NumPy arrays.  It
calls nothing else: the options of a checkpoint, objects of cuda-convnet's own classes, become
empty objects, and a file that asks for anything more is refused.

Layout (cuda-convnet2's gpumodel.py and layer.py): ``model_state`` has ``layers``, by name.  A
layer has one matrix for each of its ``inputs``: a convolution's is (maps * side * side, kernels),
with rows ordered by map, row and column; a fully connected one's is (inputs, outputs).  Names of
layers of the first column end in a, those of the second in b.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from modelpar.errors import CheckpointError
from modelpar.interchange.foreign import Foreign, named, readable
from modelpar.net import paper

OWN: Final = re.compile(r"(python_util\.)?(options|util)")  # modules of cuda-convnet
COLUMN: Final = re.compile(r"([ab])(_neuron)?$")  # how the name of a layer of a column ends


class _Empty:
    """What an object of cuda-convnet's own classes becomes."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# NumPy's names in a pickle of Python 2, and what makes these objects today.
ALLOWED: Final[dict[tuple[str, str], Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[index]
    ("numpy.core.multiarray", "scalar"): np.float32(0).__reduce__()[0],  # type: ignore[index]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("__builtin__", "set"): set,
    ("collections", "OrderedDict"): OrderedDict,
    ("__builtin__", "object"): _Empty,  # base of a new-style class
    ("copy_reg", "_reconstructor"): lambda *_: _Empty(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Callable[..., Any]:
        if OWN.fullmatch(module):
            return _Empty
        if (module, name) not in ALLOWED:
            raise CheckpointError(
                f"holds {module}.{name}, which no file of cuda-convnet needs; do not use it"
            )
        return ALLOWED[module, name]


def read_pickle(path: Path) -> Any:
    """Return what a pickle of Python 2 holds; raises CheckpointError, see above."""
    with readable(str(path)), path.open("rb") as file:
        try:
            return _Unpickler(file, encoding="latin1").load()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


def read_mean(path: Path) -> Tensor:
    """Return the mean image (3, T, T) of a ``batches.meta``, red, green, blue.

    Raises CheckpointError.
    """
    content = read_pickle(path)
    with readable(str(path)):
        values = np.asarray(content["data_mean"], dtype=np.float32).reshape(3, -1)
        side = round(values.shape[1] ** 0.5)
        return torch.from_numpy(values.reshape(3, side, side).copy())


def read_checkpoint(path: Path) -> Foreign:
    """Return the weights of a net of two columns, as run 145's; raises CheckpointError."""
    content = read_pickle(path)
    with readable(str(path)):
        layers = content["model_state"]["layers"]
        layers = layers if isinstance(layers, dict) else {one["name"]: one for one in layers}
        found = {name: one for name, one in sorted(layers.items()) if one.get("weights")}
        kinds = {one["type"] for one in layers.values()}
        stages: dict[str, list[Any]] = {layer: [] for layer in paper.LAYERS}
        for name, one in found.items():
            stages[_stage(name, one, str(path))].append((name, one))
        tensors = [
            (
                torch.cat([_weight(stage, name, one, str(path)) for name, one in parts]),
                torch.cat([torch.from_numpy(_array(one["biases"]).ravel()) for _, one in parts]),
            )
            for stage, parts in stages.items()
            if parts
        ]
    # cuda-convnet2's ``dropout`` scales in training; ``hs`` of 2012 and ``dropout2`` do not.
    weights = named(tensors, str(path), scaled_dropout="dropout" in kinds)
    norms = "across_and_within" if "rnorm" in kinds else "across"
    return Foreign("cuda-convnet checkpoint", weights, "code2012", {"norms": norms})


def _stage(name: str, layer: Any, where: str) -> str:
    """Return which of our layers a layer is part of, by its name or the shape of its matrices."""
    if layer["type"] == "conv" and (number := re.match(r"conv(\d)", name)):
        stage = f"conv{number[1]}"
    else:
        rows, columns = _array(layer["weights"][0]).shape
        units = paper.LAYERS["fc7"].outputs
        stage = "fc6" if rows != units else "fc7" if columns == units else "fc8"
        stage = stage if layer["type"] == "fc" else ""
    if stage not in paper.LAYERS:
        raise CheckpointError(f"{where}: {name} of type {layer['type']} is no layer of AlexNet")
    return stage


def _weight(stage: str, name: str, layer: Any, where: str) -> Tensor:
    """Return a layer's weights: those for the maps or units of column 0 first."""
    parts = [torch.from_numpy(_array(matrix)) for matrix in layer["weights"]]
    if len(parts) > 1:
        inputs = [str(one) for one in layer["inputs"]]
        columns = [end[1] if (end := COLUMN.search(one)) else "" for one in inputs]
        if columns not in (["a", "b"], ["b", "a"]):
            raise CheckpointError(
                f"{where}: {name} reads {', '.join(inputs)}; in a net of two columns the names "
                "of these end in a and b"
            )
        parts = parts if columns[0] == "a" else parts[::-1]
    side = paper.LAYERS[stage].kernel
    if not side:
        return torch.cat(parts).t()
    kernels = [part.view(-1, side, side, part.shape[1]) for part in parts]
    return torch.cat(kernels).permute(3, 0, 1, 2)


def _array(value: Any) -> Any:
    """Return numbers in float32, in the memory order of C; those of cuda-convnet are Fortran's."""
    return np.array(value, dtype=np.float32, order="C")
