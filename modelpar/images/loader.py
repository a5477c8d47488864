"""Loaders: batches that are equal on both columns and depend only on seed, epoch and position."""

import re
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from modelpar.errors import DataError, LaunchError
from modelpar.images.augment import Augmentation, CropFlipColour
from modelpar.images.order import BatchOrder
from modelpar.images.samples import Images
from modelpar.seeding import digest
from modelpar.shutdown import ignore_signals

PIXELS_EVERY: Final = 100  # batches; hashing the 25 MB of one takes a few hundredths of a second
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - torch's loaders pass their batches here
PREFETCHED: Final = 2  # batches that a loader process keeps ready: torch's default


@dataclass(frozen=True)
class Batch:
    """A batch on its device; ``waited`` is the time in s that the step waited for it.

    ``digest`` is a hash of what was read.  It must be equal on all columns; otherwise they would
    train on different images.
    """

    images: Tensor  # (N, 3, S, S) float32
    labels: Tensor  # (N,)
    waited: float
    digest: int = 0


def _data_loader(images: Images, device: torch.device, workers: int, batches: Any) -> Any:
    """Return torch's loader, with a generator that leaves the global one unchanged."""
    # Hide Pillow's warnings about metadata; an image that cannot be decoded is an error.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return DataLoader(
        images,  # pyright: ignore[reportArgumentType] - it needs only a length and an index
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )


def _next(source: Iterator[Any]) -> tuple[Tensor, Tensor] | None:
    """Return the next batch or None; raises DataError, or LaunchError for a killed worker."""
    try:
        return next(source, None)
    except DataError as error:  # torch puts the worker's traceback before the message
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not (message := worker_killed_message(error)):
            raise
        raise LaunchError(message) from None


def _prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy and augment the next batch on a second CUDA stream while the net uses the current."""
    stream = torch.cuda.Stream(device)

    def load() -> Batch | None:
        with torch.cuda.stream(stream):
            return next(batches, None)

    ready = load()
    while ready is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        ready.images.record_stream(current)  # so that its memory is not reused while in use
        ready.labels.record_stream(current)
        following = load()
        yield ready
        ready = following


class TrainLoader:
    """The training batches of one replica; it can start at any batch of any epoch."""

    def __init__(
        self,
        images: Images,
        order: BatchOrder,
        augmentation: Augmentation,
        device: torch.device,
        *,
        crops: str,
        workers: int = 0,
    ) -> None:
        self.order, self.crops = order, crops
        self.augmentation, self.device = augmentation, device
        self.loader = _data_loader(images, device, workers, order)

    def epoch(self, epoch: int, start: int, noise: float) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from number ``start``, augmented on the device.

        Raises DataError for an unreadable image, LaunchError for a killed loader process.
        """
        batches = self._batches(epoch, start, noise)
        return _prefetch(batches, self.device) if self.device.type == "cuda" else batches

    def _batches(self, epoch: int, start: int, noise: float) -> Iterator[Batch]:
        order = self.order
        order.epoch, order.start = epoch, start
        border = self.augmentation.border
        draws = CropFlipColour.of_epoch(order.seed, epoch, order.num_samples, border, self.crops)
        samples, source = order.samples(), iter(self.loader)
        for number in range(start, len(order)):
            began = time.perf_counter()
            stored = _next(source)
            if stored is None:
                return
            positions = order.positions(number)
            read = [samples[positions], stored[1], *stored[: number % PIXELS_EVERY == 0]]
            images, labels = (part.to(self.device, non_blocking=True) for part in stored)
            augmented = self.augmentation.train(images, draws.at(positions), noise)
            yield Batch(augmented, labels, time.perf_counter() - began, digest(read))


class TestLoader:
    """Batches of stored images, each image once, divided among the replicas without padding.

    ``common`` is the number of full batches that every replica has.
    """

    __test__ = False  # pytest: not a test

    def __init__(
        self,
        images: Images,
        batch_size: int,
        device: torch.device,
        *,
        replica: int = 0,
        replicas: int = 1,
        workers: int = 0,
    ) -> None:
        self.device = device
        self.common = len(images) // replicas // batch_size
        rows = range(replica, len(images), replicas)
        batches = BatchSampler(rows, batch_size, drop_last=False)
        self.loader = _data_loader(images, device, workers, batches)

    def __len__(self) -> int:
        return len(self.loader)  # batches of this replica

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (N, 3, T, T) uint8 and labels (N,); raises the errors of TrainLoader."""
        source = iter(self.loader)
        while (stored := _next(source)) is not None:
            images, labels = (part.to(self.device, non_blocking=True) for part in stored)
            yield images, labels


def check_shared_memory(workers: int, batch_bytes: int, processes: int) -> None:
    """Raise LaunchError if the loaders' batches do not fit into /dev/shm.

    Without this check a loader process would die from a bus error.
    """
    needed = workers * PREFETCHED * batch_bytes * processes
    if not needed or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise LaunchError(
            f"{SHARED_MEMORY}: {workers} loader processes for each of {processes} ranks need "
            f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; make it larger "
            "(docker run --shm-size), or use workers=0"
        )


def worker_killed_message(error: Exception) -> str:
    """Return a one-line message if ``error`` means that a loader process was killed, else "".

    torch reports it as a RuntimeError at any place in the main thread, or while a batch is read.
    The connection that transfers a batch may break before that.
    """
    text = f"{error} {error.__cause__ or ''}"
    raised = "Caught" in text  # by a worker that is alive
    broken = isinstance(error, (ConnectionError, EOFError)) and not raised
    if not broken and "DataLoader worker (pid" not in text:
        return ""
    number = re.search(r"killed by signal: (\w+( \w+)*)", text)
    how = f" by signal: {number[1]}" if number else ""
    return (
        f"a loader process was killed{how}, probably out of memory; "
        f"use fewer workers, or more memory (also for {SHARED_MEMORY})"
    )
