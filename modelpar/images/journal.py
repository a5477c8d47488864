"""A packed store that is being made: what is written, and how it continues after a stop.

A commit flushes the blocks that were written to the disk, appends a line for each to
``journal.jsonl``, and then replaces ``sums.safetensors``, which has the number of committed blocks
and the sums that the statistics need.  A preparation that was stopped in any way cuts the files to
what was committed and continues there, so it ends with the same bytes.
"""

import json
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from modelpar.errors import FULL, CheckpointError, SettingsError, readable
from modelpar.files import atomic_write, fsync_folder
from modelpar.images.store import JOURNAL, PARTS, Block

COMMIT_SECONDS: Final = 2.0  # of work that a stop may lose
SUMS: Final = "sums.safetensors"
LOCK: Final = "lock"
FREED_WITHIN: Final = 10.0  # s by which the lock of a killed process may outlive it, on NFS
AGAIN: Final = "delete the folder, and prepare the images again"


@dataclass(frozen=True)
class Line:
    """A block of images as the journal lists it.

    ``lengths``: bytes of each image.  ``skipped``: the images that could not be decoded, by their
    place in the block, with the reason.  ``source``: hash of the names, labels and sizes of all
    images of the block in the source.
    """

    part: str
    block: Block
    lengths: list[int]
    skipped: list[tuple[int, str]]
    source: str


@dataclass(frozen=True)
class Sums:
    """Sums over images: ``pixels`` (3, T, T) int64, ``colours`` (3, 3) int64 of their products."""

    pixels: Tensor
    colours: Tensor

    @classmethod
    def none(cls, size: int) -> Self:
        """Return the sums over no image."""
        shapes = ((3, size, size), (3, 3))
        return cls(*(torch.zeros(shape, dtype=torch.int64) for shape in shapes))

    def add(self, other: "Sums") -> None:
        """Add the sums over other images."""
        self.pixels.add_(other.pixels)
        self.colours.add_(other.colours)


class Journal:
    """An unfinished store in ``root``: opens what was begun there, or begins a new one.

    ``identity`` must be equal whenever it continues.  ``committed``: number of blocks that are
    written already.  Raises SettingsError if another store was begun there, DataError if what was
    written is damaged.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], size: int) -> None:
        self.root, self.sums, self.committed = root, Sums.none(size), 0
        self.waiting: list[Line] = []
        self.last = time.monotonic()
        for unfinished in root.glob(".*.part"):  # of workers and atomic writes that were stopped
            unfinished.unlink()
        if (root / SUMS).exists():
            self._read(identity)
        else:
            atomic_write(root / JOURNAL, json.dumps(identity) + "\n")
        with ExitStack() as stack:
            names = [JOURNAL, *(f"{part}.images" for part in PARTS)]
            self.files = {name: stack.enter_context((root / name).open("ab")) for name in names}
            self.close = stack.pop_all().close
        if not self.committed:
            for part in PARTS:
                self.files[f"{part}.images"].truncate(0)

    def _read(self, identity: Mapping[str, Any]) -> None:
        """Read what was committed, and cut the files to it."""
        path = self.root / JOURNAL
        with readable(f"{path}: damaged", AGAIN), path.open(encoding="utf-8") as file:
            refuse_other(self.root, "was begun", json.loads(next(file)), identity)
        with readable(f"{self.root}: damaged", AGAIN):
            with safe_open(self.root / SUMS, "pt") as file:
                self.committed = int(file.metadata()["blocks"])
                self.sums = Sums(**{key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            sizes = dict.fromkeys((f"{part}.images" for part in PARTS), 0)
            for line in self.lines():
                sizes[f"{line.part}.images"] += line.block.bytes
            sizes[JOURNAL] = self._end()
            for name, size in sizes.items():
                if (found := (self.root / name).stat().st_size) < size:
                    raise ValueError(f"{name} is too short")
                if found > size:
                    os.truncate(self.root / name, size)

    def _end(self) -> int:
        """Return the bytes of the journal up to the last committed block."""
        with (self.root / JOURNAL).open("rb") as file:
            return sum(len(next(file)) for _ in range(self.committed + 1))

    def lines(self) -> Iterator[Line]:
        """Yield the committed blocks, in their order."""
        with (self.root / JOURNAL).open(encoding="utf-8") as file:
            next(file)
            for _ in range(self.committed):
                fields = json.loads(next(file))
                yield Line(**fields | {"block": Block(**fields["block"])})

    def add(self, line: Line, content: bytearray, sums: Sums | None) -> None:
        """Write a block, and commit if the last commit was some time ago; raises OSError."""
        self.files[f"{line.part}.images"].write(content)
        if sums is not None:
            self.sums.add(sums)
        self.waiting.append(line)
        if time.monotonic() - self.last > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Commit all blocks that are written; raises OSError."""
        if self.waiting:
            for part in PARTS:
                _flush(self.files[f"{part}.images"])
            for line in self.waiting:
                self.files[JOURNAL].write(json.dumps(asdict(line)).encode() + b"\n")
            _flush(self.files[JOURNAL])
            self.committed += len(self.waiting)
            self.waiting.clear()
            self._save()
        self.last = time.monotonic()

    def _save(self) -> None:
        metadata = {"blocks": str(self.committed)}
        atomic_write(self.root / SUMS, safetensors.torch.save(vars(self.sums), metadata))
        fsync_folder(self.root)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def delete_journal(root: Path) -> None:
    """Delete what only an unfinished store needs."""
    for name in (SUMS, JOURNAL, LOCK):
        (root / name).unlink(missing_ok=True)


def refuse_other(root: Path, what: str, has: Mapping[str, Any], wants: Mapping[str, Any]) -> None:
    """Raise SettingsError for the first setting in which a store differs from the wanted one."""
    for key, value in wants.items():
        if has.get(key) != value:
            differs = "other images" if key == "images" else f"{key}={has.get(key)}, not {value}"
            raise SettingsError(
                f"out={root}: {what} with {differs}; use another folder, or the images and "
                "settings that it was made with"
            )


@contextmanager
def locked(root: Path) -> Generator[None]:
    """Create ``root`` and lock it for this process; raises CheckpointError."""
    lock = FileLock(root / LOCK)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=FREED_WITHIN)  # the system frees it when this process ends in any way
        yield
    except Timeout:
        raise CheckpointError(
            f"out={root}: in use by another modelpar-prepare; wait for it or use another folder"
        ) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CheckpointError(
            f"out={root}: {error.strerror}; free some space and start the same command again, "
            "which continues"
        ) from None
    finally:
        lock.release()
