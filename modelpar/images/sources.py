"""Where the images of a data set are before it is prepared: folders, archives, Parquet files.

Nothing is unpacked.  An image is found by the file that holds its bytes and the place in it.
"""

import csv
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from modelpar.errors import DataError, readable
from modelpar.images.archives import KIT, META, TRAIN, VAL, development_kit, members
from modelpar.images.folders import Listing, check_same_classes, describe, list_part, size_of
from modelpar.images.parquet import ENDING, class_names, find_shards, read_labels, read_row
from modelpar.images.samples import unreadable

SOLUTION: Final = "LOC_val_solution.csv"  # Kaggle: the class of each image of val
MAPPING: Final = "LOC_synset_mapping.txt"  # Kaggle: the words of each class


@dataclass(frozen=True)
class Item:
    """One image of a source: where its bytes are."""

    name: str  # unique in its part; bytes that are no UTF-8 are surrogates, as in os.fsdecode
    label: int
    file: str  # path of the file that holds the bytes: the image itself, an archive, a shard
    offset: int = 0  # of the bytes in an archive; in a Parquet file the number of the row
    num_bytes: int = -1  # -1: not known

    @property
    def where(self) -> str:
        """What an error calls it."""
        own = self.file.endswith(self.name)
        return self.file if own else f"{self.file}: {self.name}"


class Items(Sequence[Item]):
    """Items as numbers and one text: about 70 bytes each, where objects take about 400."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.labels = array("q")
        self._names, self._ends = bytearray(), array("q", [0])
        self._offsets, self._sizes, self._where = array("q"), array("q"), array("q")
        # A file is a place, or a place followed by the name.
        places: dict[tuple[str, bool], int] = {}
        for item in items:
            place = item.file.removesuffix(item.name)
            key = place, place != item.file
            self.labels.append(item.label)
            self._names += os.fsencode(item.name)
            self._ends.append(len(self._names))
            self._offsets.append(item.offset)
            self._sizes.append(item.num_bytes)
            self._where.append(places.setdefault(key, len(places)))
        self._places = list(places)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        """Return one Item, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        name = os.fsdecode(bytes(self._names[self._ends[index] : self._ends[index + 1]]))
        place, followed = self._places[self._where[index]]
        file = place + name if followed else place
        return Item(name, self.labels[index], file, self._offsets[index], self._sizes[index])


@dataclass(frozen=True)
class Source:
    """The images of a data set before they are prepared.

    ``parts``: ``train`` and ``val``, by label and then by name, as in torchvision's ImageFolder;
    of Parquet files in the order of their rows.  ``folders``: what identifies the classes: names
    of folders (of ImageNet: WordNet IDs), or the names of the classes of Parquet files.
    """

    name: str  # of the layout
    parts: Mapping[str, Sequence[Item]]
    classes: list[str]  # as shown
    folders: list[str]
    skipped: str = ""  # as in ImageSet


def open_source(root: Path, layout: str | None = None) -> Source:
    """Return the images in ``root``, in the first of the layouts that it has, or in ``layout``.

    Raises DataError, in one line, if there are none or if a part of them is missing or damaged.
    """
    if not root.is_dir():
        raise DataError(f"data.root={root}: no such folder; use the folder of the images")
    tried = {layout: LAYOUTS[layout]} if layout else LAYOUTS
    try:
        for find, _ in tried.values():
            if source := find(root.absolute()):
                return source
    except OSError as error:
        raise DataError(
            f"{error.filename or root}: cannot be read ({error.strerror or error}); "
            "make it readable, or use another data.root"
        ) from None
    looked_for = "; or ".join(files for _, files in tried.values())
    raise DataError(f"data.root={root}: has none of the known layouts; it needs {looked_for}")


def read(item: Item) -> bytes:
    """Return the bytes of one image; raises DataError with its name.  Safe in any thread."""
    try:
        if item.file.endswith(ENDING):
            content = read_row(item.file, item.offset)
        else:
            with open(item.file, "rb") as file:  # noqa: PTH123 - also of text
                file.seek(item.offset)
                content = file.read(item.num_bytes if item.offset else -1)
    except Exception as error:  # noqa: BLE001 - pyarrow raises many kinds
        raise DataError(unreadable(item.where, error)) from None
    if item.num_bytes not in {-1, len(content)}:
        changed = ValueError(f"it has {len(content)} bytes now, and it had {item.num_bytes}")
        raise DataError(unreadable(item.where, changed))
    return content


# -- folders --------------------------------------------------------------------------------------


def _folders(root: Path) -> Source | None:
    """Return the images of ``train/CLASS`` and ``val/CLASS``."""
    if not (root / "train").is_dir() and not (root / "val").is_dir():
        return None
    train, val = (list_part(root, part, strict=False) for part in ("train", "val"))
    check_same_classes(train, val)
    kit = development_kit(root)
    words = kit[0] if kit else {}
    if unnamed := [folder for folder in val.classes if words and folder not in words]:
        raise DataError(
            f"{val.folder / unnamed[0]}: no class of ImageNet, whose classes {root} names; delete "
            f"the folder, or move {META} or the development kit away"
        )
    parts = {"train": _listed(train), "val": _listed(val)}
    skipped = _skipped(root, train.skipped + val.skipped)
    return Source("folders", parts, _shown(val.classes, words), val.classes, skipped)


def _listed(part: Listing) -> Items:
    start = len(f"{part.folder}/")
    return Items(
        Item(path[start:], label, path, 0, num_bytes)
        for (path, label), num_bytes in zip(part.samples, part.sizes, strict=True)
    )


