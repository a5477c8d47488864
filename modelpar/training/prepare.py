"""What a training needs before its first step: images, plan, and where it continues."""

from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from modelpar import config, environment
from modelpar.checks import check_net
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, DataError, SettingsError
from modelpar.files import check_space, check_writable
from modelpar.groups import DataSettings, InitSettings
from modelpar.images import loader
from modelpar.images.augment import Statistics
from modelpar.images.folders import first_difference
from modelpar.images.order import BatchOrder
from modelpar.images.samples import ImageSet
from modelpar.images.sets import open_set
from modelpar.images.statistics import statistics
from modelpar.net.plan import Plan, plan_for, plan_of, settings_of
from modelpar.seeding import digest
from modelpar.settings import TrainSettings
from modelpar.training import checkpoint
from modelpar.training.checkpoint import Checkpoint
from modelpar.training.metrics import evaluations
from modelpar.training.run_dir import check_compatible
from modelpar.training.schedule import run_length

LOG_BYTES: Final = 10**6  # that a run writes besides its checkpoints


@dataclass(frozen=True)
class Prepared:
    """What every rank needs before its first step."""

    data: DataSettings
    images: ImageSet
    statistics: Statistics
    plan: Plan
    steps: int  # at which the run ends
    epoch_steps: int  # of one epoch
    identity: dict[str, Any]  # what a checkpoint must have in common with a run that resumes it
    start: Checkpoint | None = None  # to resume, see ``agreed_start``
    finished: bool = False  # ``start`` is where the run ended, and its evaluation is recorded


def prepare(settings: TrainSettings, run_dir: Path | None = None) -> Prepared:
    """Open the data, measure it, and plan the net: everything that can fail before training.

    Raises an error if ``run_dir``, unless it is None, or ``resume`` belongs to another training.
    Writes nothing outside the cache.
    """
    if settings.monitor.wandb and find_spec("wandb") is None:
        raise SettingsError("monitor.wandb=true: needs wandb; pip install 'modelpar[wandb]'")
    if run_dir is not None:
        check_writable("run_dir", run_dir)
        check_space(run_dir, LOG_BYTES, "what a run writes down")
        check_compatible(run_dir, settings)
    overrides = {
        "image_size": settings.model.image_size,
        "num_classes": settings.model.num_classes,
        "workers": settings.workers,
        "checkpoint_every": settings.checkpoint_every,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    data = replace(settings.data, **given)
    plan = plan_for(settings.recipe, settings.model, data.num_classes or 1, data.image_size)
    check_net(settings)
    cache, replicas = config.cache_dir(settings.cache_dir), settings.replicas
    images = open_set(data, cache, settings.seed, settings.batch_size * replicas)
    plan = replace(plan, num_classes=len(images.classes))
    order = BatchOrder(len(images.train), settings.batch_size, settings.seed, replicas=replicas)
    steps = run_length(settings) * len(order)
    steps = min(steps, settings.steps or steps)
    env = environment.read()
    loader.check_open_files(env.local_size if env.world_size > 1 else settings.columns * replicas)
    identity = {
        "plan": settings_of(plan),
        "seed": settings.seed,
        "images_a_step": settings.batch_size * replicas,
        "precision": settings.precision,
        "fingerprint": images.fingerprint,
    }
    stats = statistics(images, cache, data.workers, progress=settings.monitor.progress)
    prepared = Prepared(data, images, stats, plan, steps, len(order), identity)
    if resume_point(settings, prepared, run_dir) is None and run_dir is not None:
        _check_init(settings.init)
    return prepared


def _check_init(init: InitSettings) -> None:
    """Raise an error if there is nothing where ``init`` says that a new run starts from."""
    if init.checkpoint is not None:
        checkpoint.find(init.checkpoint, "init.checkpoint")
    given = {"checkpoint": init.checkpoint or "", "layers": ",".join(init.layers)}
    fixes = {"checkpoint": "RUN_DIR", "layers": "[LAYER,LAYER]"}
    for key, value in given.items():
        if not value and any(given.values()):
            raise SettingsError(f"init.{key}: missing; add init.{key}={fixes[key]}")


def resume_point(
    settings: TrainSettings, prepared: Prepared, run_dir: Path | None
) -> Checkpoint | None:
    """Return where the run continues: its newest checkpoint, or the one that ``resume`` names.

    Raises CheckpointError if that belongs to another training, DataError if to other images.
    """
    found = checkpoint.newest(run_dir) if run_dir is not None else None
    if found is None and settings.resume not in {"auto", "never"}:
        found = checkpoint.find(settings.resume, "resume")
    if isinstance(found, Path):
        raise CheckpointError(f"resume={settings.resume}: holds only weights; use a run or a step")
    if found is None:
        return None
    ours, theirs = prepared.identity, dict(found.manifest)
    with suppress(KeyError, SettingsError):  # the plan of an older version lacks newer settings
        theirs["plan"] = settings_of(plan_of(theirs["plan"]))
    different = next((key for key in ours if theirs.get(key) != ours[key]), None)
    if different == "fingerprint":
        what = f"not the images that {found.folder} was trained on"
        names = theirs.get("classes") or prepared.images.class_ids
        if classes := first_difference(prepared.images.class_ids, names):
            what = "class {} is {}, but {} in ".format(*classes) + str(found.folder)
        raise DataError(f"data={settings.data.name}: {what}; restore them, or use another run_dir")
    if different:
        raise CheckpointError(
            f"{found.folder}: made with another {different}; use the settings it was made with, "
            "or another run_dir"
        )
    return found


def agreed_start(
    settings: TrainSettings, prepared: Prepared, run_dir: Path, mesh: Mesh
) -> Prepared:
    """Return ``prepared`` with the checkpoint to resume and its statistics, if there is one.

    A collective of the world.  Raises CheckpointError on every rank if ranks see different ones.
    """
    stats, finished = prepared.statistics, False
    with mesh.all_or_none():
        start = resume_point(settings, prepared, run_dir)
        if start is not None:
            stats = Statistics(**checkpoint.read_statistics(start))
    if start is not None and (row := evaluations(run_dir).get(start.step)):
        stopped = row.get("early_stopping", 0) >= settings.early_stopping > 0
        finished = stopped or start.step >= prepared.steps
    measured = digest([stats.mean, stats.std, stats.axes])
    seen = (start and start.manifest["sha256"], measured, finished)
    if len(set(mesh.gather_objects(seen))) > 1:
        raise CheckpointError(
            "the ranks see different checkpoints or mean images; use a run_dir on a disk that "
            "all hosts share, or one cache_dir"
        )
    return replace(prepared, statistics=stats, start=start, finished=finished)
