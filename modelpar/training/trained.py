"""A trained net as it was saved: by a run, in one of its steps, or as one exported file."""

import base64
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor

from modelpar import config
from modelpar.errors import CheckpointError, SettingsError, one_line
from modelpar.files import write_out
from modelpar.groups import DataSettings
from modelpar.images.augment import Statistics
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import Plan, plan_of, settings_of
from modelpar.net.weights import check_state
from modelpar.schemas import ExportSettings
from modelpar.training import checkpoint
from modelpar.training.checkpoint import Checkpoint

RUN_KEYS: Final = ("step", "seed", "images_a_step")  # numbers that a manifest records of its run
METADATA: Final = "modelpar"  # of an exported file: plan, data, classes and RUN_KEYS as JSON
MEAN: Final = "modelpar.statistics"  # its mean image and colours, safetensors in base64
NO_RECORD: Final = (SafetensorError, KeyError, TypeError, ValueError)  # if a file is no export


@dataclass(frozen=True)
class TrainedNet:
    """Weights, with what the manifest of their run or the metadata of their file records."""

    path: str  # as the settings name it
    source: Checkpoint | Path
    plan: Plan
    data: DataSettings
    step: int
    seed: int
    images_a_step: int
    classes: list[str] | None  # None: of a version that did not record them
    names: list[str]  # of the classes, for people; numbers if none are recorded

    def statistics(self) -> Statistics | None:
        """Return the mean image it was trained with; None: a file of a version without it.

        Raises CheckpointError.
        """
        if isinstance(self.source, Checkpoint):
            return Statistics(**checkpoint.read_statistics(self.source))
        with _described(self.path):
            content = base64.b64decode(_metadata(self.source).get(MEAN, ""), validate=True)
            if not content:
                return None
            found = Statistics(**safetensors.torch.load(content))
            side = found.mean.shape[-1]
            if found.mean.shape != (3, side, side) or side < self.plan.image_size:
                raise ValueError(f"mean image of shape {tuple(found.mean.shape)}")
            return found

    def weights(self, column: int | None) -> dict[str, Tensor]:
        """Return a column's weights, or the whole net's for None; raises CheckpointError."""
        return checkpoint.read_part(self.source, "weights", column)


@contextmanager
def _described(path: str) -> Generator[None]:
    """Raise CheckpointError for what a record lacks or has wrong."""
    try:
        yield
    except (*NO_RECORD, OmegaConfBaseException, SettingsError) as error:
        raise CheckpointError(
            f"checkpoint={path}: does not describe the net it holds ({one_line(error)})"
        ) from None


def _metadata(file: Path) -> dict[str, str]:
    with safetensors.safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def find(path: str) -> TrainedNet:
    """Resolve RUN_DIR, STEP_DIR or FILE.safetensors; raises CheckpointError."""
    source = checkpoint.find(path)
    with _described(path):
        if isinstance(source, Checkpoint):
            record = source.manifest
        else:
            record = json.loads(_metadata(source)[METADATA])
        schema = OmegaConf.structured(DataSettings)
        data: Any = OmegaConf.to_object(OmegaConf.merge(schema, record["data"]))
        plan, numbers = plan_of(record["plan"]), [int(record[key]) for key in RUN_KEYS]
        classes = record.get("classes")
        names = record.get("names") or classes or range(plan.num_classes)
        if len(names) != plan.num_classes:
            raise ValueError(f"{len(names)} names of {plan.num_classes} classes")
        names = [str(name) for name in names]
        return TrainedNet(path, source, plan, data, *numbers, classes=classes, names=names)


def export(settings: ExportSettings) -> None:
    """Write the whole net to one safetensors file, and print a line that describes it.

    Raises CheckpointError.
    """
    trained, out = find(settings.checkpoint), settings.out
    weights = trained.weights(None)
    check_state(whole_net(trained.plan, seed=0), weights, settings.checkpoint)
    record = {
        "plan": settings_of(trained.plan),
        "data": config.without_secrets(asdict(trained.data)),
        **{key: getattr(trained, key) for key in (*RUN_KEYS, "classes", "names")},
    }
    metadata = {METADATA: json.dumps(record)}
    if stats := trained.statistics():
        metadata[MEAN] = base64.b64encode(safetensors.torch.save(vars(stats))).decode()
    content = safetensors.torch.save(weights, metadata)
    write_out(out, content)
    parameters = sum(value.numel() for value in weights.values())
    name = trained.plan.recipe.name
    print(f"{out}: {len(weights)} tensors, {parameters:,} parameters, {name}")  # noqa: T201
