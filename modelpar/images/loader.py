"""Loaders: batches that are equal on both columns and depend only on seed, epoch and position."""

import resource
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from modelpar.distributed import Mesh, exchange
from modelpar.errors import LaunchError, RunError
from modelpar.images.augment import Augmentation, CropFlipColour, send
from modelpar.images.order import BatchOrder
from modelpar.images.samples import Images, InMemory
from modelpar.seeding import digest

PIXELS_EVERY: Final = 100  # batches; hashing the 25 MB of one takes a few hundredths of a second
AHEAD: Final = 2  # batches that are read while the net uses one
TASKS: Final = 4  # parts of a batch for each thread, so that no thread waits long for another
# Files that a rank holds open, measured: 8 alone and 31 beside others.
RANK_FILES: Final = 12
PAIR_FILES: Final = 32
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


class Reader:
    """Reads batches of stored images in ``workers`` threads, ahead of their use.

    Two columns on one host each read one half of a batch and exchange the halves, if reading
    takes longer than that.  Without threads images are read when they are used.
    """

    def __init__(self, images: Images, mesh: Mesh, workers: int) -> None:
        self.images, self.pinned = images, mesh.device.type == "cuda"
        self.workers, self.pair = workers, mesh.readers if images.needs_decoding else None
        self.pool = ThreadPoolExecutor(workers, "reader") if workers else None

    def read(self, batches: Iterable[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (N, 3, T, T) uint8 and labels (N,) of each batch of sample numbers.

        A collective of the pair.  Raises DataError, PeerLostError.
        """
        ahead = AHEAD if self.pool else 0
        source, reading, arriving = iter(batches), deque[_Reading](), deque[_Reading]()
        try:
            while True:
                free = 1 + ahead - len(reading) - len(arriving)
                reading.extend(map(self._start, islice(source, free)))
                # The exchange of a batch starts one batch before its use.
                while reading and len(arriving) < 1 + (ahead > 0):
                    arriving.append(reading.popleft())
                    arriving[-1].exchange(self.pair)
                if not arriving:
                    return
                yield arriving.popleft().finish()
        finally:  # the memory of what is on its way must not be used again
            with suppress(RunError):
                for batch in arriving:
                    batch.finish()

    def _start(self, rows: Sequence[int]) -> "_Reading":
        """Start to read the images ``rows``, or this column's half of them."""
        side, count = self.images.side, len(rows)
        stored = torch.empty(count, 3, side, side, dtype=torch.uint8, pin_memory=self.pinned)
        halves = [slice(0, count)]
        if self.pair is not None and count > 1:
            halves = [slice(0, count // 2), slice(count // 2, count)]
            halves = halves[:: -1 if self.pair.rank() else 1]
        own, *other = (stored[half] for half in halves)
        mine, tasks = rows[halves[0]], []
        if self.pool is not None:
            step = -(-len(mine) // (self.workers * TASKS)) or 1
            for at in range(0, len(mine), step):
                part = slice(at, at + step)
                tasks.append(self.pool.submit(self.images.read, mine[part], own[part]))
        else:
            self.images.read(mine, own)
        return _Reading(stored, self.images.labels[torch.as_tensor(rows)], own, other, tasks)


@dataclass
class _Reading:
    """A batch that is being read: its images, and the halves that each column reads of it."""

    images: Tensor
    labels: Tensor
    own: Tensor
    other: list[Tensor]  # one, or none if this column reads the whole batch
    tasks: list[Future[None]]
    wait: Callable[[], None] | None = None

    def exchange(self, pair: ProcessGroup | None) -> None:
        """Start to exchange the halves, when this column's own is read; raises its DataError."""
        if pair is not None and self.other:
            self._read()
            _, self.wait = exchange(self.own, pair, self.other[0])

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return images and labels when they are complete."""
        self._read()
        if self.wait is not None:
            self.wait()
        return self.images, self.labels

    def _read(self) -> None:
        for task in self.tasks:
            task.result()


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
    """A training set that is read batch by batch."""

    def __init__(self, reader: Reader, order: BatchOrder, device: torch.device) -> None:
        self.reader, self.order, self.device = reader, order, device

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield stored images and labels on the device, and the digest, from batch ``start``."""
        ids = [*self.order.batches(epoch, start)]
        source = self.reader.read(each.tolist() for each in ids)
        for number, (each, stored) in enumerate(zip(ids, source, strict=True), start):
            images, labels = (send(part, self.device) for part in stored)
            seen = digest([each, stored[1], *stored[: number % PIXELS_EVERY == 0]])
            yield images, labels, seen


def _fits(images: InMemory, device: torch.device) -> bool:
    """Return whether ``images`` are small enough to stay on ``device``, a GPU."""
    if device.type != "cuda":
        return False
    return images.pixels.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


class _Resident:
    """A training set that stays on a GPU, and the digests of its batches.

    A digest with pixels is computed from the host's copy in a thread, while the steps before that
    batch run: the hash takes longer than many steps.
    """

    def __init__(self, images: InMemory, order: BatchOrder, device: torch.device) -> None:
        self.pixels, self.order, self.device = images.pixels, order, device
        self.rows, self.labels = images.rows, images.labels
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
    """The training batches of one replica; it can start at any batch of any epoch.

    If ``resident``, pixels that are in memory or mapped stay on a GPU if they fit, see ``_fits``.
    """

    def __init__(
        self,
        images: Images,
        order: BatchOrder,
        augmentation: Augmentation,
        mesh: Mesh,
        *,
        crops: str,
        workers: int = 0,
        resident: bool = True,
    ) -> None:
        device = mesh.device
        self.order, self.crops = order, crops
        self.augmentation, self.device = augmentation, device
        if resident and isinstance(images, InMemory) and _fits(images, device):
            self.source: _Resident | _Loaded = _Resident(images, order, device)
        else:
            self.source = _Loaded(Reader(images, mesh, workers), order, device)
        # One stream for all epochs: each stream has its own memory.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def epoch(self, epoch: int, start: int, noise: float) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from number ``start``, augmented on the device.

        On a GPU the host never waits for the device.  A collective of ``mesh.readers``, unless
        the images are in memory.  Raises DataError for an unreadable image, PeerLostError.
        """
        batches = self._batches(epoch, start, noise)
        return batches if self.stream is None else _prefetch(batches, self.stream)

    def _batches(self, epoch: int, start: int, noise: float) -> Iterator[Batch]:
        order, border = self.order, self.augmentation.border
        draws = CropFlipColour.of_epoch(order.seed, epoch, order.num_samples, border, self.crops)
        draws, source = draws.to(self.device), self.source.batches(epoch, start)
        for number in range(start, len(order)):
            began = time.perf_counter()
            images, labels, seen = next(source)
            augmented = self.augmentation.train(images, draws.at(order.positions(number)), noise)
            yield Batch(augmented, labels, time.perf_counter() - began, seen)


class TestLoader:
    """Batches of stored images, each image once, divided among the replicas without padding.

    ``rows``: the numbers of the images; None: all.  ``common`` is the number of full batches that
    every replica has.
    """

    __test__ = False  # pytest: not a test

    def __init__(
        self,
        images: Images,
        batch_size: int,
        mesh: Mesh,
        *,
        rows: Sequence[int] | None = None,
        workers: int = 0,
    ) -> None:
        rows = range(len(images)) if rows is None else rows
        self.device, self.batch_size = mesh.device, batch_size
        self.rows = rows[mesh.replica :: mesh.replicas]
        self.common = len(rows) // mesh.replicas // batch_size
        self.reader = Reader(images, mesh, workers)

    def __len__(self) -> int:
        return len(range(0, len(self.rows), self.batch_size))  # batches of this replica

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (N, 3, T, T) uint8 and labels (N,); raises the errors of TrainLoader."""
        size = self.batch_size
        starts = range(0, len(self.rows), size)
        for stored in self.reader.read(self.rows[start : start + size] for start in starts):
            images, labels = (send(part, self.device) for part in stored)
            yield images, labels


def check_open_files(processes: int) -> None:
    """Raise LaunchError if a rank needs more files than the system allows.

    Without this check it would be aborted, or fail when it reads its first batch.
    """
    needed = PAIR_FILES if processes > 1 else RANK_FILES
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if needed > allowed != resource.RLIM_INFINITY:
        raise LaunchError(
            f"a rank opens up to {needed} files, and the system allows {allowed}; raise ulimit -n"
        )
