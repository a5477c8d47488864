"""The data sets by name: where their images are, and their classes."""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch

from modelpar.errors import FULL, DataError, SettingsError, one_line, readable, refuse_choice
from modelpar.groups import DataSettings
from modelpar.images.archives import development_kit
from modelpar.images.folders import check_same_classes, describe, list_part
from modelpar.images.photos import photos
from modelpar.images.samples import ImageSet, InMemory, Resized, sha256
from modelpar.images.sources import Source, open_source
from modelpar.images.statistics import locked
from modelpar.images.store import SKIPPED, open_store
from modelpar.seeding import generator

# Differs: the paper stores images of 256 pixels for crops of 224 (section 4.1); other crop sizes
# keep that ratio.
STORED_PER_CROP: Final = 256 / 224
# Caffe's crops are of its own size.  Differs: Caffe squeezes an image into a square; here its
# central square is used.
CAFFE_CROP, CAFFE_STORED = 227, 256
DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")


# -- data sets on the disk -----------------------------------------------------------------------


def _folder(settings: DataSettings, cache: Path) -> Path:
    """Return ``data.root``, or the download folder; raises DataError if there is neither."""
    download = ", or data.download=true" if settings.name in DOWNLOADS else ""
    if settings.root is not None:
        root = Path(settings.root)
        if not root.is_dir() and not settings.download:
            raise DataError(
                f"data.root={root}: no such folder; use the folder of {settings.name}{download}"
            )
        return root
    if settings.download:
        return cache / "downloads"
    raise DataError(f"data={settings.name}: use data.root=FOLDER{download}")


def _torchvision_errors(
    settings: DataSettings, root: Path, title: str
) -> AbstractContextManager[None]:
    """Raise DataError for any error of torchvision while it finds or downloads its files."""
    if settings.download:
        advice = "check the network, or use data.root=FOLDER without data.download"
        return readable(f"data.download=true: cannot download {title} into {root}", advice)
    advice = "use the folder that contains it, or data.download=true"
    return readable(f"data.root={root}: no {title} there", advice)


def stored_size(image_size: int) -> int:
    """Return the side of the images from which crops of ``image_size`` pixels are cut."""
    return CAFFE_STORED if image_size == CAFFE_CROP else round(image_size * STORED_PER_CROP)


def _in_memory(
    settings: DataSettings, root: Path, title: str, build: Callable[[str], Any]
) -> ImageSet:
    """Return two torchvision data sets, whose items are (PIL image, label), as an ImageSet.

    ``build`` returns that of ``train`` or of ``val``.
    """
    with _torchvision_errors(settings, root, title):
        train, test = build("train"), build("val")
        content = sha256(np.asarray(train.data).tobytes(), np.asarray(test.data).tobytes())
    size = stored_size(settings.image_size)
    fingerprint = sha256(content.encode(), str(size).encode())
    images, tests = (
        Resized(lambda index, part=part: part[index][0], part.targets, size)
        for part in (train, test)
    )
    return ImageSet(settings.name, images, tests, train.classes, size, fingerprint)


def _in_folders(
    settings: DataSettings,
    root: Path,
    parts: Sequence[str],
    *,
    within: str = "",
    names: Mapping[str, Sequence[str]] | None = None,
) -> ImageSet:
    """Return the images of the folders ``root/within/PART/CLASS``.

    ``names``: those of a class by its folder, of which the first is shown.  Raises DataError.
    """
    found = {part: list_part(root / within, part) for part in parts}
    val = found["val"]
    train = found.get("train", replace(val, samples=[], sizes=[], skipped=Counter()))
    check_same_classes(train, val)
    classes = val.classes
    if names is not None:
        if unnamed := [folder for folder in classes if folder not in names]:
            raise DataError(
                f"{val.folder / unnamed[0]}: no class of {settings.name}; delete the folder, or "
                f"use data=imagefolder data.root={root / within}"
            )
        classes = [names[folder][0] for folder in classes]
    size = stored_size(settings.image_size)
    content = "\n".join(
        f"{path.removeprefix(str(root)).lstrip('/')} {label} {num_bytes}"
        for part in (train, val)
        for (path, label), num_bytes in zip(part.samples, part.sizes, strict=True)
    )
    fingerprint = sha256(content.encode(errors="surrogateescape"), str(size).encode())
    images, tests = (
        Resized(
            lambda index, one=one: one.samples[index][0], [label for _, label in one.samples], size
        )
        for one in (train, val)
    )
    others = train.skipped + val.skipped
    skipped = f"{root / within}: skipped files: {describe(others)}" if others else ""
    return ImageSet(
        settings.name,
        images,
        tests,
        classes,
        size,
        fingerprint,
        folders=val.classes,
        skipped=skipped,
    )


