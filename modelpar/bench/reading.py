"""How fast images are read, by several means in turn: ``modelpar-benchmark what=data``.

Each means is measured alone, on one core and on all, and while the whole net trains on it.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from modelpar.device import num_cores
from modelpar.distributed import Mesh
from modelpar.images.augment import Augmentation
from modelpar.images.loader import Batch, Reader, TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.images.photos import PHOTOGRAPHS
from modelpar.images.samples import ImageSet

MEANS: Final = {
    "imagefolder": "torchvision's ImageFolder, its usual transforms, torch's DataLoader",
    "folder": "the same files by data=imagefolder",
    "jpeg": "a packed store of JPEG files",
    "raw": "a packed store of pixels",
}
# Of the generated images, a choice of ours: pixels of each side and JPEG quality.
SIDES: Final = (350, 600)
QUALITY: Final = (75, 96)
CLASSES: Final = 10


def write_photographs(root: Path, parts: dict[str, int], classes: int = CLASSES) -> None:
    """Write JPEG files PART/CLASS/NUMBER.jpg: pieces of photographs of varied size and quality."""
    from skimage import data  # noqa: PLC0415 - takes half a second

    found = [getattr(data, name)() for name in PHOTOGRAPHS]
    pixels = [each[0] if isinstance(each, tuple) else each for each in found]
    photographs = [Image.fromarray(np.asarray(each)).convert("RGB") for each in pixels]
    draw = np.random.default_rng(0)
    for part, count in parts.items():
        for number in range(count):
            folder = root / part / f"class{number % classes:04}"
            folder.mkdir(parents=True, exist_ok=True)
            photograph = photographs[draw.integers(len(photographs))]
            width, height = (int(side) for side in draw.integers(*SIDES, 2))
            scale = max(1, width / photograph.width, height / photograph.height)
            box = (width / scale, height / scale)
            left, top = (
                draw.uniform(0, room - side)
                for room, side in zip(photograph.size, box, strict=True)
            )
            piece = photograph.resize(
                (width, height), Image.Resampling.BICUBIC, (left, top, left + box[0], top + box[1])
            )
            quality = int(draw.integers(*QUALITY))
            piece.save(folder / f"{number:06}.jpg", quality=quality)


@dataclass(frozen=True)
class Setup:
    """What all means have in common: the images, the net's step, and the size of a turn."""

    sets: dict[str, ImageSet]  # by means
    folder: Path  # of the files
    mesh: Mesh
    augmentation: Augmentation
    step: Callable[[Batch], object]
    batch_size: int
    batches: int  # of a turn


def rates(setup: Setup, rounds: int) -> list[dict[str, Any]]:
    """Return images/s of each means: alone on one core and on all, and while the net trains.

    ``waiting``: the share of a step that waits for the batch.  The medians are over ``rounds``, in
    each of which every means has one turn.
    """
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in MEANS}
    for _ in tqdm(range(rounds), "rounds", leave=False):
        for name, found in turns.items():
            with _on_one_core():
                alone = _rate(_batches(setup, name, 1), setup)
            every = _rate(_batches(setup, name, num_cores()), setup)
            found.append({"one_core": alone, "all_cores": every, **_training(setup, name)})
    keys = next(iter(turns.values()))[0]
    return [
        {"means": name, **{key: median(turn[key] for turn in found) for key in keys}}
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
    """Yield batches as a means delivers them to the device: bytes, ours still to be cropped."""
    if name == "imagefolder":
        return _again(_data_loader(setup, workers, []))
    images = setup.sets[name].train
    order = BatchOrder(len(images), setup.batch_size, 0, shuffle="every_epoch")
    return Reader(images, setup.mesh, workers).read(_again(order))


def _again(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield ``batches`` again and again, and keep none of them."""
    return chain.from_iterable(repeat(batches))


def _data_loader(setup: Setup, workers: int, more: Iterable[Any]) -> DataLoader[Any]:
    stored, size = setup.sets["folder"].stored_size, setup.augmentation.size
    usual = [v2.Resize(stored), v2.RandomCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    return DataLoader(
        ImageFolder(setup.folder, v2.Compose([*usual, *more])),
        setup.batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=setup.mesh.device.type == "cuda",
    )


def _rate(batches: Iterator[Any], setup: Setup) -> float:
    """Return images/s of ``batches``, after those that were read ahead."""
    for _ in islice(batches, 3):
        pass
    began = time.perf_counter()
    for _ in islice(batches, setup.batches):
        pass
    return setup.batches * setup.batch_size / (time.perf_counter() - began)


def _training(setup: Setup, name: str) -> dict[str, float]:
    """Return images/s of the net's steps on these batches, and the share that waits for them."""
    workers = num_cores()
    if name == "imagefolder":
        source = _usual(setup, workers)
    else:
        images = setup.sets[name].train
        order = BatchOrder(len(images), setup.batch_size, 0)
        lens = setup.augmentation
        loader = TrainLoader(images, order, lens, setup.mesh, crops="per_image", workers=workers)
        source = (batch for epoch in range(2**31) for batch in loader.epoch(epoch, 0, 0.1))
    setup.step(next(source))
    _wait(setup.mesh)
    began, waited = time.perf_counter(), 0.0
    for batch in islice(source, setup.batches):
        waited += batch.waited
        setup.step(batch)
    _wait(setup.mesh)
    seconds = time.perf_counter() - began
    return {"training": setup.batches * setup.batch_size / seconds, "waiting": waited / seconds}


def _usual(setup: Setup, workers: int) -> Iterator[Batch]:
    """Yield batches as the usual training loop has them: floats, from torch's loader."""
    colours = setup.augmentation.mean.flatten(1).mean(1).tolist()
    floats = [v2.ToDtype(torch.float32), v2.Normalize(colours, [1.0] * 3)]
    source = _again(_data_loader(setup, workers, floats))
    while True:
        began = time.perf_counter()
        images, labels = next(source)
        device = setup.mesh.device
        images = images.to(device, setup.augmentation.dtype, non_blocking=True)
        yield Batch(images, labels.to(device), time.perf_counter() - began)


def _wait(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
