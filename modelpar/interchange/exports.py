"""``modelpar-export``: a trained net as one file for other programs, with a model card beside it.

FILE.safetensors  the weights; every command that takes a checkpoint takes this file
FILE.onnx         the whole net from pixels to logits, for any number of images
FILE.pt2          the same for torch.export.load
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim

from modelpar import config
from modelpar.errors import CheckpointError, SettingsError
from modelpar.images.augment import Augmentation
from modelpar.interchange.card import card, history
from modelpar.interchange.foreign import onnx_package
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import settings_of
from modelpar.net.weights import check_state
from modelpar.settings import ExportSettings
from modelpar.training.evaluation import RUN_KEYS, TrainedNet, find, write_out
from modelpar.training.exported import METADATA, content_of

WEIGHTS: Final = (
    "safetensors; input (N, 3, S, S), red, green and blue of 0-255 minus the mean image"
)
GRAPH: Final = (
    "input `pixels` (N, 3, {0}, {0}), float32, red, green and blue of 0-255; logits (N, {1})"
)


class FromPixels(nn.Module):
    """A net for evaluation that subtracts the mean image by itself.

    Input: crops (N, 3, S, S) in float32, red, green and blue of 0-255; output (N, classes) logits.
    """

    def __init__(self, net: nn.Module, mean: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits of crops."""
        return self.net(pixels - self.get_buffer("mean"))


def export(settings: ExportSettings) -> None:
    """Write the whole net to one file, and print a line that describes it.

    Raises CheckpointError, SettingsError.
    """
    trained, out = find(settings.checkpoint), Path(settings.out)
    if settings.opset is not None and out.suffix != ".onnx":
        raise SettingsError(f"opset={settings.opset}: is for files that end in .onnx")
    weights = trained.weights(None)
    net = whole_net(trained.plan, seed=0)
    check_state(net, weights, settings.checkpoint)
    if out.suffix == ".safetensors":
        write(out, trained, weights)
        return
    if trained.statistics is None:
        raise CheckpointError(
            f"checkpoint={settings.checkpoint}: has no mean image; export its run again"
        )
    net.load_state_dict(weights)
    size = trained.plan.image_size
    lens = Augmentation(trained.statistics, size, scaled=False, device="cpu")
    module = FromPixels(net, lens.mean).eval()
    pixels = torch.zeros(2, 3, size, size)  # with one image torch would fix their number
    record = json.dumps(record_of(trained))
    content = (
        _onnx(module, pixels, record, settings.opset)
        if out.suffix == ".onnx"
        else _program(module, pixels, record)
    )
    _write(out, trained, weights, content, GRAPH.format(size, trained.plan.num_classes))


def record_of(trained: TrainedNet) -> dict[str, Any]:
    """Return what an exported file records of a net, as plain values without secrets."""
    record = {
        "plan": settings_of(trained.plan),
        "data": asdict(trained.data),
        **{key: getattr(trained, key) for key in (*RUN_KEYS, "classes")},
        **history(trained),
    }
    return config.without_secrets(record)


def write(out: Path, trained: TrainedNet, weights: Mapping[str, Tensor]) -> None:
    """Write a file that every command takes as a checkpoint; raises CheckpointError."""
    content = content_of(weights, record_of(trained), trained.statistics)
    _write(out, trained, weights, content, WEIGHTS)


def _write(
    out: Path, trained: TrainedNet, weights: Mapping[str, Tensor], content: bytes, what: str
) -> None:
    parameters = sum(value.numel() for value in weights.values())
    write_out(out, content)
    write_out(Path(f"{out}.md"), card(out, trained, parameters, what))
    name = trained.plan.recipe.name
    print(f"{out}: {len(weights)} tensors, {parameters:,} parameters, {name}")  # noqa: T201


def _program(module: nn.Module, pixels: Tensor, record: str) -> bytes:
    """Return the file of torch.export; its extra file ``modelpar`` is the record."""
    program = torch.export.export(module, (pixels,), dynamic_shapes=({0: Dim("images")},))
    content = BytesIO()
    torch.export.save(program, content, extra_files={METADATA: record})
    return content.getvalue()


def _onnx(module: nn.Module, pixels: Tensor, record: str, opset: int | None) -> bytes:
    """Return an ONNX file with the weights in it; its metadata has the record.

    Raises LaunchError if a package is missing, SettingsError for an opset that is not supported.
    """
    for package in ("onnx", "onnxscript"):
        onnx_package(package, "out")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder, "net.onnx")
        program = torch.onnx.export(
            module,
            (pixels,),
            dynamo=True,
            dynamic_shapes=({0: Dim("images")},),
            input_names=["pixels"],
            output_names=["logits"],
            opset_version=opset,
            verbose=False,
        )
        assert program is not None  # noqa: S101 - with dynamo there always is one
        found = program.model.opset_imports[""]
        if opset not in {None, found}:  # torch writes another one with a warning
            raise SettingsError(
                f"opset={opset}: not supported, torch would write opset {found}; use opset={found}"
            )
        program.model.metadata_props[METADATA] = record
        program.save(file, external_data=False)
        return file.read_bytes()


@contextmanager
def _quiet() -> Any:
    """Keep the exporter's notes and warnings off the standard streams."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
