"""One trained net, whole on one device, as figures 3 and 4 look at it."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from modelpar import device
from modelpar.analysis.activations import MEASURES, ActivationStats, Activity
from modelpar.analysis.neighbours import Figure4, evenly_spaced, features, figure4, random_subset
from modelpar.distributed import Mesh
from modelpar.images.augment import Augmentation
from modelpar.settings import EvaluateSettings, FiguresSettings
from modelpar.studies.snapshots import Kernels
from modelpar.training import evaluation
from modelpar.training.checkpoint import Checkpoint

HEAD: Final = ("layer", "column", *MEASURES)


@dataclass(frozen=True)
class Portrait:
    """What was seen of the net of one checkpoint."""

    kernels: Kernels
    activity: list[Activity]
    answers: Figure4
    classes: Sequence[str]


def portrait(settings: FiguresSettings) -> Portrait:
    """Look at the net that ``settings.checkpoint`` names, in evaluation.

    Raises CheckpointError, DataError and SettingsError as an evaluation does.
    """
    asked = EvaluateSettings(
        checkpoint=str(settings.checkpoint),
        data=settings.data,
        columns=1,
        batch_size=settings.batch_size,
        device=device.choose_device(settings.device, 1),
        workers=settings.workers,
        cache_dir=settings.cache_dir,
    )
    prepared = evaluation.prepare(asked)
    trained, images = prepared.trained, prepared.images
    mesh = Mesh(torch.device(asked.device))
    device.set_up(mesh.device, tf32=False)
    net = evaluation.loaded(asked, trained, mesh)
    lens = Augmentation(
        prepared.statistics, trained.plan.image_size, scaled=False, device=mesh.device
    )
    places = evenly_spaced(len(images.test), settings.batch_size)
    batch = torch.stack([images.test[place][0] for place in places]).to(mesh.device)
    with ActivationStats(net, trained.plan.columns, mesh, len(batch)) as watched:
        features(net, lens.center_crop(batch))
    rows = random_subset(len(images.train), settings.training_images, trained.seed)
    how = (settings.batch_size, prepared.workers)
    answers = figure4(net, mesh, images, lens, rows, *how)
    assert answers is not None  # noqa: S101 - this is column 0
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    folder = trained.source.folder if isinstance(trained.source, Checkpoint) else None
    kernels = Kernels(
        asked.checkpoint,
        trained.plan.recipe.name,
        folder,
        trained.seed,
        trained.step,
        first.weight.detach().cpu().float(),
        trained.plan.columns,
    )
    return Portrait(kernels, watched.result(), answers, images.classes)


def as_csv(activity: Sequence[Activity]) -> str:
    """Return a row for each layer of each column; the logits are no column's."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(HEAD)
    for row in activity:
        column = "" if row.column is None else row.column
        writer.writerow([row.layer, column, *(f"{getattr(row, key):.6g}" for key in MEASURES)])
    return text.getvalue()
