"""How fast images are read, by several readers in turn: ``modelpar-benchmark what=data``.

Each reader is measured alone, on one core and on all, and while the whole net trains on it.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import count, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from modelpar import config
from modelpar.bench.measure import machine, with_defaults
from modelpar.device import num_cores, set_threads, set_up
from modelpar.distributed import Mesh
from modelpar.groups import DataSettings, ModelSettings
from modelpar.images.augment import Augmentation
from modelpar.images.loader import Batch, Reader, TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.images.packing import prepare
from modelpar.images.photos import PHOTOGRAPHS
from modelpar.images.samples import ImageSet
from modelpar.images.sets import open_set, stored_size
from modelpar.images.statistics import statistics
from modelpar.net.plan import plan_for
from modelpar.progress import progress_bar
from modelpar.schemas import BenchmarkSettings, PrepareSettings
from modelpar.settings import TrainSettings
from modelpar.training.engine import Learner, compile_parts

READERS: Final = {
    "imagefolder": "torchvision's ImageFolder, its usual transforms, torch's DataLoader",
    "folder": "the same files by data=imagefolder",
    "jpeg": "a packed store of JPEG files",
    "raw": "a packed store of pixels",
}
# Of the generated images, a choice of ours: pixels of each side and JPEG quality.
SIDES: Final = (350, 600)
QUALITY: Final = (75, 96)
CLASSES: Final = 10
FORMATS: Final = ("jpeg", "raw")


def write_photographs(root: Path, parts: dict[str, int]) -> None:
    """Write JPEG files PART/CLASS/NUMBER.jpg: pieces of photographs of varied size and quality."""
    from skimage import data  # noqa: PLC0415 - takes half a second

    found = [getattr(data, name)() for name in PHOTOGRAPHS]
    pixels = [each[0] if isinstance(each, tuple) else each for each in found]
    photographs = [Image.fromarray(np.asarray(each)).convert("RGB") for each in pixels]
    draw = np.random.default_rng(0)
    for part, images in parts.items():
        for number in range(images):
            folder = root / part / f"class{number % CLASSES:04}"
            folder.mkdir(parents=True, exist_ok=True)
            photograph = photographs[draw.integers(len(photographs))]
            width, height = (int(side) for side in draw.integers(*SIDES, 2))
            scale = max(1, width / photograph.width, height / photograph.height)
            box = (width / scale, height / scale)
            left, top = (
                draw.uniform(0, max(0, room - side))
                for room, side in zip(photograph.size, box, strict=True)
            )
            piece = photograph.resize(
                (width, height), Image.Resampling.BICUBIC, (left, top, left + box[0], top + box[1])
            )
            quality = int(draw.integers(*QUALITY))
            piece.save(folder / f"{number:06}.jpg", quality=quality)


# -- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What all readers have in common: the images, the net's step, and the size of a turn."""

    sets: dict[str, ImageSet]  # by reader
    folder: Path  # of the files
    mesh: Mesh
    augmentation: Augmentation
    step: Callable[[Batch], object]
    batch_size: int
    batches: int  # of a turn


