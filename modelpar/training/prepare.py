"""What a training needs before its processes meet: images, plan, and where it goes on from."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from modelpar import config, environment
from modelpar.errors import CheckpointError, DataError, SettingsError
from modelpar.images import loader
from modelpar.images.augment import Statistics
from modelpar.images.order import BatchOrder
from modelpar.images.samples import ImageSet
from modelpar.images.sets import open_set
from modelpar.images.statistics import statistics
from modelpar.net.plan import Plan, Recipe, plan_for, settings_of
from modelpar.settings import DataSettings, ModelSettings, TrainSettings
from modelpar.training import checkpoint


def chosen_data(data: DataSettings, model: ModelSettings) -> DataSettings:
    """Return the data settings with the sizes that the model asks for."""
    asked = {"image_size": model.image_size, "num_classes": model.num_classes}
    return replace(data, **{key: value for key, value in asked.items() if value is not None})


@dataclass(frozen=True)
class Prepared:
    """What a training needs before its processes meet."""

    images: ImageSet
    statistics: Statistics
    plan: Plan
    steps: int  # at which the run is over: its epochs', or before


def prepare(settings: TrainSettings) -> Prepared:
    """Open the data, measure it, plan the net: all that can fail before any process group.

    Raises SettingsError and DataError; creates nothing but what the cache holds.
    """
    data = chosen_data(settings.data, settings.model)
    recipe = Recipe(**asdict(settings.recipe))
    planned = plan_for(recipe, settings.model, data.num_classes or 1, data.image_size)
    if settings.columns > planned.columns:
        raise SettingsError(f"model.net={planned.net}: has one column; give columns=1")
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
            "model.norm=batch: each replica would normalize by itself; give replicas=1"
        )
    workers = data.workers if settings.workers is None else settings.workers
    launched = environment.read()
    loader.check_shared_memory(
        workers,
        settings.batch_size * 3 * images.stored_size**2,
        launched.local_size if launched.size > 1 else settings.columns * settings.replicas,
    )
    return Prepared(images, statistics(images, cache, workers), plan, steps)


def resume_point(
    settings: TrainSettings, prepared: Prepared, run_dir: Path | None
) -> checkpoint.Checkpoint | None:
    """Return what the run goes on from: its newest checkpoint, or the one ``resume`` names.

    Raises CheckpointError where that is none of this training's, DataError for other images.
    """
    found = checkpoint.newest(run_dir) if run_dir is not None else None
    if found is None and settings.resume not in {"auto", "never"}:
        named = checkpoint.find(settings.resume)
        if not isinstance(named, checkpoint.Checkpoint):
            raise CheckpointError(f"resume={settings.resume}: weights alone; give a run or a step")
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
                f"{found.folder}: its {key} is not this training's; give the settings it was "
                "made with, or another run_dir"
            )
    if found.manifest.get("fingerprint") != prepared.images.fingerprint:
        raise DataError(
            f"data={settings.data.name}: not the images that {found.folder} was trained on; bring "
            "them back, or give another run_dir"
        )
    return found


def last_error(prepared: Prepared, found: checkpoint.Checkpoint | None) -> float | None:
    """Return the last top-1 error in % of a run that is over, None where it goes on.

    It is over at its last step, or beyond, where it was tested there: an evaluation ends each run.
    """
    if found is None or found.step < prepared.steps or found.manifest.get("tested") != found.step:
        return None
    return float(found.manifest["top1"])
