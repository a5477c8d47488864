"""The published files of ILSVRC-2012: the development kit, and the archives of the images."""

import tarfile
from itertools import pairwise
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from torchvision.datasets import imagenet
from torchvision.datasets.utils import check_integrity

from modelpar.errors import DataError, readable

TRAIN, VAL, KIT = (imagenet.ARCHIVE_META[part][0] for part in ("train", "val", "devkit"))


def development_kit(root: Path) -> tuple[dict[str, list[str]], list[str]] | None:
    """Return the words of each class of ImageNet by its folder, and the classes of ``val``.

    The latter are in the order of the names of the images.  Both are in the development kit, and
    in the ``meta.bin`` that torchvision makes from it.  Returns None if ``root`` has neither;
    raises DataError for a damaged one.
    """
    meta, kit = root / imagenet.META_FILE, root / KIT
    plain = "to use plain folders, whose names are the classes"
    if not meta.exists() and not kit.exists():
        return None
    with TemporaryDirectory() as scratch:  # torchvision writes beside the kit
        place = root if meta.exists() else Path(scratch)
        if place != root:
            with readable(
                f"{kit}: cannot be unpacked", f"download it again, or move it away {plain}"
            ):
                if not check_integrity(kit, imagenet.ARCHIVE_META["devkit"][1]):
                    raise ValueError("its MD5 is not that of the published file")
                (place / KIT).symlink_to(kit.absolute())
                imagenet.parse_devkit_archive(place)
        with readable(f"{meta}: does not hold the names of the classes", f"delete it {plain}"):
            loaded: Any = imagenet.load_meta_file(place)
            words, val = loaded
            return {one: [str(word) for word in text] for one, text in words.items()}, list(val)


def members(path: Path, start: int = 0, length: int = -1) -> list[tuple[str, int, int]]:
    """Return name, offset in ``path`` and bytes of each file of a tar archive, sorted by name.

    The archive is all of ``path``, or the ``length`` bytes from ``start``.  Raises DataError if it
    is damaged, and for a member that is a link or device, or whose name leads out of it.
    """
    end = start + length if start else path.stat().st_size
    found: list[tuple[str, int, int]] = []
    with (
        readable(f"{path}: damaged near byte {start}", "download it again"),
        path.open("rb") as file,
    ):
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or "\0" in member.name:
                    raise DataError(f"{path}: {member.name!r} leads out of the archive; refused")
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise DataError(f"{path}: {member.name!r} is no regular file; refused")
                if member.isreg():
                    found.append((str(name), member.offset_data, member.size))
            # tarfile takes a cut between two members, and a damaged header, for the end.
            file.seek(archive.offset)
            if archive.offset >= end or file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError("no end of the archive")
    found.sort()
    for (name, _, _), (following, _, _) in pairwise(found):
        if name == following:
            raise DataError(f"{path}: has {name!r} more than once; download it again")
    return found
