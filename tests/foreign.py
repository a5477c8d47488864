"""Files of other programs, written byte by byte: Caffe's messages and pickles of Python 2."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
