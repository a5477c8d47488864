"""Loaders: batches that are equal on both columns and depend only on seed, epoch and position."""

import re
import resource
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from modelpar.errors import DataError, LaunchError
from modelpar.images.augment import Augmentation, CropFlipColour, send
from modelpar.images.order import BatchOrder
from modelpar.images.samples import Images, InMemory
from modelpar.seeding import digest
from modelpar.shutdown import ignore_signals

PIXELS_EVERY: Final = 100  # batches; hashing the 25 MB of one takes a few hundredths of a second
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - torch's loaders pass their batches here
PREFETCHED: Final = 2  # batches that a loader process keeps ready: torch's default
# Files that a rank holds open, measured: 8 alone and 31 beside others.  For a loader process there
# are two loaders, for training and for tests, each with four ends of pipes and PREFETCHED batches
# of two tensors.
RANK_FILES: Final = 12
PAIR_FILES: Final = 32
WORKER_FILES: Final = 2 * (4 + PREFETCHED * 2)
# Of a GPU's free memory, for images that stay there.  The rest is for the net and its maps.  Of
# 8 GB it is 500 MB; photos has 12 MB, and synthetic 100 MB at batch 512 and 224 pixels.
RESIDENT_SHARE: Final = 1 / 16


@dataclass(frozen=True)
class Batch:
    """A batch on its device; ``waited`` is the time in s that the step waited for it.

    ``digest`` is a hash of what was read.  It must be equal on all columns; otherwise they would
    train on different images.
    """

    images: Tensor  # (N, 3, S, S), of the augmentation's type
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


def _prefetch(batches: Iterator[Batch], stream: torch.cuda.Stream) -> Iterator[Batch]:
    """Copy and augment the next batch on a second CUDA stream while the net uses the current."""

    def load() -> Batch | None:
        with torch.cuda.stream(stream):
            return next(batches, None)

    ready = load()
    while ready is not None:
        current = torch.cuda.current_stream(stream.device)
        current.wait_stream(stream)
        ready.images.record_stream(current)  # so that its memory is not reused while in use
        ready.labels.record_stream(current)
        following = load()
        yield ready
        ready = following


class _Loaded:
    """A training set that is read batch by batch, by torch's loader."""

    def __init__(
        self, images: Images, order: BatchOrder, device: torch.device, workers: int
    ) -> None:
        self.order, self.device = order, device
        self.loader = _data_loader(images, device, workers, order)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield stored images and labels on the device, and the digest, from batch ``start``."""
        order = self.order
        order.epoch, order.start = epoch, start
        samples, source = order.samples(epoch), iter(self.loader)
        for number in range(start, len(order)):
            if (stored := _next(source)) is None:
                return
            images, labels = (part.to(self.device, non_blocking=True) for part in stored)
            ids = samples[order.positions(number)]
            seen = digest([ids, stored[1], *stored[: number % PIXELS_EVERY == 0]])
            yield images, labels, seen


def _fits(images: InMemory, device: torch.device) -> bool:
    """Return whether ``images`` are small enough to stay on ``device``, a GPU."""
    if device.type != "cuda":
        return False
    return images.images.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


class _Resident:
    """A training set that stays on a GPU, and the digests of its batches.

    A digest with pixels is computed from the host's copy in a thread, while the steps before that
    batch run: the hash takes longer than many steps.
    """

    def __init__(self, images: InMemory, order: BatchOrder, device: torch.device) -> None:
        self.pixels, self.order, self.device = images.images, order, device
        self.rows = torch.tensor(images.rows)
        self.labels = torch.tensor(images.labels)[self.rows]  # of each sample
        held = (self.pixels, self.rows, self.labels)
        self.held = [part.to(device) for part in held]
        self.thread = ThreadPoolExecutor(1)
        self.started: dict[tuple[int, int], Future[int]] = {}  # by epoch and batch

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield stored images and labels on the device, and the digest, from batch ``start``."""
        samples, (pixels, rows, labels) = self.order.samples(epoch), self.held
        sent = send(samples, self.device)
        for number in range(start, len(self.order)):
            chosen, ids = (some[self.order.positions(number)] for some in (sent, samples))
            stored = pixels[rows[chosen]].expand(-1, 3, -1, -1)
            if number % PIXELS_EVERY:
                seen = digest([ids, self.labels[ids]])
            else:
                seen = self._digest_with_pixels(epoch, number)
            yield stored, labels[chosen], seen

    def _digest_with_pixels(self, epoch: int, number: int) -> int:
        """Return the digest of a batch and start on that of the next one with pixels."""
        following = number + PIXELS_EVERY
        ahead = (epoch, following) if following < len(self.order) else (epoch + 1, 0)
        this = self.started.get((epoch, number)) or self.thread.submit(self._hash, epoch, number)
        self.started = {ahead: self.thread.submit(self._hash, *ahead)}
        return this.result()

    def _hash(self, epoch: int, number: int) -> int:
        ids = self.order.samples(epoch)[self.order.positions(number)]
        return digest([ids, self.labels[ids], self.pixels[self.rows[ids]].expand(-1, 3, -1, -1)])


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
        if isinstance(images, InMemory) and _fits(images, device):
            self.source: _Resident | _Loaded = _Resident(images, order, device)
        else:
            self.source = _Loaded(images, order, device, workers)
        # One stream for all epochs: each stream has its own memory.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def epoch(self, epoch: int, start: int, noise: float) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from number ``start``, augmented on the device.

        On a GPU the host never waits for the device.  Raises DataError for an unreadable image,
        LaunchError for a killed loader process.
        """
        batches = self._batches(epoch, start, noise)
        return batches if self.stream is None else _prefetch(batches, self.stream)

    def _batches(self, epoch: int, start: int, noise: float) -> Iterator[Batch]:
        order, border = self.order, self.augmentation.border
        draws = CropFlipColour.of_epoch(order.seed, epoch, order.num_samples, border, self.crops)
        draws, source = draws.to(self.device), self.source.batches(epoch, start)
        for number in range(start, len(order)):
            began = time.perf_counter()
            if (stored := next(source, None)) is None:
                return
            images, labels, seen = stored
            augmented = self.augmentation.train(images, draws.at(order.positions(number)), noise)
            yield Batch(augmented, labels, time.perf_counter() - began, seen)


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


def check_open_files(workers: int, processes: int) -> None:
    """Raise LaunchError if the ranks' loaders need more files than the system allows.

    Without this check a rank would be aborted, or fail when it reads its first batch.
    """
    needed = (PAIR_FILES if processes > 1 else RANK_FILES) + workers * WORKER_FILES
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if needed > allowed != resource.RLIM_INFINITY:
        fewer = ", or use fewer workers" if workers else ""
        raise LaunchError(
            f"a rank with workers={workers} opens up to {needed} files, and the system allows "
            f"{allowed}; raise ulimit -n{fewer}"
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
