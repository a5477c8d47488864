"""Folders of images: what they hold is listed and checked before an image is read."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import has_magic
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Final
from unicodedata import normalize

from modelpar.errors import DataError
from modelpar.files import matches
from modelpar.images.samples import unreadable

# The endings of images: those of torchvision's ImageFolder, which takes a second to import.
IMG_EXTENSIONS: Final = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Names that the system or a file server adds; they are skipped as those that begin with a dot.
SYSTEM: Final = (
    *("__MACOSX", "@eaDir", "lost+found", "#recycle", "@Recycle", "$RECYCLE.BIN"),
    *("System Volume Information", "__pycache__"),
)
OTHER_NAMES: Final = {"train": ("training",), "val": ("valid", "validation", "test")}
KAGGLE: Final = ("Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # where Kaggle's archive has the parts
NAMED: Final = 3  # how many names an error lists
Entry = os.DirEntry[str]


@dataclass(frozen=True)
class Listing:
    """The images of one part, ``train`` or ``val``, with one class for each folder in it."""

    folder: Path
    classes: list[str]  # names of the folders, sorted
    samples: list[tuple[str, int]]  # path and label, in the order of torchvision's ImageFolder
    sizes: list[int]  # bytes of each image
    skipped: Counter[str]  # files that are no samples, by ending


def list_part(root: Path, part: str, *, strict: bool = True) -> Listing:
    """Return the images of ``root/part``, also those of folders in the folder of a class.

    Raises DataError if a class has no image, if there is only one class, and for what cannot be
    read: a folder or file without permission, an empty file, a broken link, a link to a parent.
    Unless ``strict``, a file like this has the size 0.
    """
    folder = root / part
    if not folder.is_dir():
        raise DataError(f"data.root={root}: no folder {part}; {_advice(root, part)}")
    entries, skipped = _visible(str(folder))
    names = [entry.name for entry in entries if entry.is_dir()]
    loose = [entry.name for entry in entries if not entry.is_dir()]
    if len(names) <= 1:
        raise DataError(_too_few(folder, names, sum(map(_is_image, loose))))
    skipped.update("outside the class folders" for _ in loose)
    found = Listing(folder, names, [], [], skipped)
    above = frozenset(map(_identity, (root, folder)))
    for label, name in enumerate(names):
        before, others = len(found.samples), Counter[str]()
        for _, files, hidden in sorted(
            _walk(str(folder / name), above, strict=strict), key=itemgetter(0)
        ):
            others += hidden
            for entry in files:
                if not _is_image(entry.name):
                    others[Path(entry.name).suffix.lower() or "without an ending"] += 1
                    continue
                found.samples.append((entry.path, label))
                found.sizes.append(size_of(entry.path, strict=strict))
        if len(found.samples) == before:
            reason = f"only {describe(others)}" if others else "it is empty"
            raise DataError(
                f"{folder / name}: a class without an image ({reason}); images end in "
                f"{', '.join(IMG_EXTENSIONS)}; convert them, or delete the folder"
            )
        skipped.update(others)
    return found


def find_images(patterns: Sequence[str]) -> list[str]:
    """Return the paths of the images that files, folders and globs name, each once.

    A folder stands for the images in it and in its folders, which end in one of
    ``IMG_EXTENSIONS``; so do the files of a glob.  A file has any name.  Raises DataError for a
    pattern that names none, and for a folder that cannot be read.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        exists = os.path.lexists(pattern)
        images: list[str] = []
        for place in matches(pattern):
            if Path(place).is_dir():
                below = _walk(place, frozenset(), strict=False)
                for _, files, _ in sorted(below, key=itemgetter(0)):
                    images += [entry.path for entry in files if _is_image(entry.name)]
            elif exists or _is_image(place):
                images.append(place)
        if not images:
            reason = "no image there" if exists or has_magic(pattern) else "no such file or folder"
            raise DataError(
                f"images={pattern}: {reason}; use files, or folders and globs with names that end "
                f"in {', '.join(IMG_EXTENSIONS)}"
            )
        found |= dict.fromkeys(images)
    return list(found)


def describe(skipped: Counter[str]) -> str:
    """Return the number of skipped files of each ending."""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {ending}" for ending, count in ordered)


def check_same_classes(train: Listing, val: Listing) -> None:
    """Raise DataError, with the first name that only one of both has."""
    only = sorted(set(train.classes) ^ set(val.classes))
    if not only:
        return
    name = only[0]
    has, lacks = (train, val) if name in train.classes else (val, train)
    twin = next((other for other in lacks.classes if same_to_a_reader(name, other)), None)
    if twin is not None:
        raise DataError(
            f"{has.folder}: the class {name!a} is {twin!a} in {lacks.folder.name}, "
            "which differs in Unicode form, case or blanks; rename one of them"
        )
    raise DataError(
        f"{has.folder}: the class {name!r} is not in {lacks.folder.name}; "
        "use the same classes in train and val"
    )


