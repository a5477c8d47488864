"""Evaluates trained weights: of a run, of one of its steps, or of one file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.errors import DataError, SettingsError, say
from modelpar.files import write_out
from modelpar.groups import DataSettings
from modelpar.images.augment import Augmentation, Statistics
from modelpar.images.folders import first_difference
from modelpar.images.loader import check_open_files
from modelpar.images.samples import ImageSet
from modelpar.images.sets import WITHOUT_FOLDER, open_set
from modelpar.images.statistics import statistics
from modelpar.net.weights import check_state
from modelpar.schemas import PredictSettings
from modelpar.settings import EvaluateSettings, RankSettings
from modelpar.training.averaging import Member, Pass, split
from modelpar.training.engine import Net, build
from modelpar.training.metrics import Errors
from modelpar.training.trained import TrainedNet, find, paths_of


@dataclass(frozen=True)
class Prepared:
    """What the evaluation of one net needs before its first batch."""

    trained: TrainedNet
    data: DataSettings
    images: ImageSet
    statistics: Statistics
    workers: int
    searched: ImageSet | None = None  # other images, on which the weights are searched


def prepare(settings: EvaluateSettings, _run_dir: Path | None = None) -> list[Prepared]:
    """Find weights, images and mean image of each net, and check that they fit each other.

    Raises CheckpointError, SettingsError, DataError.
    """
    paths = paths_of(settings.checkpoint)
    if len(paths) == 1 and settings.weights == "search":
        raise SettingsError("weights=search: needs several nets; use checkpoint=[PATH,PATH]")
    for key in ("search_images", "search_root"):
        value = getattr(settings, key)
        if value and settings.weights != "search":
            raise SettingsError(f"{key}={value}: requires weights=search")
    if settings.search_images and settings.search_root:
        raise SettingsError(
            f"search_images={settings.search_images}: search_root={settings.search_root} is "
            "searched as a whole; leave one of them out"
        )
    found = _prepare_each(settings, paths)
    if settings.search_root is not None:
        found = _with_searched(settings, paths, found)
    elif settings.weights == "search":
        rows(settings, found)
    return found


def _prepare_each(settings: EvaluateSettings, paths: Sequence[str]) -> list[Prepared]:
    first = prepare_one(settings, paths[0])
    return [first, *(prepare_one(settings, path, first) for path in paths[1:])]


def _with_searched(
    settings: EvaluateSettings, paths: Sequence[str], found: Sequence[Prepared]
) -> list[Prepared]:
    """Add the test images of ``search_root``; raises SettingsError if they are those reported.

    Raises DataError if they have other classes.
    """
    root = settings.search_root
    if found[0].data.name in WITHOUT_FOLDER:
        raise SettingsError(f"search_root={root}: data={found[0].data.name} reads no folder")
    others = _prepare_each(replace(settings, data=replace(settings.data, root=root)), paths)
    if others[0].images.fingerprint == found[0].images.fingerprint:
        raise SettingsError(f"search_root={root}: has the evaluated images; use others")
    if others[0].images.class_ids != found[0].images.class_ids:
        raise DataError(f"search_root={root}: has other classes than the evaluated images")
    pairs = zip(found, others, strict=True)
    return [replace(one, searched=other.images) for one, other in pairs]


def find_for(settings: EvaluateSettings | PredictSettings, path: str) -> TrainedNet:
    """Resolve ``path`` as ``find`` does; raises SettingsError for a net that cannot be split."""
    trained = find(path, ema=settings.ema)
    if settings.columns > trained.plan.columns:
        raise SettingsError(f"checkpoint={path}: its net has one column; use columns=1")
    check_open_files(settings.columns * settings.replicas)
    return trained


def prepare_one(
    settings: EvaluateSettings | PredictSettings,
    path: str,
    first: Prepared | None = None,
    *,
    train: bool = False,
) -> Prepared:
    """Return what one net needs; raises SettingsError if it cannot be averaged with ``first``.

    ``train``: with the training images, which a run's checkpoint does not need otherwise.
    """
    trained = find_for(settings, path)
    data = settings.data
    if not data.name:  # those of the run, with the settings that were given
        recorded = None if trained.data.name in WITHOUT_FOLDER else trained.data.root
        data = replace(trained.data, download=data.download, root=data.root or recorded)
    plan = trained.plan
    number = plan.num_classes if data.name == "synthetic" else None  # else that of the images
    data = replace(data, image_size=plan.image_size, num_classes=number)
    cache = config.cache_dir(settings.cache_dir)
    stats = trained.statistics
    train = train or stats is None  # to measure the mean image
    source = first.trained if first else trained  # of synthetic images: the same for all nets
    images = open_set(data, cache, source.seed, source.images_a_step, train=train)
    check_classes(images, trained, path)
    if first is not None:
        _check_same_images(first, path, data, images)
    if stats is None:
        stats = statistics(images, cache, data.workers, progress=settings.monitor.progress)
    elif stats.mean.shape[-1] != images.stored_size:
        raise SettingsError(
            f"data={data.name}: its images are stored at another size than those of {path}; "
            "use the data it was trained on"
        )
    workers = data.workers if settings.workers is None else settings.workers
    return Prepared(trained, data, images, stats, workers)


def _check_same_images(first: Prepared, path: str, data: DataSettings, images: ImageSet) -> None:
    """Raise SettingsError unless a net has the classes and the test images of the first one.

    Crops and stored images may have other sizes.
    """
    other = first.trained.path
    if images.class_ids != first.images.class_ids:
        raise SettingsError(
            f"checkpoint={path}: its classes are not those of {other}; "
            "average nets with the same classes"
        )
    names = [(one.name, one.root and Path(one.root).resolve()) for one in (data, first.data)]
    same = names[0] == names[1]
    if data.name == "synthetic":  # other sizes are other noise
        same = same and images.fingerprint == first.images.fingerprint
    if not same or len(images.test) != len(first.images.test):
        raise SettingsError(
            f"checkpoint={path}: its test images are not those of {other}; "
            "add data=NAME, and data.root=FOLDER if it has one"
        )


def rows(settings: EvaluateSettings, prepared: Sequence[Prepared]) -> tuple[list[int], list[int]]:
    """Return the test images on which weights are searched, and those that are reported.

    Raises SettingsError if none is left to report.
    """
    groups, other = prepared[0].images.groups, prepared[0].searched
    if settings.weights == "equal":
        return [], [*range(len(groups))]
    if other is not None:
        return [*range(len(other.test))], [*range(len(groups))]
    searched, reported = split(groups, settings.search_images or len(groups) // 5)
    if len(searched) < settings.replicas or not reported:
        raise SettingsError(
            f"search_images={settings.search_images or 'null'}: {len(searched)} of "
            f"{len(groups)} test images would be searched with replicas={settings.replicas}, and "
            "the others reported; use another number"
        )
    return searched, reported


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


def loaded(settings: RankSettings, trained: TrainedNet, mesh: Mesh) -> Net:
    """Return this process's part of the trained net; raises CheckpointError."""
    net = build(trained.plan, mesh, settings, seed=0)
    weights = trained.weights(mesh.column if mesh.pair is not None else None)
    check_state(net, weights, trained.path)
    net.load_state_dict(weights)
    return net.to(getattr(torch, settings.precision))