def _skipped(root: Path, others: Counter[str]) -> str:
    return f"{root}: skipped files: {describe(others)}" if others else ""


def _shown(folders: Sequence[str], words: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the first of the words of each class, or the name of its folder."""
    return [words.get(folder, [folder])[0] for folder in folders]


def _only_classes(place: Path, folders: Iterable[str]) -> Listing:
    return Listing(place, sorted(set(folders)), [], [], Counter())


# -- Kaggle ---------------------------------------------------------------------------------------


def _kaggle(root: Path) -> Source | None:
    """Return the images of ImageNet as Kaggle has them: those of ``val`` are in one folder."""
    bases = [root / inner for inner in ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")]
    base = next((one for one in bases if (one / "train").is_dir() or (one / "val").is_dir()), root)
    tables = [folder / SOLUTION for folder in (base, *base.parents[:3])]
    table = next((one for one in tables if one.is_file()), None)
    if table is None:
        return None
    folder = base / "val"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, and {table.name} names its images; add it")
    with os.scandir(folder) as entries:
        sizes = {
            one.name: -1 if one.is_dir() else size_of(one.path, strict=False) for one in entries
        }
    if -1 in sizes.values():  # someone has sorted the images: they are plain folders
        return None
    train = list_part(base, "train", strict=False)
    with readable(f"{table}: is not Kaggle's table", "download it again"):
        rows = csv.DictReader(table.read_text("utf-8", "surrogateescape").splitlines())
        class_of = {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}
    for name in sorted(class_of.keys() ^ sizes.keys()):
        if name in class_of:
            raise DataError(f"{folder / name}: no such file, and {table.name} names it; add it")
        if name.endswith(".JPEG"):
            raise DataError(f"{folder / name}: not in {table.name}; delete it, or add its line")
    val = _only_classes(folder, class_of.values())
    check_same_classes(train, val)
    label_of = {one: label for label, one in enumerate(val.classes)}
    words: dict[str, list[str]] = {}
    if (mapping := table.with_name(MAPPING)).is_file():
        with readable(f"{mapping}: is not Kaggle's list of classes", "download it again"):
            lines = [line.split(maxsplit=1) for line in mapping.read_text("utf-8").splitlines()]
            words = {one: text.split(", ") for one, text in lines}
    tests = Items(
        Item(name, label_of[one], str(folder / name), 0, sizes[name])
        for name, one in sorted(class_of.items(), key=itemgetter(1, 0))
    )
    others = Counter({"in val": len(sizes) - len(tests)} if len(sizes) > len(tests) else {})
    return Source(
        "kaggle",
        {"train": _listed(train), "val": tests},
        _shown(val.classes, words),
        val.classes,
        _skipped(base, train.skipped + others),
    )


# -- the official archives ------------------------------------------------------------------------


def _archives(root: Path) -> Source | None:
    """Return the images of the archives of ILSVRC-2012, which stay as they are."""
    train, val = root / TRAIN, root / VAL
    if not train.is_file() and not val.is_file():
        return None
    for path in (train, val):
        if not path.is_file():
            raise DataError(f"{path}: no such file; add it, or use folders train and val")
    if (kit := development_kit(root)) is None:
        raise DataError(f"{root / KIT}: no such file; it names the classes of {VAL}")
    words, class_of = kit
    tests = members(val)
    if len(tests) != len(class_of):
        raise DataError(
            f"{val}: {len(tests):,} images, and {KIT} has the classes of {len(class_of):,}; "
            "download it again"
        )
    inner = {member[0].removesuffix(".tar"): member for member in members(train)}
    folders = sorted(inner)
    if strange := next((one for one in folders if inner[one][0] == one), None):
        raise DataError(f"{train}: {strange!r} is no archive of a class; download it again")
    check_same_classes(_only_classes(train, folders), _only_classes(val, class_of))
    label_of = {folder: label for label, folder in enumerate(folders)}
    parts = {
        "train": Items(
            Item(f"{folder}/{name}", label, str(train), offset, num_bytes)
            for label, folder in enumerate(folders)
            for name, offset, num_bytes in members(train, inner[folder])
        ),
        "val": Items(
            Item(name, label_of[folder], str(val), offset, num_bytes)
            for folder, (name, offset, num_bytes) in sorted(zip(class_of, tests, strict=True))
        ),
    }
    return Source("archives", parts, _shown(folders, words), folders)


# -- Parquet files --------------------------------------------------------------------------------


def _parquet(root: Path) -> Source | None:
    """Return the images of a data set of Hugging Face."""
    place = next((one for one in (root / "data", root) if any(one.glob(f"*{ENDING}"))), None)
    if place is None:
        return None
    train, val = (find_shards(place, kinds) for kinds in (("train",), ("validation", "test")))
    classes = class_names(train[0])
    parts = {
        part: Items(
            Item(f"{path.name}/{row}", label, str(path), row)
            for path in shards
            for row, label in enumerate(read_labels(path, classes))
        )
        for part, shards in (("train", train), ("val", val))
    }
    return Source("parquet", parts, classes, classes)


LAYOUTS: Final[dict[str, tuple[Callable[[Path], Source | None], str]]] = {
    "kaggle": (_kaggle, f"ILSVRC/Data/CLS-LOC and {SOLUTION}"),
    "folders": (_folders, "train/CLASS/* and val/CLASS/*"),
    "archives": (_archives, f"{TRAIN}, {VAL} and {KIT}"),
    "parquet": (_parquet, "data/train-*.parquet and data/validation-*.parquet"),
}
