"""The published files of ILSVRC-2012: the development kit, and the archives of the images."""

import tarfile
from itertools import pairwise
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Final

from modelpar.errors import DataError, readable

TRAIN: Final = "ILSVRC2012_img_train.tar"
VAL: Final = "ILSVRC2012_img_val.tar"
KIT: Final = "ILSVRC2012_devkit_t12.tar.gz"
META: Final = "meta.bin"  # torchvision's
AGAIN: Final = "download it again"
Member = tuple[str, int, int]  # name, offset in the file and bytes


def development_kit(root: Path) -> tuple[dict[str, list[str]], list[str]] | None:
    """Return the words of each class of ImageNet by its folder, and the classes of ``val``.

    The latter are in the order of the names of the images.  Both are in the development kit, and
    in the ``meta.bin`` that torchvision makes from it.  Returns None if ``root`` has neither;
    raises DataError for a damaged one.
    """
    meta, kit = root / META, root / KIT
    plain = "to use plain folders, whose names are the classes"
    if not meta.exists() and not kit.exists():
        return None
    from torchvision.datasets import imagenet  # noqa: PLC0415 - takes a second
    from torchvision.datasets.utils import check_integrity  # noqa: PLC0415

    with TemporaryDirectory() as scratch:  # torchvision writes beside the kit
        place = root if meta.exists() else Path(scratch)
        if place != root:
            with readable(f"{kit}: cannot be unpacked", f"{AGAIN}, or move it away {plain}"):
                if not check_integrity(kit, imagenet.ARCHIVE_META["devkit"][1]):
                    raise ValueError("its MD5 is not that of the published file")
                (place / KIT).symlink_to(kit.absolute())
                imagenet.parse_devkit_archive(place)
        with readable(f"{meta}: does not hold the names of the classes", f"delete it {plain}"):
            loaded: Any = imagenet.load_meta_file(place)
            words, val = loaded
            if not all(text and not isinstance(text, str) for text in words.values()):
                raise ValueError("the names of a class are missing")
            return {one: [str(word) for word in text] for one, text in words.items()}, list(val)


def members(path: Path, inner: Member | None = None) -> list[Member]:
    """Return the files of an uncompressed tar archive, sorted by name.

    The archive is the file ``path``, or ``inner``, a member of it; offsets are always those in
    ``path``.  Raises DataError if it is damaged or empty, and for a member that is a link or a
    device, or whose name leads out of the archive.
    """
    name, start, length = inner or ("", 0, path.stat().st_size)
    where = f"{path}: {name}" if inner else str(path)
    found: list[Member] = []
    with readable(f"{where}: cannot be read as a tar archive", AGAIN), path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            for member in archive:
                inside = PurePosixPath(member.name)
                if inside.is_absolute() or ".." in inside.parts or "\0" in member.name:
                    raise DataError(f"{where}: {member.name!r} leads out of the archive; {AGAIN}")
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise DataError(f"{where}: {member.name!r} is no regular file; {AGAIN}")
                if member.isreg():
                    found.append((str(inside), member.offset_data, member.size))
            # tarfile takes a cut between two members, and a damaged header, for the end.
            file.seek(archive.offset)
            if archive.offset >= start + length or any(file.read(tarfile.BLOCKSIZE)):
                raise ValueError("its end is missing")
        if not found:
            raise ValueError("it has no files")
    found.sort()
    for (one, _, _), (following, _, _) in pairwise(found):
        if one == following:
            raise DataError(f"{where}: has {one!r} more than once; {AGAIN}")
    return found