def cifar10(settings: DataSettings, cache: Path) -> ImageSet:
    """CIFAR-10: 50,000 and 10,000 images of 32 pixels, enlarged."""
    from torchvision import datasets  # noqa: PLC0415 - takes a second

    root = _folder(settings, cache)

    def build(part: str) -> Any:
        return datasets.CIFAR10(root, part == "train", download=settings.download)

    return _in_memory(settings, root, "CIFAR-10", build)


def _imagenette(
    settings: DataSettings, cache: Path
) -> tuple[Path, str, Mapping[str, Sequence[str]]]:
    """Return the folder that contains Imagenette's, its name and the names of the classes."""
    from torchvision import datasets  # noqa: PLC0415 - takes a second

    root, within = _folder(settings, cache), "imagenette2-320"
    if not (root / within).is_dir():
        with _torchvision_errors(settings, root, within):
            if settings.download:
                root.mkdir(parents=True, exist_ok=True)
            # Moved when it is whole: torchvision takes any folder of that name for all images.
            with TemporaryDirectory(dir=root) if settings.download else nullcontext(root) as place:
                datasets.Imagenette(place, size="320px", download=settings.download)
                Path(place, within).rename(root / within)
    # By folder; torchvision has no public name for them.
    return root, within, vars(datasets.Imagenette)["_WNID_TO_CLASS"]


def imagenette(settings: DataSettings, cache: Path, parts: Sequence[str]) -> ImageSet:
    """Imagenette: ten classes of ImageNet, shorter side 320 pixels as published by fast.ai."""
    root, within, names = _imagenette(settings, cache)
    return _in_folders(settings, root, parts, within=within, names=names)


def imagefolder(settings: DataSettings, cache: Path, parts: Sequence[str]) -> ImageSet:
    """Folders ``train`` and ``val``, each with one folder of images per class."""
    return _in_folders(settings, _folder(settings, cache), parts)


def imagenet(settings: DataSettings, cache: Path, parts: Sequence[str]) -> ImageSet:
    """ILSVRC-2012 in folders ``train`` and ``val``, with or without its development kit."""
    root = _folder(settings, cache)
    kit = development_kit(root)
    return _in_folders(settings, root, parts, names=kit and kit[0])


def packed(settings: DataSettings, cache: Path) -> ImageSet:
    """A store that ``modelpar-prepare`` wrote, with its own mean image."""
    found = open_store(_folder(settings, cache))
    skipped = f"{found.root / SKIPPED}: {found.skipped} images that could not be decoded"
    return ImageSet(
        settings.name,
        found.part("train"),
        found.part("val"),
        found.classes,
        found.size,
        found.fingerprint,
        folders=found.folders,
        skipped=skipped if found.skipped else "",
        statistics=found.statistics(),
    )


def fashion_mnist(settings: DataSettings, cache: Path) -> ImageSet:
    """Fashion-MNIST: torchvision's layout, or the folder of Debian's package."""
    from torchvision import datasets  # noqa: PLC0415 - takes a second

    debian = settings.root is None and not settings.download and DEBIAN_FASHION_MNIST.is_dir()
    root = DEBIAN_FASHION_MNIST if debian else _folder(settings, cache)
    packed = list(root.glob("*-ubyte.gz"))  # as in Debian's package
    with TemporaryDirectory() if packed else nullcontext(root) as place:
        for path in packed:
            _unpack(path, Path(place, "FashionMNIST", "raw", path.stem))

        def build(part: str) -> Any:
            return datasets.FashionMNIST(place, part == "train", download=settings.download)

        return _in_memory(settings, root, "Fashion-MNIST", build)


def _unpack(path: Path, to: Path) -> None:
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot read IDX file ({one_line(error)}); download or install it again"
        ) from None
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(content)


# -- synthetic ------------------------------------------------------------------------------------

SYNTHETIC_STEPS: Final = 1000  # steps per epoch