def measure_reading(settings: BenchmarkSettings) -> dict[str, Any]:
    """Return what ``benchmark.json`` holds: images/s of each reader, and of preparing on one core.

    Of generated photographs, by the net and the batch of the settings.  Raises SettingsError if
    they are less than one batch.
    """
    settings = with_defaults(settings)
    batch_size, steps = (settings.batch_sizes or [128])[0], settings.steps or 2
    BatchOrder(settings.images, batch_size, 0)  # refuses less than one batch
    with TemporaryDirectory() as place:
        root = Path(place)
        write_photographs(root, {"train": settings.images, "val": settings.images // 10})
        preparing = [_preparing(root, settings) for _ in range(settings.rounds)]
        setup = _setup(root, settings, batch_size, steps)
        rows = _rates(setup, settings.rounds)
    prepared = {name: median(each[name] for each in preparing) for name in preparing[0]}
    about = {"machine": machine(), "settings": asdict(settings)}
    return {**about, "rows": rows, "preparing": prepared}


def _preparing(root: Path, settings: BenchmarkSettings) -> dict[str, float]:
    """Return images/s on one core of decoding with Pillow alone, and of preparing each store."""
    paths, found = [*root.glob("*/*/*.jpg")], dict[str, float]()
    with _on_one_core():
        began = time.perf_counter()
        for path in paths:
            with Image.open(path) as opened:
                opened.convert("RGB")
        found["pillow"] = len(paths) / (time.perf_counter() - began)
        for form in FORMATS:
            shutil.rmtree(root / form, ignore_errors=True)
            store = _store_settings(root, form, settings)
            began = time.perf_counter()
            with redirect_stdout(StringIO()):
                prepare(store)
            found[form] = len(paths) / (time.perf_counter() - began)
    return found


def _store_settings(root: Path, form: str, settings: BenchmarkSettings) -> PrepareSettings:
    size = stored_size(settings.image_size)
    words = ["data=imagefolder", f"data.root={root}", f"out={root / form}", f"format={form}"]
    return config.read("prepare", [*words, f"size={size}", "workers=0", "progress=false"])


def _setup(root: Path, settings: BenchmarkSettings, batch_size: int, batches: int) -> Setup:
    """Open all sets, and make the step of the whole net."""
    set_threads(1, settings.threads)  # a preparation has one thread, and leaves it so
    mesh = Mesh(set_up(settings.device))
    cache, size = root / "cache", settings.image_size
    roots = {"folder": ("imagefolder", root)} | {form: ("packed", root / form) for form in FORMATS}
    found = {
        reader: open_set(DataSettings(name, str(where), image_size=size), cache)
        for reader, (name, where) in roots.items()
    }
    plan = plan_for(settings.recipe, ModelSettings(), CLASSES, size)
    precision = (settings.precisions or ["float32"])[0]
    trained = TrainSettings(
        epochs=1, batch_size=batch_size, precision=precision, compile=settings.compile
    )
    learner, dtype = Learner(plan, trained, mesh), torch.float32
    if precision == "bfloat16":
        dtype = torch.bfloat16
    stats = statistics(found["raw"], cache)
    augmentation = Augmentation(stats, size, scaled=True, device=mesh.device, dtype=dtype)
    if settings.compile:
        compile_parts(mesh, [augmentation])
    steps = count()

    def step(batch: Batch) -> Tensor:
        return learner.step(batch, next(steps), learner.schedule.rates(0))

    return Setup(found, root / "train", mesh, augmentation, step, batch_size, batches)


def _rates(setup: Setup, rounds: int) -> list[dict[str, Any]]:
    """Return images/s of each reader: alone on one core and on all, and while the net trains.

    ``waiting``: the share of the time that the steps wait for their batches.  The medians are over
    ``rounds``, in each of which every reader has one turn.
    """
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
    for _ in progress_bar(iterable=range(rounds), desc="rounds", leave=False):
        for name, found in turns.items():
            with _on_one_core():
                alone = _rate(setup, name, 1)
            every = _rate(setup, name, num_cores())
            found.append({"one_core": alone, "all_cores": every, **_training(setup, name)})
    keys = next(iter(turns.values()))[0]
    return [
        {"reader": name, **{key: median(turn[key] for turn in found) for key in keys}}
        for name, found in turns.items()
    ]


@contextmanager
def _on_one_core() -> Generator[None]:
    """Let this thread, and what it starts, run on one core only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _batches(setup: Setup, name: str, workers: int) -> Iterator[Any]:
    """Yield batches as a reader delivers them to the device: bytes, ours still to be cropped."""
    if name == "imagefolder":
        return iter(_data_loader(setup, workers, []))
    images = setup.sets[name].train
    order = BatchOrder(len(images), setup.batch_size, 0, shuffle="every_epoch")
    rows = (batch.tolist() for epoch in count() for batch in order.batches(epoch))
    return Reader(images, setup.mesh, workers).read(rows)


def _data_loader(setup: Setup, workers: int, more: Iterable[Any]) -> DataLoader[Any]:
    """Return an endless loader: its workers start once, as for an epoch of many images."""
    stored, size = setup.sets["folder"].stored_size, setup.augmentation.size
    usual = [v2.Resize(stored), v2.RandomCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    images = ImageFolder(setup.folder, v2.Compose([*usual, *more]))
    return DataLoader(
        images,
        setup.batch_size,
        sampler=RandomSampler(images, replacement=True, num_samples=sys.maxsize),
        num_workers=workers,
        pin_memory=setup.mesh.device.type == "cuda",
    )


def _rate(setup: Setup, name: str, workers: int) -> float:
    """Return images/s of a reader, after the batches that were read ahead."""
    batches = _batches(setup, name, workers)
    # torch's workers make a batch each, so that as many arrive at once as there are workers.
    number = workers * math.ceil(setup.batches / workers)
    for _ in islice(batches, 1 + 2 * workers):
        pass
    began = time.perf_counter()
    for _ in islice(batches, number):
        pass
    return number * setup.batch_size / (time.perf_counter() - began)


def _training(setup: Setup, name: str) -> dict[str, float]:
    """Return images/s of the net's steps on these batches, and the share that waits for them."""
    workers = num_cores()
    if name == "imagefolder":
        source = _usual(setup, workers)
    else:
        images = setup.sets[name].train
        order = BatchOrder(len(images), setup.batch_size, 0)
        augmentation = setup.augmentation
        loader = TrainLoader(
            images, order, augmentation, setup.mesh, crops="per_image", workers=workers
        )
        source = (batch for epoch in range(2**31) for batch in loader.epoch(epoch, 0, 0.1))
    synchronize = torch.get_device_module(setup.mesh.device).synchronize
    setup.step(next(source))
    synchronize()
    began, waited = time.perf_counter(), 0.0
    for batch in islice(source, setup.batches):
        waited += batch.waited
        setup.step(batch)
    synchronize()
    seconds = time.perf_counter() - began
    return {"training": setup.batches * setup.batch_size / seconds, "waiting": waited / seconds}


def _usual(setup: Setup, workers: int) -> Iterator[Batch]:
    """Yield batches as the usual training loop has them: floats, from torch's loader."""
    colours = setup.augmentation.mean.flatten(1).mean(1).tolist()
    floats = [v2.ToDtype(torch.float32), v2.Normalize(colours, [1.0] * 3)]
    source = iter(_data_loader(setup, workers, floats))
    while True:
        began = time.perf_counter()
        images, labels = next(source)
        device = setup.mesh.device
        images = images.to(device, setup.augmentation.dtype, non_blocking=True)
        yield Batch(images, labels.to(device), time.perf_counter() - began)
