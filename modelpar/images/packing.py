"""``modelpar-prepare``: makes a packed store from the images of a source."""

import io
import os
import signal
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors.torch
import torch

import modelpar
from modelpar import config, device
from modelpar.errors import DataError, LaunchError, SettingsError, StoppedError, say
from modelpar.files import atomic_write, check_space
from modelpar.images import sets
from modelpar.images.augment import principal_colours
from modelpar.images.blocks import BLOCK, QUALITY, Task, hash_of, packed
from modelpar.images.journal import (
    LOCK,
    SUMS,
    Journal,
    Line,
    delete_journal,
    locked,
    refuse_other,
)
from modelpar.images.samples import sha256
from modelpar.images.sources import Source
from modelpar.images.store import (
    FILES,
    JOURNAL,
    PARTS,
    SKIPPED,
    STATISTICS,
    Block,
    File,
    Part,
    Store,
    open_store,
    read_manifest,
    verify,
    write_manifest,
)
from modelpar.progress import progress_bar
from modelpar.schemas import PrepareSettings
from modelpar.shutdown import Request, signals_noted


def prepare(settings: PrepareSettings) -> None:
    """Make the packed store ``settings.out``, or continue it; nothing is done if it is finished.

    If it ``only_verifies``, a finished store is only read.

    Raises SettingsError if the folder holds something else, DataError for damaged images,
    CheckpointError for a full disk, StoppedError after a signal.
    """
    root = Path(settings.out)
    if settings.only_verifies:
        made = open_store(root, "out")
    else:
        source = sets.open_images(settings.data, config.cache_dir(settings.cache_dir))
        if source.skipped:
            say(source.skipped)
        if (made := _finished(settings, source)) is None:
            with locked(root), signals_noted() as request:
                made = _finished(settings, source) or _make(settings, source, request)
                delete_journal(root)
    if settings.verify:
        verify(open_store(root), progress=settings.progress)
    images = " + ".join(f"{made.parts[part].images:,}" for part in PARTS)
    size = sum(part.bytes for part in made.parts.values()) / 1e6
    skipped = f"{made.skipped} skipped, see {root / SKIPPED}; " if made.skipped else ""
    print(  # noqa: T201
        f"{root}: {images} images, {size:,.0f} MB; {skipped}"
        f"train with modelpar-train data=packed data.root={root}"
    )


def _finished(settings: PrepareSettings, source: Source) -> Store | None:
    """Return the store if it is finished; raises SettingsError if ``out`` holds something else."""
    root = Path(settings.out)
    made = read_manifest(root)
    if made is None:
        ours = {LOCK, JOURNAL, SUMS, STATISTICS, SKIPPED}
        ours |= {f"{part}.{name}" for part in PARTS for name in FILES}
        found = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        if others := [name for name in found if name not in ours and name[0] != "."]:
            raise SettingsError(f"out={root}: holds {others[0]!r}; use a new folder")
        return None
    has = {"format": made.images, "size": made.size, "images": made.origin}
    blocks = (hash_of(task.items) for task in _tasks(settings, source))
    wants = {"format": settings.format, "size": settings.size, "images": _origin(source, blocks)}
    refuse_other(root, "holds a store", has, wants)
    return made


def _tasks(settings: PrepareSettings, source: Source) -> Iterator[Task]:
    for part in PARTS:
        items = source.parts[part]
        for start in range(0, len(items), BLOCK):
            chosen = items[start : start + BLOCK]
            yield Task(part, chosen, settings.size, settings.format, settings.bad == "skip")


def _origin(source: Source, blocks: Iterable[str]) -> str:
    """Return the hash of all images and classes, from the hashes of the blocks."""
    classes = "".join(f"{name}\0" for name in source.folders)
    return sha256(classes.encode(errors="surrogateescape"), "".join(blocks).encode())


