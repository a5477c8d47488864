"""A packed store: a data set decoded, scaled and cut once, in a few large files.

``DIR/manifest.json`` is written last: a folder without it is not finished.  Each part, ``train``
and ``val``, has ``PART.images``, either pixels (N, 3, T, T) uint8 (``raw``) or N JPEG files one
after the other (``jpeg``), whose places are in ``PART.offsets.npy``, (N + 1,) int64.
``PART.labels.npy``, (N,) int64, has the labels, and ``PART.names`` the names of the images in
their source, each followed by a NUL.  ``statistics.safetensors`` has the mean image and the colour
axes of the training images, and ``skipped.txt`` the names of images that could not be decoded.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from modelpar.errors import DataError, one_line, readable
from modelpar.files import atomic_write, fsync_folder
from modelpar.images.augment import Statistics
from modelpar.images.samples import Images, InMemory, decode_jpeg, sha256
from modelpar.progress import progress_bar

FORMAT: Final = "modelpar packed store"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
JOURNAL: Final = "journal.jsonl"  # of a store that is not finished
STATISTICS: Final = "statistics.safetensors"
SKIPPED: Final = "skipped.txt"
PARTS: Final = ("train", "val")
FILES: Final = ("images", "offsets.npy", "labels.npy", "names")  # of each part
AGAIN: Final = "copy the store again, or prepare it again"


@dataclass(frozen=True)
class Block:
    """Images that are hashed together."""

    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """The images of ``train`` or ``val`` as the manifest lists them."""

    images: int
    bytes: int
    blocks: Sequence[Block]

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> "Part":
        """Return the part that has these blocks."""
        return cls(sum(one.images for one in blocks), sum(one.bytes for one in blocks), blocks)


@dataclass(frozen=True)
class File:
    """A file besides the images: its size and its hash."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Store:
    """A finished store; the fields are those of the manifest."""

    root: Path
    images: str  # raw | jpeg
    size: int  # side of an image in pixels
    name: str  # of the data set
    source: str  # its layout
    origin: str  # hash of the names, labels and sizes of the images in the source
    quality: int  # of JPEG files
    prepared_by: Mapping[str, str]  # versions of modelpar, Pillow and torch
    classes: Sequence[str]  # as they are shown
    folders: Sequence[str]  # what tells them apart, see ``ImageSet.folders``
    skipped: int  # images that could not be decoded
    parts: Mapping[str, Part]
    files: Mapping[str, File]

    @property
    def fingerprint(self) -> str:
        """A hash of all images and labels."""
        blocks = [block.sha256 for part in PARTS for block in self.parts[part].blocks]
        labels = [self.files[f"{part}.labels.npy"].sha256 for part in PARTS]
        return sha256(" ".join([*blocks, *labels]).encode())

    def part(self, name: str) -> Images:
        """Return the images of ``train`` or ``val``; raises DataError."""
        return (_pixels if self.images == "raw" else JpegImages)(self, name)

    def statistics(self) -> Statistics:
        """Return the mean image and colour axes of the training images; raises DataError."""
        path = self.root / STATISTICS
        with readable(f"{path}: damaged", AGAIN):
            found = safetensors.torch.load_file(path)
            return Statistics(*(found[key] for key in ("mean", "std", "axes")))

    def names(self, part: str) -> list[str]:
        """Return the names that the images of a part had in their source."""
        content = (self.root / f"{part}.names").read_bytes()
        return [os.fsdecode(name) for name in content.split(b"\0")[:-1]]


# -- images ---------------------------------------------------------------------------------------


def _pixels(store: Store, part: str) -> InMemory:
    """Return the images of a raw store; their pixels are the memory map of its file."""
    shape = (store.parts[part].images, 3, store.size, store.size)
    with warnings.catch_warnings():  # torch: that the map must not be written
        warnings.simplefilter("ignore", UserWarning)
        pixels = torch.from_numpy(
            np.memmap(store.root / f"{part}.images", np.uint8, "r", shape=shape)
        )
    return InMemory(pixels, _labels(store, part), range(len(pixels)))


