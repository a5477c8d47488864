"""Figures 3 and 4 in numbers: conv1's kernels over runs, and what one trained net computes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from modelpar import device, tables
from modelpar.analysis import kernels, neighbours
from modelpar.analysis.activations import MEASURES, ActivationStats, Activity
from modelpar.analysis.kernels import Specialisation, colour_difference, specialisation
from modelpar.distributed import Mesh
from modelpar.images.augment import Augmentation
from modelpar.net.plan import plan_of
from modelpar.settings import EvaluateSettings, FiguresSettings
from modelpar.studies.runs import Run
from modelpar.tables import mean_std
from modelpar.training import checkpoint, evaluation
from modelpar.training.checkpoint import Checkpoint

HEAD: Final = (
    "run", "seed", "step", "column", "kernels", "colour_share", "colour_share_std",
    "colour_kernels", "frequency", "frequency_std",
)  # fmt: skip
CAPTION: Final = (
    f"Colour share: the share of a kernel's energy that is not grey, {kernels.RANDOM_SHARE:.2f} "
    f"for random kernels; colour kernels: those over {kernels.COLOUR_SHARE:g}; frequency in "
    "cycles per pixel. Mean and standard deviation over a column's kernels."
)

SAME: Final = ("data", "batch_size", "workers", "cache_dir")  # settings as in an evaluation


@dataclass(frozen=True)
class Kernels:
    """The kernels (C, 3, K, K) of conv1 in one checkpoint, and where they come from."""

    name: str
    label: str  # the same for all seeds of an experiment
    folder: Path | None  # of the step; None: an exported file
    seed: int
    step: int
    weight: Tensor
    columns: int

    @cached_property
    def found(self) -> list[Specialisation]:
        """Colour shares and frequencies of each column's kernels."""
        return specialisation(self.weight, self.columns)


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
            columns, weight = plan_of(saved.manifest["plan"]).columns, checkpoint.read_conv1(saved)
            folder = saved.folder.resolve()
            found.append(
                Kernels(str(run.folder), run.label, folder, run.seed, saved.step, weight, columns)
            )
    if snapshot and snapshot.kernels.folder not in {one.folder for one in found}:
        found.insert(0, snapshot.kernels)
    return found


def of_checkpoint(settings: FiguresSettings) -> Snapshot:
    """Load the net that ``settings.checkpoint`` names, and look at it in evaluation mode.

    Raises CheckpointError, DataError and SettingsError as an evaluation does.
    """
    same: Any = {key: getattr(settings, key) for key in SAME}
    kind = device.choose_device(settings.device, 1)
    request = EvaluateSettings(checkpoint=str(settings.checkpoint), columns=1, device=kind, **same)
    prepared = evaluation.prepare(request)
    trained, images = prepared.trained, prepared.images
    mesh = Mesh(device.torch_device(request.device, 0))
    device.set_up(mesh.device, tf32=False)
    net = evaluation.loaded(request, trained, mesh)
    augmentation = Augmentation(
        prepared.statistics, trained.plan.image_size, scaled=False, device=mesh.device
    )
    places = neighbours.evenly_spaced(len(images.test), settings.batch_size)
    batch = torch.stack([images.test[place][0] for place in places]).to(mesh.device)
    with ActivationStats(net, trained.plan.columns, mesh, len(batch)) as stats:
        neighbours.features(net, augmentation.center_crop(batch))
    rows = neighbours.random_subset(len(images.train), settings.training_images, trained.seed)
    figure4 = neighbours.figure4(
        net, mesh, images, augmentation, rows, settings.batch_size, prepared.workers
    )
    assert figure4 is not None  # noqa: S101 - only other columns get None
    source, label = trained.source, trained.plan.recipe.name
    folder = source.folder.resolve() if isinstance(source, Checkpoint) else None
    weight = next(weight for weight in net.parameters() if weight.dim() > 1).detach().cpu().float()
    found = Kernels(
        request.checkpoint, label, folder, trained.seed, trained.step, weight, trained.plan.columns
    )
    return Snapshot(found, stats.result(), figure4, images.classes)


def kernel_rows(sources: Sequence[Kernels]) -> Iterator[list[str]]:
    """Yield a row of ``HEAD`` for each column of each checkpoint."""
    for one in sources:
        for number, column in enumerate(one.found):
            share, cycles = (
                [f"{values.mean():.4f}", f"{values.std():.4f}"]
                for values in (column.colour_share, column.frequency)
            )
            about = [one.name, one.seed, one.step, number, len(column.frequency)]
            yield [*map(str, about), *share, str(column.colour_kernels), *cycles]


def differences(sources: Sequence[Kernels]) -> Iterator[str]:
    """Yield for each experiment how much the columns differ, over its runs or in its only one."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for one in sources:
        if difference := colour_difference(one.found):
            groups.setdefault(one.label, []).append(difference)
    for label, found in groups.items():
        sizes, (mean, error) = [abs(mean) for mean, _ in found], found[0]
        text = f"{mean:+.2f} ± {error:.2f} (column 0 minus column 1 ± standard error)"
        if len(found) > 1:
            text = f"{mean_std(sizes)} over {len(found)} runs, whichever column has the colours"
        yield f"{label}: the colour shares of the columns differ by {text}"


def report(sources: Sequence[Kernels], runs: Sequence[Run]) -> str:
    """Return what is printed: the table, the columns' differences, which ``runs`` are missing."""
    lines = [tables.markdown(HEAD, kernel_rows(sources)), "", *differences(sources), CAPTION]
    shown = {one.name for one in sources}
    missing = [str(run.folder) for run in runs if str(run.folder) not in shown]
    absent = [f"{run}: not in figure 3, it has no checkpoint yet" for run in missing]
    return "\n".join([*(lines if sources else []), *absent])


def activations_csv(activity: Sequence[Activity]) -> str:
    """Return a row for each layer of each column; the logits belong to no single column."""
    rows = [
        [one.layer, "" if one.column is None else one.column]
        + [f"{getattr(one, key):.6g}" for key in MEASURES]
        for one in activity
    ]
    return tables.comma_separated(("layer", "column", *MEASURES), rows)