def synthetic(settings: DataSettings, seed: int, batch: int) -> ImageSet:
    """Noise with random labels, for benchmarks only: one batch, repeated in each step."""
    source = generator(seed, "synthetic")
    size = stored_size(settings.image_size)
    num_classes = settings.num_classes or 1000
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=source)
    labels = torch.randint(0, num_classes, (batch,), generator=source).tolist()
    train = InMemory(images, labels, [*range(batch)] * SYNTHETIC_STEPS)
    test = InMemory(images, labels, range(batch))
    classes = [str(number) for number in range(num_classes)]
    fingerprint = sha256(repr((seed, batch, size, num_classes)).encode())
    return ImageSet("synthetic", train, test, classes, size, fingerprint, may_shuffle=False)


# -- opening a set by its name --------------------------------------------------------------------

SETS: Final[dict[str, Callable[[DataSettings, Path], ImageSet]]] = {
    "photos": photos,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "packed": packed,
}
IN_FOLDERS: Final = {"imagenette": imagenette, "imagefolder": imagefolder, "imagenet": imagenet}
DOWNLOADS: Final = ("fashion_mnist", "cifar10", "imagenette")
WITHOUT_FOLDER: Final = ("photos", "synthetic")


@contextmanager
def _reading(settings: DataSettings, cache: Path) -> Generator[None]:
    """Lock the downloads, if there is one; raises DataError for files that cannot be read."""
    if settings.download and settings.name not in DOWNLOADS:
        raise SettingsError(
            f"data.download=true: data={settings.name} has no download; use data.root=FOLDER"
        )
    try:
        with locked(cache / "download.lock") if settings.download else nullcontext():
            yield
    except OSError as error:
        if error.errno in FULL:
            raise
        raise DataError(
            f"{error.filename or settings.root}: cannot be read ({error.strerror or error}); "
            "make it readable, or use another data.root"
        ) from None


def _check_classes(settings: DataSettings, number: int, group: str) -> None:
    """Raise SettingsError if the images have not the number of classes that the settings want."""
    if settings.num_classes not in {None, number}:
        raise SettingsError(
            f"data={settings.name}: has {number} classes, not {settings.num_classes}; "
            f"use {group}.num_classes={number}"
        )


def open_images(settings: DataSettings, cache: Path) -> Source:
    """Return the images of a set of folders, archives or Parquet files as they are.

    Raises the errors of ``open_set``.
    """
    if settings.name not in IN_FOLDERS:
        raise SettingsError(
            f"data={settings.name or 'null'}: nothing to prepare; use one of "
            + ", ".join(f"data={name}" for name in IN_FOLDERS)
        )
    with _reading(settings, cache):
        if settings.name == "imagenette":
            root, within, names = _imagenette(settings, cache)
            source = open_source(root / within, "folders")
            shown = [names.get(folder, [folder])[0] for folder in source.folders]
            source = replace(source, classes=shown)
        else:
            source = open_source(_folder(settings, cache))
    _check_classes(settings, len(source.folders), "data")
    return source


def open_set(
    settings: DataSettings, cache: Path, seed: int = 0, batch: int = 128, *, train: bool = True
) -> ImageSet:
    """Return the data set ``settings.name``; downloads into ``cache`` happen under a file lock.

    ``seed`` and ``batch`` (images per step, of all replicas) determine the synthetic images.
    Without ``train`` a set of folders needs no training images, and has none.
    Raises DataError if images are missing or damaged, SettingsError if the name, the number of
    classes or the image size does not fit.
    """
    if settings.root is not None and settings.name in WITHOUT_FOLDER:
        raise SettingsError(
            f"data.root={settings.root}: data={settings.name} reads no folder; use "
            "data=imagefolder or another data set, or leave data.root out"
        )
    if settings.name == "synthetic":
        found = synthetic(settings, seed, batch)
    elif settings.name in SETS or settings.name in IN_FOLDERS:
        parts = ("train", "val") if train else ("val",)
        with _reading(settings, cache):
            if settings.name in SETS:
                found = SETS[settings.name](settings, cache)
            else:
                found = IN_FOLDERS[settings.name](settings, cache, parts)
    else:
        refuse_choice("data", settings.name, (*SETS, *IN_FOLDERS, "synthetic"))
    _check_classes(settings, len(found.classes), "model")
    if found.stored_size < settings.image_size:
        raise SettingsError(
            f"model.image_size={settings.image_size}: data={found.name} is stored at "
            f"{found.stored_size} pixels; use {found.stored_size} or less"
        )
    return found
