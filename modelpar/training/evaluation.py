"""Evaluates and exports trained weights: of a run, of one of its steps, or of one file."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, DataError, SettingsError, one_line
from modelpar.files import atomic_write
from modelpar.images.augment import Augmentation, Statistics
from modelpar.images.folders import first_difference
from modelpar.images.loader import TestLoader
from modelpar.images.samples import ImageSet
from modelpar.images.sets import open_set
from modelpar.images.statistics import statistics
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import Plan, plan_of, settings_of
from modelpar.net.weights import check_state
from modelpar.settings import DataSettings, EvaluateSettings
from modelpar.training import checkpoint
from modelpar.training.checkpoint import Checkpoint
from modelpar.training.engine import Net, build, evaluate
from modelpar.training.metrics import Errors

RUN_KEYS: Final = ("step", "seed", "images_a_step")  # numbers that a manifest records of its run
METADATA: Final = "modelpar"  # of an exported file: plan, data and RUN_KEYS as JSON
NO_RECORD: Final = (SafetensorError, KeyError, TypeError, ValueError)  # if a file is no export


@dataclass(frozen=True)
class TrainedNet:
    """Weights, with what the manifest of their run or the metadata of their file records."""

    source: Checkpoint | Path
    plan: Plan
    data: DataSettings
    step: int
    seed: int
    images_a_step: int
    classes: list[str] | None  # None: of a version that did not record them

    def weights(self, column: int | None) -> dict[str, Tensor]:
        """Return a column's weights, or the whole net's for None; raises CheckpointError."""
        return checkpoint.read_part(self.source, "weights", column)


def find(path: str) -> TrainedNet:
    """Resolve RUN_DIR, STEP_DIR or FILE.safetensors; raises CheckpointError."""
    source = checkpoint.find(path)
    try:
        if isinstance(source, Checkpoint):
            record = source.manifest
        else:
            with safetensors.safe_open(source, framework="pt") as file:
                record = json.loads((file.metadata() or {})[METADATA])
        schema = OmegaConf.structured(DataSettings)
        data: Any = OmegaConf.to_object(OmegaConf.merge(schema, record["data"]))
        plan, numbers = plan_of(record["plan"]), [int(record[key]) for key in RUN_KEYS]
        return TrainedNet(source, plan, data, *numbers, classes=record.get("classes"))
    except (*NO_RECORD, OmegaConfBaseException, SettingsError) as error:
        raise CheckpointError(
            f"checkpoint={path}: does not describe the net it holds ({one_line(error)})"
        ) from None


@dataclass(frozen=True)
class Prepared:
    """What an evaluation needs before its first batch."""

    trained: TrainedNet
    images: ImageSet
    statistics: Statistics
    workers: int


def prepare(
    settings: EvaluateSettings, _run_dir: Path | None = None, *, train: bool = False
) -> Prepared:
    """Find weights, images and mean image; raises CheckpointError, SettingsError, DataError.

    ``train``: with the training images, which a run's checkpoint does not need otherwise.
    """
    trained = find(settings.checkpoint)
    if settings.columns > trained.plan.columns:
        raise SettingsError(
            f"checkpoint={settings.checkpoint}: its net has one column; use columns=1"
        )
    data = settings.data
    if not data.name:  # those of the run, with the settings that were given
        data = replace(trained.data, download=data.download, root=data.root or trained.data.root)
    plan = trained.plan
    number = plan.num_classes if data.name == "synthetic" else None  # else that of the images
    data = replace(data, image_size=plan.image_size, num_classes=number)
    cache = config.cache_dir(settings.cache_dir)
    train = train or not isinstance(trained.source, Checkpoint)  # to measure the mean image
    images = open_set(data, cache, trained.seed, trained.images_a_step, train=train)
    check_classes(images, trained, settings.checkpoint)
    if isinstance(trained.source, Checkpoint):  # the mean image that the net was trained with
        stats = Statistics(**checkpoint.read_statistics(trained.source))
        if stats.mean.shape[-1] != images.stored_size:
            raise SettingsError(
                f"data={data.name}: its images are stored at another size than those of "
                f"{trained.source.folder}; use the data it was trained on"
            )
    else:
        stats = statistics(images, cache, data.workers)
    workers = data.workers if settings.workers is None else settings.workers
    return Prepared(trained, images, stats, workers)


def check_classes(images: ImageSet, trained: TrainedNet, checkpoint: str) -> None:
    """Raise DataError where the images have other classes than the net, or another order."""
    number, ours = trained.plan.num_classes, images.class_ids
    if len(ours) != number:
        raise DataError(
            f"data={images.name}: has {len(ours)} classes, but the net of {checkpoint} has "
            f"{number}; use the classes it was trained on"
        )
    if trained.classes and (found := first_difference(ours, trained.classes)):
        label, here, there = found
        raise DataError(
            f"data={images.name}: class {label} is {here}, but {there} in {checkpoint}; "
            "use the classes it was trained on, in the same order"
        )


def loaded(settings: EvaluateSettings, trained: TrainedNet, mesh: Mesh) -> Net:
    """Return this process's part of the trained net; raises CheckpointError."""
    net = build(trained.plan, mesh, settings, seed=0)
    weights = trained.weights(mesh.column if mesh.pair is not None else None)
    check_state(net, weights, settings.checkpoint)
    net.load_state_dict(weights)
    return net.to(getattr(torch, settings.precision))


def evaluate_checkpoint(settings: EvaluateSettings, prepared: Prepared, mesh: Mesh) -> Errors:
    """Return the exact errors over all test images.  A collective of the whole mesh."""
    size, device = settings.batch_size, mesh.device
    net = loaded(settings, prepared.trained, mesh)
    images, replica = prepared.images.test, {"replica": mesh.replica, "replicas": mesh.replicas}
    batches = TestLoader(images, size, device, **replica, workers=prepared.workers)
    image_size = prepared.trained.plan.image_size
    augmentation = Augmentation(prepared.statistics, image_size, scaled=False, device=device)
    return evaluate(net, mesh, batches, augmentation, prepared.images.groups, settings.views)


def export(path: str, out: Path) -> str:
    """Write the whole net to one safetensors file; return a line that describes it.

    Raises CheckpointError.
    """
    trained = find(path)
    weights = trained.weights(None)
    check_state(whole_net(trained.plan, seed=0), weights, path)
    record = {
        "plan": settings_of(trained.plan),
        "data": config.without_secrets(asdict(trained.data)),
        **{key: getattr(trained, key) for key in (*RUN_KEYS, "classes")},
    }
    content = safetensors.torch.save(weights, {METADATA: json.dumps(record)})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, content)
    except OSError as error:
        raise CheckpointError(f"out={out}: not written ({one_line(error)})") from None
    parameters = sum(value.numel() for value in weights.values())
    return f"{out}: {len(weights)} tensors, {parameters:,} parameters, {trained.plan.recipe.name}"
