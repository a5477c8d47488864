"""Nets as other programs save them, byte by byte: Caffe's messages and pickles of Python 2."""

import struct
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

CLASSES = 2
UNITS = 16  # of fc6 and fc7 in both columns
SHAPES = {
    "conv1": (96, 3, 11, 11),
    "conv2": (256, 48, 5, 5),
    "conv3": (384, 256, 3, 3),
    "conv4": (384, 192, 3, 3),
    "conv5": (256, 192, 3, 3),
    "fc6": (UNITS, 9216),
    "fc7": (UNITS, UNITS),
    "fc8": (CLASSES, UNITS),
}
Weights = dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
Layer = tuple[str, str, list[np.ndarray[Any, Any]], bytes]  # name, type, blobs, lrn_param
NUMBERS = {"Convolution": 4, "InnerProduct": 14, "LRN": 15, "Pooling": 17, "ReLU": 18, "Data": 5}


# -- Protocol Buffers: a key (number * 8 + kind), then a number, or a length and so many bytes ----


def number(value: int) -> bytes:
    """Return a whole number, seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def integer(field: int, value: int) -> bytes:
    return number(field << 3) + number(value)


def text(field: int, content: bytes) -> bytes:
    return number(field << 3 | 2) + number(len(content)) + content


def single(field: int, value: float) -> bytes:
    return number(field << 3 | 5) + struct.pack("<f", value)


def norm(k: float | None = None, alpha: float = 1e-4) -> bytes:
    """Return an LRNParameter as the nets have it: k only where it is not Caffe's own."""
    given = b"" if k is None else single(5, k)
    return integer(1, 5) + single(2, alpha) + single(3, 0.75) + given


def blob(values: np.ndarray[Any, Any], *, old: bool) -> bytes:
    data = text(5, values.astype("<f4").tobytes())
    if old:  # four sides, missing ones are 1
        sides = (1,) * (4 - values.ndim) + values.shape
        return b"".join(integer(field, side) for field, side in enumerate(sides, 1)) + data
    return data + text(7, text(1, b"".join(map(number, values.shape))))


def caffemodel(layers: Sequence[Layer], *, old: bool) -> bytes:
    """Return a NetParameter with V1LayerParameter (``old``) or LayerParameter messages."""
    out = text(1, b"AlexNet")
    for name, kind, blobs, lrn in layers:
        parts = [blob(one, old=old) for one in blobs]
        if old:
            one = text(3, b"top") + text(4, name.encode()) + integer(5, NUMBERS[kind])
            out += text(2, one + b"".join(text(6, part) for part in parts) + text(18, lrn))
        else:
            one = text(1, name.encode()) + text(2, kind.encode()) + single(5, 1.0)
            one += b"".join(text(7, part) for part in parts)
            out += text(100, one + (text(118, lrn) if kind == "LRN" else b""))
    return out


# -- pickles -------------------------------------------------------------------------------------


def py2_pickle(value: Any) -> bytes:
    """Return ``value`` as cPickle of Python 2 wrote it, with protocol 2."""
    return b"\x80\x02" + _pickled(value) + b"."


class Options:
    """Stands for an object of cuda-convnet's module ``options``."""


def _pickled(value: Any) -> bytes:  # noqa: PLR0911 - one for each type
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("latin1")
    if isinstance(value, Mapping):
        items = b"".join(_pickled(key) + _pickled(one) for key, one in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_pickled, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_pickled, value)) + b"t"
    if isinstance(value, Options):  # of an old-style class
        return b"(coptions\nOptionsParser\no" + _pickled({"options": {"gpu": [0, 1]}}) + b"b"
    return _array(value)


def _array(value: np.ndarray[Any, Any]) -> bytes:
    turned = not value.flags.c_contiguous
    data = value.tobytes("F" if turned else "C")
    empty = b"cnumpy\nndarray\n" + _pickled((0,)) + _pickled("b")
    kind = b"cnumpy\ndtype\n(" + _pickled("f4") + _pickled(0) + _pickled(1) + b"tR("
    kind += _pickled(3) + _pickled("<") + b"NNN" + _pickled(-1) * 2 + _pickled(0) + b"tb"
    state = _pickled(1) + _pickled(value.shape) + kind + _pickled(turned)
    state += b"T" + struct.pack("<i", len(data)) + data
    return b"cnumpy.core.multiarray\n_reconstruct\n(" + empty + b"tR(" + state + b"tb"


# -- nets ----------------------------------------------------------------------------------------


@cache
def drawn_once() -> Weights:
    """Return weights that keep the scale of the maps, in the order and colours of Caffe."""
    source = np.random.default_rng(0)
    return {
        name: (
            source.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype("f4"),
            source.normal(0, 0.1, shape[0]).astype("f4"),
        )
        for name, shape in SHAPES.items()
    }


def drawn() -> Weights:
    return dict(drawn_once())


def layers_of(
    weights: Weights, kind: str, k: float | None = None, alpha: float = 1e-4
) -> list[Layer]:
    """Return the layers of bvlc_alexnet, or of ``caffenet``, in order."""
    layers: list[Layer] = [("data", "Data", [], b"")]
    for name, blobs in weights.items():
        what = "Convolution" if name.startswith("conv") else "InnerProduct"
        layers += [(name, what, list(blobs), b""), (f"relu{name[-1]}", "ReLU", [], b"")]
        after = [("LRN", norm(k, alpha)), ("Pooling", b"")]
        if name in {"conv1", "conv2"}:
            ordered = after if kind == "alexnet" else after[::-1]
        else:
            ordered = after[1:] if name == "conv5" else []
        layers += [(f"{one}{name[-1]}", one, [], lrn) for one, lrn in ordered]
    return layers


def convnet(weights: Weights, dropout: str = "hs") -> dict[str, Any]:
    """Return what a checkpoint of run 145's net holds; weights as of Caffe, colours as RGB."""
    layers: dict[str, Any] = {"rnorm1a": {"type": "cmrnorm"}, "cnorm2a": {"type": "rnorm"}}
    layers["drop"] = {"type": dropout}
    names = {"fc6": "fc2048", "fc7": "fc2048b", "fc8": "fc1000"}
    for stage, (weight, bias) in weights.items():
        both = stage in {"conv3", "fc6", "fc7", "fc8"}  # which read both columns
        columns = [""] if stage == "fc8" else ["a", "b"]
        for column, letter in enumerate(columns):
            own = np.split(weight, len(columns))[column]
            parts = np.split(own, 2, axis=1) if both else [own]
            inputs = ["one_a_neuron", "one_b_neuron"] if both else ["one"]
            if letter == "b":  # as fc2048bb of run 145
                parts, inputs = parts[::-1], inputs[::-1]
            matrices = [np.asfortranarray(part.reshape(len(part), -1).T) for part in parts]
            own_bias = np.split(bias, len(columns))[column]
            layers[names.get(stage, stage) + letter] = {
                "name": names.get(stage, stage) + letter,
                "type": stage.rstrip("12345678"),
                "inputs": inputs,
                "weights": matrices,
                "weightsInc": [np.zeros_like(one) for one in matrices],
                "biases": own_bias.reshape((-1, 1) if stage[0] == "c" else (1, -1)),
            }
    state = {"layers": layers, "epoch": 91, "batchnum": 1, "train_outputs": [([1.5], 128)]}
    return {"model_state": state, "op": Options()}