def _make(settings: PrepareSettings, source: Source, request: Request) -> Store:
    """Write the store, from its first block that is not committed."""
    root, size = Path(settings.out), settings.size
    versions = {
        "modelpar": modelpar.__version__,
        "pillow": PIL.__version__,  # decodes
        "torch": str(torch.__version__),  # scales
    }
    identity = {"format": settings.format, "size": size, "images": _origin(source, []), **versions}
    workers = device.num_cores() if settings.workers is None else settings.workers
    total, skipped = sum(map(len, source.parts.values())), Counter[str]()
    with closing(Journal(root, identity, size)) as journal:
        tasks, done = _tasks(settings, source), 0
        for line in journal.lines():
            task = next(tasks, None)
            if task is None or hash_of(task.items) != line.source:
                refuse_other(root, "was begun", {}, {"images": ""})
            done += len(line.lengths) + len(line.skipped)
            _check_skipped(settings, source, line, skipped)
        if settings.format == "raw":
            check_space(root, (total - done) * 3 * size**2, "the rest of the store", "out")
        with (
            progress_bar(
                total=total, initial=done, desc="prepare", unit="image", shown=settings.progress
            ) as bar,
            closing(packed(tasks, workers, root)) as made,
        ):
            try:
                for line, content, sums in made:
                    _check_skipped(settings, source, line, skipped)
                    journal.add(line, content, sums)
                    done += len(line.lengths) + len(line.skipped)
                    bar.update(done - bar.n)
                    if request.signal:
                        break
            except LaunchError:
                if not request.signal:  # which may have ended the workers, too
                    raise
        journal.commit()
        if done < total:
            raise StoppedError(
                f"stopped by {signal.Signals(request.signal).name}: {done:,} of {total:,} images "
                "are prepared; the same command continues"
            )
        return _finish(settings, source, journal, versions)


def _check_skipped(
    settings: PrepareSettings, source: Source, line: Line, skipped: Counter[str]
) -> None:
    """Count the skipped images of a block; raises DataError if they are too many in its part."""
    if not line.skipped:
        return
    skipped[line.part] += len(line.skipped)
    number, total = skipped[line.part], len(source.parts[line.part])
    share = settings.max_bad if settings.bad == "skip" else 0
    if number > share * total:
        raise DataError(
            f"{number} of {total} images of {line.part} cannot be decoded, the last because: "
            f"{line.skipped[-1][1]}; fix or delete them, or use bad=skip and a larger max_bad"
        )


def _finish(
    settings: PrepareSettings, source: Source, journal: Journal, versions: Mapping[str, str]
) -> Store:
    """Write what follows from the journal, and the manifest last."""
    root, files, bad = Path(settings.out), dict[str, File](), list[str]()
    blocks = {part: list[Block]() for part in PARTS}
    names = {part: bytearray() for part in PARTS}
    labels, lengths = ({part: array("q") for part in PARTS} for _ in range(2))
    origin = list[str]()
    for line, task in zip(journal.lines(), _tasks(settings, source), strict=True):
        part, reasons = line.part, dict(line.skipped)
        blocks[part].append(line.block)
        lengths[part].extend(line.lengths)
        origin.append(line.source)
        for place, item in enumerate(task.items):
            if place in reasons:
                bad.append(f"{part}\t{item.name!r}\t{reasons[place]}\n")
                continue
            names[part] += os.fsencode(item.name) + b"\0"
            labels[part].append(item.label)

    def write(name: str, content: bytes) -> None:
        atomic_write(root / name, content)
        files[name] = File(len(content), sha256(content))

    for part in PARTS:
        write(f"{part}.names", bytes(names[part]))
        write(f"{part}.labels.npy", _npy(np.array(labels[part])))
        if settings.format == "jpeg":
            write(f"{part}.offsets.npy", _npy(np.cumsum([0, *lengths[part]])))
    pixels = len(labels["train"]) * settings.size**2
    moments = journal.sums.colours.double() / pixels
    mean = journal.sums.pixels.double() / len(labels["train"])
    centre = mean.flatten(1).mean(1)
    tensors = vars(principal_colours(mean, moments))
    covariance = moments - torch.outer(centre, centre)
    write(STATISTICS, safetensors.torch.save({**tensors, "covariance": covariance}))
    if bad:
        write(SKIPPED, "".join(bad).encode(errors="backslashreplace"))
    made = Store(
        root,
        images=settings.format,
        size=settings.size,
        name=settings.data.name,
        source=source.name,
        origin=_origin(source, origin),
        quality=QUALITY,
        prepared_by=versions,
        classes=source.classes,
        folders=source.folders,
        skipped=len(bad),
        parts={part: Part.of(blocks[part]) for part in PARTS},
        files=files,
    )
    write_manifest(made)
    return made


def _npy(values: "np.ndarray[Any, Any]") -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()
