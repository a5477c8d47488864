"""What a training needs before its first step: images, plan, and where it continues."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from modelpar import config, environment
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, DataError, SettingsError
from modelpar.images import loader
from modelpar.images.augment import Statistics
from modelpar.images.order import BatchOrder
from modelpar.images.samples import ImageSet
from modelpar.images.sets import open_set
from modelpar.images.statistics import statistics
from modelpar.net.plan import Plan, Recipe, plan_for, settings_of
from modelpar.seeding import digest
from modelpar.settings import DataSettings, TrainSettings
from modelpar.training import checkpoint
from modelpar.training.checkpoint import Checkpoint
from modelpar.training.metrics import top1_errors


def chosen_data(settings: TrainSettings) -> DataSettings:
    """Return the data settings, with what the model's and the run's settings override."""
    overrides = {
        "image_size": settings.model.image_size,
        "num_classes": settings.model.num_classes,
        "workers": settings.workers,
        "checkpoint_every": settings.checkpoint_every,
    }
    chosen = {key: value for key, value in overrides.items() if value is not None}
    return replace(settings.data, **chosen)


@dataclass(frozen=True)
class Prepared:
    """What every rank needs before its first step."""

    data: DataSettings
    images: ImageSet
    statistics: Statistics
    plan: Plan
    steps: int  # at which the run ends
    start: Checkpoint | None = None  # to resume, see ``agreed_start``
    final_error: float | None = None  # top-1 error in % of a run that is finished


def prepare(settings: TrainSettings) -> Prepared:
    """Open the data, measure it, and plan the net: everything that can fail before training.

    Raises SettingsError, DataError and LaunchError; writes nothing outside the cache.
    """
    data = chosen_data(settings)
    recipe = Recipe(**asdict(settings.recipe))
    planned = plan_for(recipe, settings.model, data.num_classes or 1, data.image_size)
    if settings.columns > planned.columns:
        raise SettingsError(f"model.net={planned.net}: has one column; use columns=1")
    cache = config.cache_dir(settings.cache_dir)
    images = open_set(data, cache, settings.seed, settings.batch_size * settings.replicas)
    order = BatchOrder(
        len(images.train), settings.batch_size, settings.seed, replicas=settings.replicas
    )
    steps = (settings.epochs or data.epochs) * len(order)
    if settings.steps is not None:
        steps = min(steps, settings.steps)
    plan = plan_for(recipe, settings.model, len(images.classes), data.image_size)
    if settings.replicas > 1 and plan.norm == "batch":
        raise SettingsError(
            "model.norm=batch: each replica would normalize its own images; use replicas=1"
        )
    launched = environment.read()
    loader.check_shared_memory(
        data.workers,
        settings.batch_size * 3 * images.stored_size**2,
        launched.local_size if launched.world_size > 1 else settings.columns * settings.replicas,
    )
    return Prepared(data, images, statistics(images, cache, data.workers), plan, steps)


def resume_point(
    settings: TrainSettings, prepared: Prepared, run_dir: Path | None
) -> Checkpoint | None:
    """Return where the run continues: its newest checkpoint, or the one that ``resume`` names.

    Raises CheckpointError if that belongs to another training, DataError if to other images.
    """
    found = checkpoint.newest(run_dir) if run_dir is not None else None
    if found is None and settings.resume not in {"auto", "never"}:
        named = checkpoint.find(settings.resume)
        if not isinstance(named, Checkpoint):
            raise CheckpointError(
                f"resume={settings.resume}: holds only weights; use a run or a step"
            )
        found = named
    if found is None:
        return None
    for key, now in (
        ("plan", settings_of(prepared.plan)),
        ("seed", settings.seed),
        ("images_a_step", settings.batch_size * settings.replicas),
        ("precision", settings.precision),
    ):
        if found.manifest.get(key) != now:
            raise CheckpointError(
                f"{found.folder}: made with another {key}; use the settings it was made with, "
                "or another run_dir"
            )
    if found.manifest.get("fingerprint") != prepared.images.fingerprint:
        raise DataError(
            f"data={settings.data.name}: not the images that {found.folder} was trained on; "
            "restore them, or use another run_dir"
        )
    return found


def final_error(prepared: Prepared, run_dir: Path, start: Checkpoint | None) -> float | None:
    """Return the last top-1 error in % of a finished run, None for any other.

    A run is finished if it has a checkpoint of its last step, or of a later one, and
    metrics.jsonl has the evaluation of that step.
    """
    if start is None or start.step < prepared.steps:
        return None
    return top1_errors(run_dir).get(start.step)


def agreed_start(
    settings: TrainSettings, prepared: Prepared, run_dir: Path, mesh: Mesh
) -> Prepared:
    """Return ``prepared`` with the checkpoint to resume and its statistics, if there is one.

    A collective of the world.  Raises CheckpointError on every rank if ranks see different ones.
    """
    with mesh.all_or_none():
        start = resume_point(settings, prepared, run_dir)
        stats = prepared.statistics
        if start is not None:
            stats = Statistics(**checkpoint.read_statistics(start))
    error = final_error(prepared, run_dir, start)
    seen = (start and start.manifest["sha256"], digest([stats.mean, stats.std, stats.axes]), error)
    if len(set(mesh.gather_text(repr(seen)))) > 1:
        raise CheckpointError(
            "the ranks see different checkpoints or mean images; use a run_dir on a disk that "
            "all hosts share, or one cache_dir"
        )
    return replace(prepared, statistics=stats, start=start, final_error=error)