def same_to_a_reader(one: str, other: str) -> bool:
    """Return whether two names differ at most in Unicode form, case or outer blanks."""
    first, second = (normalize("NFKC", name).casefold().strip() for name in (one, other))
    return first == second


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> tuple[int, str, str] | None:
    """Return the first label whose class differs, and both names as they are shown; else None."""
    for label in range(max(len(ours), len(theirs))):
        one, other = (names[label] if label < len(names) else None for names in (ours, theirs))
        if one != other:
            alike = one is not None and other is not None and same_to_a_reader(one, other)
            show = ascii if alike else repr
            first, second = ("absent" if name is None else show(name) for name in (one, other))
            return label, first, second
    return None


# -- what is in a folder --------------------------------------------------------------------------


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)  # noqa: PTH116 - also of text
    return found.st_dev, found.st_ino


def _visible(folder: str, *, strict: bool = True) -> tuple[list[Entry], Counter[str]]:
    """Return the sorted entries that are not hidden, and the number of those that are."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=attrgetter("name"))
        visible = [one for one in entries if one.name[0] != "." and one.name not in SYSTEM]
        for entry in visible:
            if entry.is_symlink() and (strict or not _is_image(entry.name)):
                entry.stat()  # raises for a link to nothing
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}); fix or delete it"
        ) from None
    hidden = len(entries) - len(visible)
    return visible, Counter({"hidden": hidden} if hidden else {})


def _walk(
    folder: str, above: frozenset[tuple[int, int]], *, strict: bool
) -> Iterator[tuple[str, list[Entry], Counter[str]]]:
    """Yield ``folder`` and each folder below, with its files and the number of hidden ones."""
    entries, hidden = _visible(folder, strict=strict)
    here = _identity(folder)
    if here in above:
        raise DataError(f"{folder}: links to a folder that contains it; delete the link")
    yield folder, [entry for entry in entries if not entry.is_dir()], hidden
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, above | {here}, strict=strict)


def size_of(path: str, *, strict: bool = True) -> int:
    """Return the bytes of an image; 0 or, if ``strict``, DataError if it cannot be read."""
    size = 0
    try:
        found = os.stat(path)  # noqa: PTH116 - also of text
        size, reason = found.st_size, "" if found.st_size else "it is empty"
        if not stat.S_ISREG(found.st_mode):
            reason = "it is no regular file"
        elif not os.access(path, os.R_OK):
            reason = "permission denied"
    except OSError as error:  # also of a broken link
        reason = str(error.strerror)
    if reason and strict:
        raise DataError(unreadable(path, ValueError(reason)))
    return 0 if reason else size


# -- advice ---------------------------------------------------------------------------------------


def _shown(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + more


def _advice(root: Path, part: str) -> str:
    """Return what to do where ``root`` has no folder ``part``."""
    entries, _ = _visible(str(root))
    inner = [Path(entry.path) for entry in entries if entry.is_dir()]
    for place in (root.parent, *inner, *(root / below for below in KAGGLE)):
        with suppress(DataError):  # of a folder that nobody has named
            if any(one.is_dir() for one in _visible(str(place / part))[0]):
                return f"use data.root={place}"
    for place in inner:
        if place.name.lower() in {part, *OTHER_NAMES[part]}:
            return f"rename its folder {place.name!r} to {part}"
    there = f"it has {_shown([entry.name for entry in entries])}" if entries else "it is empty"
    advice = "use a folder with train/CLASS/* and val/CLASS/*"
    if any(entry.name.endswith(".tar") for entry in entries):
        advice += ", or modelpar-prepare, which reads archives"
    return f"{there}; {advice}"


def _too_few(folder: Path, names: Sequence[str], images: int) -> str:
    """Return the message for a part with no class, or only one."""
    if not names:
        advice = f"sort them into {folder.name}/CLASS" if images else "use one folder for each"
        return f"{folder}: {images:,} images and no folders of classes; {advice}"
    inner = [entry.name for entry in _visible(str(folder / names[0]))[0] if entry.is_dir()]
    if inner:
        return (
            f"{folder}: one class only, {names[0]!r}, which has the folders {_shown(inner)}; "
            f"move these up into {folder.name}, so that each is a class"
        )
    return f"{folder}: one class only, {names[0]!r}; use two or more"