@dataclass(frozen=True)
class Evaluation:
    """The errors of each net, and of the average of several nets with its weights.

    ``searched``: the number of images on which the weights were searched, and which are in no
    error.  ``out=FILE.json`` holds this as JSON.
    """

    data: str
    views: int
    checkpoints: list[str]
    members: list[Errors]
    average: Errors | None
    weights: list[float]
    searched: int


def evaluate_checkpoint(
    settings: EvaluateSettings, prepared: Sequence[Prepared], mesh: Mesh
) -> Evaluation:
    """Return the exact errors over all test images that are not searched.

    A collective of the whole mesh.
    """
    members: list[Member] = []
    for one in prepared:
        augmentation = Augmentation(
            one.statistics, one.trained.plan.image_size, scaled=False, device=mesh.device
        )
        members.append(Member(loaded(settings, one.trained, mesh), one.images, augmentation))
    first = prepared[0]
    seen = Pass(members, mesh, settings.batch_size, settings.views, first.workers)
    searched, reported = rows(settings, prepared)
    weights = [1 / len(members)] * len(members)
    if searched:
        pairs = zip(members, prepared, strict=True)
        others = [replace(one, images=each.searched or each.images) for one, each in pairs]
        weights = replace(seen, members=others).search(searched)
    errors, average = seen.errors(reported, weights)
    data = f"{first.data.name} {first.data.root or ''}".strip()
    paths = [one.trained.path for one in prepared]
    mean = average if len(members) > 1 else None
    return Evaluation(data, settings.views, paths, errors, mean, weights, len(searched))


def run(
    settings: EvaluateSettings, prepared: Sequence[Prepared], mesh: Mesh, _run_dir: None
) -> None:
    """Evaluate; rank 0 prints the errors with enough digits to compare two evaluations."""
    if mesh.rank == 0:
        sets = [found for one in prepared for found in (one.images, one.searched) if found]
        for line in filter(None, dict.fromkeys(one.skipped for one in sets)):
            say(line)
    found = evaluate_checkpoint(settings, prepared, mesh)
    with mesh.all_or_none():
        if mesh.rank == 0:
            print("\n".join(lines(found)), flush=True)  # noqa: T201
            if settings.out is not None:
                content = config.without_secrets(asdict(found))
                write_out(settings.out, json.dumps(content, indent=1) + "\n")


def lines(found: Evaluation) -> list[str]:
    """Return what is printed: a line for each net, and one for the average."""
    views = "the central view" if found.views == 1 else f"{found.views} views"
    each = [f"{one.text}, {one.samples} images, {views}" for one in found.members]
    if found.average is None:
        return each
    how = "equal weights"
    if found.searched:
        shares = ", ".join(f"{weight:.3f}" for weight in found.weights)
        how = f"weights {shares} searched on {found.searched} other images"
    named = [f"{path}: {text}" for path, text in zip(found.checkpoints, each, strict=True)]
    return [*named, f"average of {len(each)} nets, {how}: {found.average.text}"]
