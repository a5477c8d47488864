"""Caffe's binary files: weights of AlexNet and CaffeNet (caffemodel), mean images (binaryproto).

Also the same nets as ONNX files, into which Caffe2 converted them for the model zoo.

Caffe's files are messages of Protocol Buffers.  Google's library parses them and checks all
lengths; tensorboard needs it anyway.  It is given only the fields that are used here, by the
numbers of ``caffe.proto``, so Caffe's own definitions and classes are not needed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from torch import Tensor

from modelpar.errors import CheckpointError
from modelpar.interchange.foreign import Foreign, named, onnx_package, readable
from modelpar.net import paper

# By message: field, its number and type, or the message that it holds.  Repeated numbers are
# packed, which is one field of bytes: declared as such, NumPy reads them without a copy.
MESSAGES: Final[dict[str, tuple[tuple[str, int, Any], ...]]] = {
    "Shape": (("dim", 1, Field.TYPE_INT64),),
    "Blob": (
        *((side, number, Field.TYPE_INT64) for number, side in enumerate("nchw", 1)),
        ("data", 5, Field.TYPE_BYTES),
        ("shape", 7, "Shape"),
        ("double_data", 8, Field.TYPE_BYTES),
    ),
    "Norm": (
        ("local_size", 1, Field.TYPE_UINT32),
        ("alpha", 2, Field.TYPE_FLOAT),
        ("beta", 3, Field.TYPE_FLOAT),
        ("norm_region", 4, Field.TYPE_INT32),
        ("k", 5, Field.TYPE_FLOAT),
    ),
    "Layer": (("type", 2, Field.TYPE_STRING), ("blobs", 7, "Blob"), ("lrn_param", 118, "Norm")),
    "OldLayer": (("type", 5, Field.TYPE_INT32), ("blobs", 6, "Blob"), ("lrn_param", 18, "Norm")),
    "Net": (("layers", 2, "OldLayer"), ("layer", 100, "Layer")),
}
REPEATED: Final = {"dim", "data", "double_data", "blobs", "layers", "layer"}
DEFAULTS: Final = {"local_size": "5", "alpha": "1", "beta": "0.75", "k": "1"}  # caffe.proto
NORM, POOL = "LRN", "Pooling"
OLD_TYPES: Final = {15: NORM, 17: POOL}  # V1LayerParameter.LayerType
# What the normalizations read, by the order of them and of the pools.
ORDERS: Final[dict[tuple[str, ...], str]] = {
    (NORM, POOL, NORM, POOL, POOL): "rectified",  # bvlc_alexnet
    (POOL, NORM, POOL, NORM, POOL): "pooled",  # bvlc_reference_caffenet
}
IMAGE_SIZE: Final = 227  # crop_size of both nets
MEAN: Final = (123.0, 117.0, 104.0)  # mean_value of Caffe's examples, here red, green, blue


def _message(name: str) -> Any:
    """Return the class of a message of MESSAGES."""
    file = FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for message, rows in MESSAGES.items():
        fields = file.message_type.add(name=message)
        for field, number, kind in rows:
            label = Field.LABEL_REPEATED if field in REPEATED else Field.LABEL_OPTIONAL
            entry = fields.field.add(name=field, number=number, label=label)
            if field in DEFAULTS:
                entry.default_value = DEFAULTS[field]
            if isinstance(kind, str):
                entry.type, entry.type_name = Field.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                entry.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}"))


def _parse(name: str, path: Path) -> Any:
    with readable(str(path)):
        return _message(name).FromString(path.read_bytes())


def _numbers(blob: Any, where: str) -> Tensor:
    """Return a blob; leading sides of 1, which old files have, are left out."""
    shape = list(blob.shape.dim) if blob.HasField("shape") else [blob.n, blob.c, blob.h, blob.w]
    wide = bool(blob.double_data)
    content = b"".join(blob.double_data if wide else blob.data)
    size = 8 if wide else 4
    if min(shape, default=1) < 1 or math.prod(shape) * size != len(content):
        raise CheckpointError(
            f"{where}: a blob of shape {tuple(shape)} has {len(content) / size:g} numbers; the "
            "file is damaged, or has no weights"
        )
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    values = np.frombuffer(content, "<f8" if wide else "<f4").astype(np.float32)
    return torch.from_numpy(values).view(shape)


def read_caffemodel(path: Path) -> Foreign:
    """Return the weights of Caffe's AlexNet or CaffeNet, in either form of its messages.

    Raises CheckpointError.
    """
    net = _parse("Net", path)
    layers = [*net.layers, *net.layer]
    kinds: list[Any] = [OLD_TYPES.get(layer.type, layer.type) for layer in layers]
    blobs = [
        [_numbers(blob, str(path)) for blob in layer.blobs] for layer in layers if layer.blobs
    ]
    pairs = [(one[0], one[1]) for one in blobs if len(one) == 2]  # noqa: PLR2004 - with its bias
    norms = [layer.lrn_param for layer, kind in zip(layers, kinds, strict=True) if kind == NORM]
    return _net(path, "caffemodel", pairs, kinds, norms)


def read_onnx(path: Path) -> Foreign:
    """Return the weights of one of these nets that Caffe2 wrote as ONNX, as in the model zoo.

    Raises CheckpointError, LaunchError.
    """
    onnx = onnx_package("onnx", "source")
    with readable(str(path)):
        graph = onnx.load(path).graph
        arrays = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
        kinds, pairs, norms = list[str](), list[tuple[Tensor, Tensor]](), list[Any]()
        for node in graph.node:
            given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            kinds.append(POOL if node.op_type == "MaxPool" else node.op_type)
            if node.op_type == NORM:
                defaults = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0}  # ONNX's operators, LRN
                norm = {**defaults, **given, "norm_region": 0}
                norms.append(SimpleNamespace(**norm, local_size=norm["size"], k=norm["bias"]))
            if node.op_type in {"Conv", "Gemm"}:
                weight, bias = (torch.tensor(arrays[name]) for name in node.input[1:3])
                turned = node.op_type == "Gemm" and not given.get("transB", 0)
                pairs.append((weight.t() if turned else weight, bias))
    return _net(path, "ONNX file", pairs, kinds, norms)


def _net(
    path: Path,
    kind: str,
    pairs: Sequence[tuple[Tensor, Tensor]],
    kinds: Sequence[str],
    norms: Sequence[Any],
) -> Foreign:
    """Return a net of Caffe from its weights and biases, and from the kinds of all its layers."""
    weights = named(pairs, str(path), scaled_dropout=True)
    order = tuple(one for one in kinds if one in {NORM, POOL})
    if order not in ORDERS:
        raise CheckpointError(
            f"{path}: its normalizations and pools are in the order {', '.join(order) or 'none'}, "
            "which is that of neither AlexNet nor CaffeNet"
        )
    first, reads = weights["conv1.weight"], ORDERS[order]
    if first.dim() > 1:  # it reads blue, green and red
        weights["conv1.weight"] = first.flip(1)
    switches = {"norm1_input": reads, "norm2_input": reads, "norm_k": _norm_k(norms, str(path))}
    switches |= {"norms": "across_both", "norm_alpha": "per_window"}
    mean = torch.tensor(MEAN)
    return Foreign(kind, weights, "caffe", switches, mean, IMAGE_SIZE, bgr=True)


def _norm_k(norms: Sequence[Any], where: str) -> float:
    """Return k of the normalizations; raises CheckpointError if the rest is not the paper's."""
    found = {(one.local_size, f"{one.alpha:g}", one.beta, one.norm_region, one.k) for one in norms}
    size, alpha, beta, region, k = next(iter(found))
    usual = (paper.NORM_SIZE, f"{paper.NORM_ALPHA:g}", paper.NORM_BETA, 0)
    if len(found) > 1 or (size, alpha, beta, region) != usual:
        raise CheckpointError(
            f"{where}: its response normalization differs from the paper's (size {size}, "
            f"alpha {alpha}, beta {beta:g}, k {k:g})"
        )
    return k


def read_binaryproto(path: Path) -> Tensor:
    """Return a mean image (3, T, T) as it is, in the order blue, green, red.

    Raises CheckpointError.
    """
    return _numbers(_parse("Blob", path), str(path))
