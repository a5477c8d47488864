"""``modelpar-export``: a trained net as one file for other programs, with a model card beside it.

FILE.safetensors  the weights; every command that takes a checkpoint takes this file
FILE.onnx         the whole net from pixels to logits, for any number of images
FILE.pt2          the same for torch.export.load
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim

from modelpar import config
from modelpar.errors import CheckpointError, SettingsError
from modelpar.files import write_out
from modelpar.images.augment import Augmentation
from modelpar.interchange.card import card, history
from modelpar.interchange.foreign import onnx_package
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import settings_of
from modelpar.net.weights import check_state
from modelpar.schemas import ExportSettings
from modelpar.training.exported import METADATA, content_of
from modelpar.training.trained import RUN_KEYS, TrainedNet, find, paths_of

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
    nets = [find(path, ema=settings.ema) for path in paths_of(settings.checkpoint)]
    out = settings.out
    trained = max(nets, key=attrgetter("step"))
    if settings.opset is not None and not out.endswith(".onnx"):
        raise SettingsError(
            f"opset={settings.opset}: applies only to files that end in .onnx; leave it out"
        )
    weights = mean_weights(nets)
    if out.endswith(".safetensors"):
        write(out, trained, weights, len(nets))
        return
    if trained.statistics is None:
        raise CheckpointError(
            f"checkpoint={trained.path}: has no mean image; export its run again, or "
            "convert it with mean=FILE"
        )
    net = whole_net(trained.plan, seed=0)
    net.load_state_dict(weights)
    size = trained.plan.image_size
    augmentation = Augmentation(trained.statistics, size, scaled=False, device="cpu")
    module = FromPixels(net, augmentation.mean).eval()
    pixels = torch.zeros(2, 3, size, size)  # with one image torch would fix their number
    record = json.dumps(record_of(trained, len(nets)))
    content = (
        _onnx(module, pixels, record, settings.opset)
        if out.endswith(".onnx")
        else _program(module, pixels, record)
    )
    what = GRAPH.format(size, trained.plan.num_classes)
    _write(out, trained, weights, content, what, len(nets))


def mean_weights(nets: Sequence[TrainedNet]) -> dict[str, Tensor]:
    """Return the mean of the whole net's weights over steps of one training, in their dtype.

    Differs: paper and code average the predictions of several nets.  Raises CheckpointError,
    SettingsError.
    """
    first, *others = nets
    seen = {first.step}
    for other in others:
        fix = "average the steps of one training, or predictions with modelpar-evaluate"
        for key in ("plan", "seed", "images_a_step", "classes"):
            if getattr(other, key) != getattr(first, key):
                what = {"plan": "net", "images_a_step": "images per step"}.get(key, key)
                raise SettingsError(
                    f"checkpoint={other.path}: differs in its {what} from {first.path}; {fix}"
                )
        if other.step in seen:
            raise SettingsError(
                f"checkpoint={other.path}: step {other.step} is given twice; {fix}"
            )
        seen.add(other.step)
    if others and first.plan.norm == "batch":
        raise SettingsError(
            f"checkpoint={first.path}: averaged weights would need other statistics than those of "
            "model.norm=batch; use one checkpoint"
        )
    whole, sums, weights = whole_net(first.plan, seed=0), dict[str, Tensor](), dict[str, Tensor]()
    for one in nets:
        weights = one.weights(None)
        check_state(whole, weights, one.path)
        for name, weight in weights.items():
            sums[name] = sums.get(name, 0) + weight.double()
    return {name: (sums[name] / len(nets)).to(weight.dtype) for name, weight in weights.items()}


def record_of(trained: TrainedNet, checkpoints: int) -> dict[str, Any]:
    """Return what an exported file records of a net, as plain values without secrets.

    ``checkpoints``: how many the weights are the mean of.
    """
    record = {
        "plan": settings_of(trained.plan),
        "data": asdict(trained.data),
        **{key: getattr(trained, key) for key in (*RUN_KEYS, "classes", "names")},
        **history(trained, checkpoints),
    }
    return config.without_secrets(record)


def write(
    out: str, trained: TrainedNet, weights: Mapping[str, Tensor], checkpoints: int = 1
) -> None:
    """Write a file that every command takes as a checkpoint; raises CheckpointError."""
    content = content_of(weights, record_of(trained, checkpoints), trained.statistics)
    _write(out, trained, weights, content, WEIGHTS, checkpoints)


def _write(
    out: str,
    trained: TrainedNet,
    weights: Mapping[str, Tensor],
    content: bytes,
    what: str,
    checkpoints: int,
) -> None:
    parameters = sum(value.numel() for value in weights.values())
    write_out(out, content)
    mean = f"mean of {checkpoints} checkpoints" if checkpoints > 1 else ""
    write_out(f"{out}.md", card(out, trained, parameters, what, checkpoints))
    about = ", ".join(filter(None, [trained.plan.recipe.name, mean]))
    print(f"{out}: {len(weights)} tensors, {parameters:,} parameters, {about}")  # noqa: T201


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
