"""Blocks of images, prepared in worker processes: decoded, scaled, cut, and hashed."""

import io
import os
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from modelpar import environment
from modelpar.errors import DataError, LaunchError, one_line
from modelpar.images.journal import Line, Sums
from modelpar.images.samples import hide_warnings, sha256, square, unreadable
from modelpar.images.sources import Item, read
from modelpar.images.store import Block
from modelpar.shutdown import SIGNALS

BLOCK: Final = 256  # images that one worker decodes at a time, and that are hashed together
AHEAD: Final = 2  # blocks per worker that are decoded or wait to be written
QUALITY: Final = 95  # of JPEG files, as in make-data of the released code


@dataclass(frozen=True)
class Task:
    """A block of images to prepare; ``skip`` those that cannot be decoded, or raise DataError."""

    part: str
    items: Sequence[Item]
    size: int
    images: str  # raw | jpeg
    skip: bool


def pack(task: Task) -> tuple[Line, bytearray, Sums | None]:
    """Decode, scale and cut a block of images; return its bytes, and of train its sums.

    The sums are those of the pixels before they become JPEG files.  Raises DataError.
    """
    pixel_sums = torch.zeros(3, task.size, task.size, dtype=torch.int32)
    colour_sums = torch.zeros(3, 3, dtype=torch.float64)  # exact: far below 2 ** 53
    colours = torch.empty(3, task.size**2, dtype=torch.float64)
    content, lengths, skipped = bytearray(), list[int](), list[tuple[int, str]]()
    for place, item in enumerate(task.items):
        found = read(item) if item.num_bytes else b""
        try:
            if not found:
                raise ValueError("it is empty or cannot be opened")  # noqa: TRY301
            with Image.open(io.BytesIO(found)) as opened:
                pixels = square(opened, task.size)
        except MemoryError:  # not the fault of the image
            raise
        except Exception as error:  # noqa: BLE001 - Pillow's decoders raise almost any
            reason = one_line(error).partition(" <_io.BytesIO")[0]  # and where that is in memory
            if not task.skip:
                line = unreadable(item.where, ValueError(reason))
                raise DataError(f"{line}, or use bad=skip") from None
            skipped.append((place, reason))
            continue
        if task.part == "train":
            pixel_sums += pixels
            colours.copy_(pixels.flatten(1))
            colour_sums.addmm_(colours, colours.T)
        before = len(content)
        content += pixels.numpy().data if task.images == "raw" else _jpeg(pixels)
        lengths.append(len(content) - before)
    block = Block(len(lengths), len(content), sha256(content))
    line = Line(task.part, block, lengths, skipped, hash_of(task.items))
    sums = Sums(pixel_sums.long(), colour_sums.long()) if task.part == "train" else None
    return line, content, sums


def _jpeg(pixels: Tensor) -> memoryview:
    file, image = io.BytesIO(), Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.save(file, "JPEG", quality=QUALITY, subsampling=0, comment=b"")
    return file.getbuffer()


def hash_of(items: Sequence[Item]) -> str:
    """Return a hash of the names, labels and sizes of images in their source."""
    texts = [f"{item.name}\0{item.label}\0{item.num_bytes}\0" for item in items]
    return sha256("".join(texts).encode(errors="surrogateescape"))


# -- worker processes -----------------------------------------------------------------------------


def packed(
    tasks: Iterator[Task], workers: int, folder: Path
) -> Generator[tuple[Line, bytearray, Sums | None]]:
    """Yield the blocks in their order, made by so many processes; 0: by this one.

    Workers leave their blocks in files of ``folder``: with a pipe this process would wait for ever
    if a worker is killed while it writes.  Raises DataError, and LaunchError for a killed worker.
    """
    if not workers:
        _set_up()
        yield from map(pack, tasks)
        return
    waiting = deque[tuple[Path, Future[Line]]]()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    try:
        for number, task in enumerate(tasks):
            waiting.append(_submit(pool, task, folder / f".block-{number}.part"))
            if len(waiting) == AHEAD * workers:
                yield _received(*waiting.popleft())
        while waiting:
            yield _received(*waiting.popleft())
    except BrokenProcessPool:
        raise LaunchError(
            "a worker process was killed, probably out of memory; use fewer workers, and the same "
            "command continues"
        ) from None
    finally:
        with suppress(RuntimeError):  # of a thread that could not be started; that is the error
            pool.shutdown(cancel_futures=True)
        for path, _ in waiting:
            path.unlink(missing_ok=True)


def _start_worker() -> None:
    """Prepare a worker, which ends with its parent."""
    environment.exit_with_parent()
    if (parent := parent_process()) is not None and parent.pid != os.getppid():
        sys.exit()  # it has ended already
    _set_up()


def _set_up() -> None:
    torch.set_num_threads(1)
    hide_warnings()


def _submit(pool: ProcessPoolExecutor, task: Task, path: Path) -> "tuple[Path, Future[Line]]":
    """Start on a task.  A worker that this starts gets no signals of the terminal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS) - {signal.SIGTERM})
    try:
        return path, pool.submit(_pack_to, task, path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pack_to(task: Task, path: Path) -> Line:
    """Write a block and its sums to ``path``; return its line."""
    line, content, sums = pack(task)
    with path.open("wb") as file:
        file.write(content)
        if sums is not None:
            file.write(safetensors.torch.save(vars(sums)))
    return line


def _received(path: Path, made: "Future[Line]") -> tuple[Line, bytearray, Sums | None]:
    """Return a block that a worker has made, and delete its file."""
    try:
        line = made.result()
        content = bytearray(line.block.bytes)
        with path.open("rb") as file:
            file.readinto(content)
            sums = safetensors.torch.load(file.read()) if line.part == "train" else None
        return line, content, Sums(**sums) if sums else None
    finally:
        path.unlink(missing_ok=True)
