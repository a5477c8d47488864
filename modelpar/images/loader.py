"""Batches: the same on both columns, each a function of seed, epoch and position."""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modelpar.errors import DataError, LaunchError
from modelpar.images.augment import Augmentation, CropFlipColour
from modelpar.images.order import BatchOrder
from modelpar.images.samples import Images
from modelpar.seeding import digest
from modelpar.shutdown import ignore_signals

PIXELS_EVERY: Final = 100  # batches: to hash the 25 MB of one takes a few hundredths of a second


@dataclass(frozen=True)
class Batch:
    """A batch on its device, and how long the step waited for it in s."""

    images: Tensor  # (N, 3, S, S) float32
    labels: Tensor  # (N,)
    waited: float
    digest: int = 0  # of what was read: equal on all columns, or they train on different things


def _load(images: Images, device: torch.device, workers: int, **how: Any) -> DataLoader[Any]:
    """Return torch's loader; a generator of its own keeps it off the global one."""
    return DataLoader(
        images,  # pyright: ignore[reportArgumentType] - sized and indexed is enough
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
        **how,
    )


def _fetch(source: Iterator[Any]) -> tuple[Tensor, Tensor] | None:
    """Return the next batch, None at the end.

    A worker's DataError comes back as one line; LaunchError says that a worker was ended.
    """
    try:
        return next(source, None)
    except DataError as error:  # torch puts the worker's traceback before the message
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not (ended := worker_killed_message(error)):
            raise
        raise LaunchError(ended) from None


def _ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy and augment the next batch on a stream of its own while the net has the last one."""
    stream = torch.cuda.Stream(device)

    def load() -> Batch | None:
        with torch.cuda.stream(stream):
            return next(batches, None)

    ready = load()
    while ready is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        ready.images.record_stream(current)  # its memory is not reused before the net is done
        ready.labels.record_stream(current)
        following = load()
        yield ready
        ready = following


class TrainLoader:
    """The training batches of one replica, resumable at any batch of any epoch."""

    def __init__(
        self,
        images: Images,
        order: BatchOrder,
        lens: Augmentation,
        device: torch.device,
        *,
        crops: str,
        workers: int = 0,
    ) -> None:
        self.order = order
        self.lens = lens
        self.device = device
        self.crops = crops
        self.loader = _load(images, device, workers, batch_sampler=order)

    def epoch(self, epoch: int, start: int, noise: float) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from number ``start`` on, augmented on the device."""
        batches = self._batches(epoch, start, noise)
        return _ahead(batches, self.device) if self.device.type == "cuda" else batches

    def _batches(self, epoch: int, start: int, noise: float) -> Iterator[Batch]:
        order = self.order
        order.epoch, order.start = epoch, start
        draws = CropFlipColour.of_epoch(
            order.seed, epoch, order.num_samples, self.lens.border, self.crops
        )
        samples = order.samples()
        source = iter(self.loader)
        for number in range(start, len(order)):
            began = time.perf_counter()
            stored = _fetch(source)
            if stored is None:
                return
            places = order.positions(number)
            read = [samples[places], stored[1], *stored[: number % PIXELS_EVERY == 0]]
            images = stored[0].to(self.device, non_blocking=True)
            labels = stored[1].to(self.device, non_blocking=True)
            ready = self.lens.train(images, draws.at(places), noise)
            yield Batch(ready, labels, time.perf_counter() - began, digest(read))


class TestLoader:
    """Every test image once, shared out over the replicas without padding."""

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
        self.common = len(images) // replicas // batch_size  # batches that every replica has
        own = range(replica, len(images), replicas)
        batches = [
            list(own[first : first + batch_size]) for first in range(0, len(own), batch_size)
        ]
        self.loader = _load(images, device, workers, batch_sampler=batches)

    def __len__(self) -> int:
        """Return the batches of this replica."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield stored images (N, 3, T, T) uint8 and their labels."""
        source = iter(self.loader)
        while (stored := _fetch(source)) is not None:
            yield (
                stored[0].to(self.device, non_blocking=True),
                stored[1].to(self.device, non_blocking=True),
            )


SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where torch's loaders pass their batches
PREFETCHED: Final = 2  # batches a loader process has ready: torch's default


def check_shared_memory(workers: int, batch_bytes: int, processes: int) -> None:
    """Raise LaunchError where the loaders' batches do not fit into /dev/shm.

    A loader that finds no room there dies with a bus error.
    """
    needed = workers * PREFETCHED * batch_bytes * processes
    if not needed or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise LaunchError(
            f"{SHARED_MEMORY}: {workers} loader processes for each of {processes} need "
            f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; make it larger "
            "(docker run --shm-size), or give workers=0"
        )


def worker_killed_message(error: Exception) -> str:
    """Say in one line that a loader's process was ended, if that is what ``error`` says; else "".

    torch says it by a RuntimeError at any place of the main thread, or of who reads the batch;
    the connection by which a batch comes may break before.
    """
    told = f"{error} {error.__cause__ or ''}"
    broken = isinstance(error, (ConnectionError, EOFError)) and "Caught" not in told  # by a worker
    if not broken and "DataLoader worker (pid" not in told:
        return ""
    number = re.search(r"killed by signal: ([\w ]+)", told)
    how = f" by signal: {number[1].strip()}" if number else ""
    return (
        f"a loader process was ended{how}, likely out of memory; "
        f"give fewer workers=, or more memory, also for {SHARED_MEMORY}"
    )
