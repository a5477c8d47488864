"""The figures in numbers: conv1's kernels over runs, and what one trained net computes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from modelpar import device, tables
from modelpar.analysis import kernels, neighbours
from modelpar.analysis.activations import ActivationStats, Activity
from modelpar.analysis.kernels import Specialisation, specialisation
from modelpar.distributed import Mesh
from modelpar.images.augment import Augmentation
from modelpar.net.plan import plan_of
from modelpar.schemas import FiguresSettings
from modelpar.settings import EvaluateSettings
from modelpar.studies.runs import GOAL, Run
from modelpar.training import checkpoint, evaluation
from modelpar.training.checkpoint import Checkpoint

CURVE_HEAD: Final = (
    "run", "activation", "learning rate", "seed", "epochs", f"epochs to {GOAL:g} % error",
)  # fmt: skip
CURVE_CAPTION: Final = (
    "In figure 1 of the paper tanh needs six times as many epochs as ReLU, on CIFAR-10."
)
HEAD: Final = (
    "run", "seed", "step", "column", "kernels", "colour_share", "colour_share_std",
    "colour_kernels", "frequency", "frequency_std",
)  # fmt: skip
CAPTION: Final = (
    f"Colour share: the share of a kernel's energy that is not grey, {kernels.RANDOM_SHARE:.2f} "
    f"for random kernels; colour kernels: those over {kernels.COLOUR_SHARE:g}; frequency in "
    "cycles per pixel. Mean and standard deviation over a column's kernels."
)


@dataclass(frozen=True)
class Kernels:
    """The kernels of conv1 in one checkpoint by column, and where they come from."""

    name: str
    folder: Path | None  # of the step; None: an exported file
    seed: int
    step: int
    columns: list[Specialisation]


@dataclass(frozen=True)
class Snapshot:
    """What one trained net holds and computes: kernels, activations, figure 4."""

    kernels: Kernels
    activity: list[Activity]
    figure4: neighbours.Figure4
    classes: Sequence[str]


def all_kernels(snapshot: Snapshot | None, runs: Sequence[Run]) -> list[Kernels]:
    """Return the kernels of the snapshot and of each run's newest checkpoint, each step once.

    Raises CheckpointError for a damaged checkpoint.
    """
    found: list[Kernels] = []
    for run in runs:
        if saved := checkpoint.newest(run.folder):
            columns = plan_of(saved.manifest["plan"]).columns
            parts = specialisation(checkpoint.read_conv1(saved), columns)
            folder = saved.folder.resolve()
            found.append(Kernels(str(run.folder), folder, run.seed, saved.step, parts))
    if snapshot and snapshot.kernels.folder not in {one.folder for one in found}:
        found.insert(0, snapshot.kernels)
    return found


def of_checkpoint(settings: FiguresSettings) -> Snapshot:
    """Load the net that ``settings.checkpoint`` names, and look at it in evaluation mode.

    Raises CheckpointError, DataError and SettingsError as an evaluation does.
    """
    shared = ("data", "batch_size", "workers", "cache_dir")
    same: Any = {key: getattr(settings, key) for key in shared}
    kind = device.choose_device(settings.device, 1)
    request = EvaluateSettings(checkpoint=str(settings.checkpoint), columns=1, device=kind, **same)
    prepared = evaluation.prepare_one(request, request.checkpoint, train=True)
    trained, images = prepared.trained, prepared.images
    plan, place = trained.plan, device.set_up(kind)
    net = evaluation.loaded(request, trained, Mesh(place)).eval()
    crops = Augmentation(prepared.statistics, plan.image_size, scaled=False, device=place)
    shown = neighbours.evenly_spaced(len(images.test), settings.batch_size)
    batch = torch.stack([images.test[row][0] for row in shown]).to(place)
    with ActivationStats(net, plan.columns, Mesh(place)) as stats:
        neighbours.features(net, crops.center_crop(batch))
    rows = neighbours.random_subset(len(images.train), settings.training_images, trained.seed)
    figure4 = neighbours.figure4(net, images, crops, rows, settings.batch_size, prepared.workers)
    source = trained.source
    folder = source.folder.resolve() if isinstance(source, Checkpoint) else None
    conv1 = next(weight for weight in net.parameters() if weight.dim() > 1).detach().cpu().float()
    parts = specialisation(conv1, plan.columns)
    found = Kernels(request.checkpoint, folder, trained.seed, trained.step, parts)
    return Snapshot(found, stats.result(), figure4, images.classes)


def kernel_rows(sources: Sequence[Kernels]) -> Iterator[list[str]]:
    """Yield a row of ``HEAD`` for each column of each checkpoint."""
    for one in sources:
        for number, column in enumerate(one.columns):
            share, cycles = (
                [f"{values.mean():.4f}", f"{values.std():.4f}"]
                for values in (column.colour_share, column.frequency)
            )
            about = [one.name, one.seed, one.step, number, len(column.frequency)]
            yield [*map(str, about), *share, str(column.colour_kernels), *cycles]


def report(sources: Sequence[Kernels], runs: Sequence[Run]) -> str:
    """Return what is printed: the tables of figures 3 and 1, and which ``runs`` they lack."""
    lines = [tables.markdown(HEAD, kernel_rows(sources)), "", CAPTION] if sources else []
    shown = {one.name for one in sources}
    missing = [run.folder for run in runs if str(run.folder) not in shown]
    lines += [f"{folder}: not in figure 3, it has no checkpoint yet" for folder in missing]
    rows: list[list[str]] = []
    for run in (run for run in runs if run.training):
        rate, time = f"{run.settings['recipe']['lr']:g}", run.epochs_to_goal()
        reached = "not reached" if time is None else f"{time:.2f}"
        cells = (run.folder, run.activation, rate, run.seed, len(run.curve()), reached)
        rows.append([str(cell) for cell in cells])
    lines += ["", tables.markdown(CURVE_HEAD, rows), "", CURVE_CAPTION] if rows else []
    missing = [run.folder for run in runs if not run.training]
    lines += [f"{folder}: not in figure 1, it has no training errors" for folder in missing]
    return "\n".join(lines)