class JpegImages(Images):
    """Images that are JPEG files one after the other; several threads may read them at once."""

    def __init__(self, store: Store, part: str) -> None:
        self.store, self.part, self.side = store, part, store.size
        self.labels = _labels(store, part)
        path = store.root / f"{part}.offsets.npy"
        with readable(f"{path}: damaged", AGAIN):
            offsets = np.load(path)
            images, end = store.parts[part].images, store.parts[part].bytes
            if offsets.shape != (images + 1,) or offsets[0] or offsets[-1] != end:
                raise ValueError("not the places of its images")
        self.offsets = offsets
        self.file = (store.root / f"{part}.images").open("rb", buffering=0)

    def image(self, index: int) -> Tensor:
        """Return one image (3, T, T) uint8; raises DataError if it cannot be decoded."""
        first, end = int(self.offsets[index]), int(self.offsets[index + 1])
        try:
            content = os.pread(self.file.fileno(), end - first, first)
            pixels = decode_jpeg(content)
            return torch.from_numpy(pixels.reshape(self.side, self.side, 3)).permute(2, 0, 1)
        except Exception as error:  # noqa: BLE001 - decoders raise almost any
            name = self.store.names(self.part)[index]
            raise DataError(
                f"{self.store.root}: image {index} of {self.part}, {name!r}, cannot be read "
                f"({one_line(error)}); {AGAIN}"
            ) from None


def _labels(store: Store, part: str) -> Tensor:
    """Return the labels (N,) int64 of a part; raises DataError."""
    path = store.root / f"{part}.labels.npy"
    with readable(f"{path}: damaged", AGAIN):
        labels = torch.from_numpy(np.load(path))
        number = len(store.classes)
        if (
            labels.shape != (store.parts[part].images,)
            or not 0 <= labels.min() <= labels.max() < number
        ):
            raise ValueError(f"not the labels of its images, of {number} classes")
    return labels


# -- opening and checking -------------------------------------------------------------------------


def read_manifest(root: Path) -> Store | None:
    """Return what ``root`` holds, or None if it has no manifest; raises DataError."""
    path = root / MANIFEST
    if not path.exists():
        return None
    with readable(f"{path}: damaged", AGAIN):
        fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if fields.pop("format") != FORMAT:
            raise ValueError(f"no {FORMAT}")
        if (version := fields.pop("version")) != VERSION:
            raise DataError(
                f"{path}: has version {version} of the format, and this modelpar reads "
                f"{VERSION}; use a newer modelpar"
            )
        parts = {
            name: Part(**part | {"blocks": [Block(**block) for block in part["blocks"]]})
            for name, part in fields.pop("parts").items()
        }
        files = {name: File(**file) for name, file in fields.pop("files").items()}
        return Store(root, **fields, parts=parts, files=files)


def write_manifest(store: Store) -> None:
    """Write the manifest of a store whose other files are complete; raises OSError."""
    fields = {key: value for key, value in asdict(store).items() if key != "root"}
    content = {"format": FORMAT, "version": VERSION, **fields}
    atomic_write(store.root / MANIFEST, json.dumps(content, indent=1) + "\n")
    fsync_folder(store.root)


def open_store(root: Path, key: str = "data.root") -> Store:
    """Return the store in ``root``, whose files have the right sizes.

    Raises DataError, with the setting ``key`` that names the folder.
    """
    store = read_manifest(root)
    if store is None:
        begun = "is not finished; run the same modelpar-prepare again, which continues"
        none = "has no packed store; use the folder that modelpar-prepare wrote"
        raise DataError(f"{key}={root}: {begun if (root / JOURNAL).exists() else none}")
    sizes = {name: file.bytes for name, file in store.files.items()}
    sizes |= {f"{name}.images": part.bytes for name, part in store.parts.items()}
    for name, size in sizes.items():
        found = (root / name).stat().st_size if (root / name).is_file() else None
        if found != size:
            has = "is missing" if found is None else f"has {found} bytes and not {size}"
            raise DataError(f"{root / name}: {has}; {AGAIN}")
    return store


def verify(store: Store, *, progress: bool = False) -> None:
    """Read all files; raises DataError that names the first file or block that has changed."""
    for name, file in store.files.items():
        if sha256((store.root / name).read_bytes()) != file.sha256:
            raise DataError(f"{store.root / name}: has changed; {AGAIN}")
    total = sum(part.bytes for part in store.parts.values())
    with progress_bar(
        total=total, desc="verify", unit="B", unit_scale=True, shown=progress
    ) as bar:
        for name, part in store.parts.items():
            image = byte = 0
            with (store.root / f"{name}.images").open("rb") as file:
                for block in part.blocks:
                    last_image, last_byte = image + block.images - 1, byte + block.bytes - 1
                    if sha256(file.read(block.bytes)) != block.sha256:
                        raise DataError(
                            f"{file.name}: bytes {byte} to {last_byte}, which are images {image} "
                            f"to {last_image}, have changed; {AGAIN}"
                        )
                    image, byte = last_image + 1, last_byte + 1
                    bar.update(block.bytes)
