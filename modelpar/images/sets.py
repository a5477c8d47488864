"""The data sets by name: where their images are, and their classes."""

import gzip
import hashlib
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2.functional import to_image

from modelpar.errors import DataError, SettingsError, one_line, refuse_choice
from modelpar.images.samples import ImageSet, InMemory, Resized, unreadable
from modelpar.images.statistics import locked
from modelpar.seeding import generator
from modelpar.settings import DataSettings

# Differs: the paper stores images of 256 pixels for crops of 224 (section 4.1); other crop sizes
# keep that ratio.
STORED_PER_CROP: Final = 256 / 224
DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")


# -- photos ---------------------------------------------------------------------------------------

# The photographs in the scikit-image wheel, by the names of the functions that return them.
PHOTOGRAPHS: Final = (
    "astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle", "hubble_deep_field",
    "retina", "immunohistochemistry", "camera", "brick", "grass", "gravel", "coins", "moon",
)  # fmt: skip
CELL: Final = 96  # pixels: the stored size; a crop of 64 is always inside one cell
FLAT: Final = 8.0  # cells whose grey standard deviation is below this are dropped (sky, black)
TEST_SHARE: Final = 5  # one cell in five is held out
TRAIN_PER_CLASS: Final = 160  # an epoch is then 17 batches of 128
TEST_PER_CLASS: Final = 72  # one of 1008 images is 0.1 %, and a test takes about a second
WINDOW: Final = 80  # pixels of a test image: ten views of 64 pixels differ in it


def _cells(photograph: Tensor) -> Tensor:
    """Cut (3, H, W) uint8 into the cells (N, 3, 96, 96) of a grid, without the flat ones."""
    grid = photograph.unfold(1, CELL, CELL).unfold(2, CELL, CELL)
    cells = grid.permute(1, 2, 0, 3, 4).flatten(0, 1)
    return cells[cells.float().mean(1).flatten(1).std(1) >= FLAT].contiguous()


def _windows(cell: Tensor, count: int, side: int, *keys: str | int) -> Tensor:
    """Cut a cell (3, 96, 96) into ``count`` windows (count, 3, side, side), always the same.

    They are at different places that are drawn at random, if there are that many places.
    """
    room = CELL - side + 1
    places = torch.randperm(room**2, generator=generator(0, "photos", "windows", *keys)).tolist()
    corners = (divmod(place, room) for place in islice(cycle(places), count))
    return torch.stack([cell[:, top : top + side, left : left + side] for top, left in corners])


def photos(settings: DataSettings, cache: Path) -> ImageSet:
    """Crops of 14 photographs of the scikit-image wheel; the class is the photograph.

    Each photograph is cut into the cells of a grid, and a fifth of its cells is held out, so no
    test pixel is ever trained on.  All classes have equal weight: the training cells of small
    photographs are repeated, and their test cells are cut into more windows.
    """
    del cache
    from skimage import data  # noqa: PLC0415 - takes half a second, and only this set needs it

    cells: list[Tensor] = []
    labels: list[int] = []
    train: list[int] = []
    windows: list[Tensor] = []
    groups: list[int] = []
    side = min(CELL, max(WINDOW, settings.image_size))  # larger ones are refused later
    for label, name in enumerate(PHOTOGRAPHS):
        try:
            pixels: Any = getattr(data, name)()
        except (OSError, ModuleNotFoundError, AttributeError) as error:
            raise DataError(
                f"data=photos: scikit-image has no {name} in its wheel ({one_line(error)}); "
                "install scikit-image again"
            ) from None
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # left eye of the stereo pair
        found = _cells(to_image(np.array(pixels)).expand(3, -1, -1))
        order = torch.randperm(len(found), generator=generator(0, "photos", name)).tolist()
        rows = [len(labels) + place for place in order]
        held_out = max(2, len(found) // TEST_SHARE)
        cells.append(found)
        labels += [label] * len(found)
        train += islice(cycle(rows[held_out:]), TRAIN_PER_CLASS)
        for number, place in enumerate(order[:held_out]):
            count = len(range(number, TEST_PER_CLASS, held_out))  # equal shares, but for one
            windows.append(_windows(found[place], count, side, name, number))
            groups += [rows[number]] * count
    images, test = torch.cat(cells), torch.cat(windows)
    test_labels = [labels[cell] for cell in groups]
    fingerprint = _digest(
        *(part.numpy().tobytes() for part in (images, test)), repr(train).encode()
    )
    return ImageSet(
        "photos",
        InMemory(images, labels, train),
        InMemory(test, test_labels, range(len(test))),
        PHOTOGRAPHS,
        CELL,
        fingerprint,
        test_groups=groups,
    )


# -- data sets in folders ------------------------------------------------------------------------


def _folder(settings: DataSettings, cache: Path) -> Path:
    """Return ``data.root``, or the download folder; raises DataError if there is neither."""
    if settings.root is not None:
        root = Path(settings.root).expanduser()
        if not root.is_dir() and not settings.download:
            raise DataError(
                f"data.root={root}: no such folder; use the folder of {settings.name}, "
                "or data.download=true"
            )
        return root
    if settings.download:
        return cache / "downloads"
    raise DataError(f"data={settings.name}: use data.root=FOLDER, or data.download=true")


def _stored_size(settings: DataSettings) -> int:
    return round(settings.image_size * STORED_PER_CROP)


def _torchvision(
    settings: DataSettings, root: Path, title: str, build: Callable[[str], Any]
) -> ImageSet:
    """Return two torchvision data sets, whose items are (PIL image, label), as an ImageSet.

    ``build`` returns that of ``train`` or of ``val``; its errors become one DataError.
    """
    try:
        train, test = build("train"), build("val")
    except (AssertionError, OSError, RuntimeError, ValueError, UnpicklingError) as error:
        raise DataError(
            f"data.root={root}: no {title} there ({one_line(error)[:200]}); use the folder that "
            "contains it, or data.download=true"
        ) from None
    size = _stored_size(settings)
    # Each class of ImageNet has several names, of which the first is kept.
    classes = [name if isinstance(name, str) else name[0] for name in train.classes]
    if test.classes != train.classes:
        raise DataError(
            f"data.root={root}: train and test have different classes; use the same classes"
        )
    if hasattr(train, "samples"):  # paths and labels
        train, test = train.samples, test.samples
        try:
            content = "\n".join(
                f"{Path(path).relative_to(root)} {label} {Path(path).stat().st_size}"
                for path, label in [*train, *test]
            )
        except OSError as error:  # a broken link, as git-annex leaves
            raise DataError(unreadable(error.filename, error)) from None
    else:  # all in memory
        content = _digest(np.asarray(train.data).tobytes(), np.asarray(test.data).tobytes())
    train, test = (Resized(part.__getitem__, len(part), size) for part in (train, test))
    fingerprint = _digest(content.encode(errors="surrogateescape"), str(size).encode())
    return ImageSet(settings.name, train, test, classes, size, fingerprint)


def cifar10(settings: DataSettings, cache: Path) -> ImageSet:
    """CIFAR-10: 50,000 and 10,000 images of 32 pixels, enlarged."""
    root = _folder(settings, cache)

    def build(part: str) -> Any:
        return datasets.CIFAR10(root, part == "train", download=settings.download)

    return _torchvision(settings, root, "CIFAR-10", build)


def imagenette(settings: DataSettings, cache: Path) -> ImageSet:
    """Imagenette: ten classes of ImageNet, shorter side 320 pixels as published by fast.ai."""
    root = _folder(settings, cache)
    download = settings.download and not (root / "imagenette2-320").is_dir()

    def build(part: str) -> Any:
        found: Any = datasets.Imagenette(root, part, size="320px", download=download)
        found.samples = found._samples  # noqa: SLF001 - it has no public name
        return found

    return _torchvision(settings, root, "Imagenette", build)


def imagefolder(settings: DataSettings, cache: Path) -> ImageSet:
    """Folders ``train`` and ``val``, each with one folder of images per class."""
    root = _folder(settings, cache)
    return _torchvision(
        settings, root, settings.name, lambda part: datasets.ImageFolder(root / part)
    )


def imagenet(settings: DataSettings, cache: Path) -> ImageSet:
    """ILSVRC-2012: torchvision's layout with the development kit, or plain train and val."""
    root = _folder(settings, cache)
    if not any((root / name).exists() for name in ("meta.bin", "ILSVRC2012_devkit_t12.tar.gz")):
        return imagefolder(settings, cache)
    return _torchvision(settings, root, "ImageNet", lambda part: datasets.ImageNet(root, part))


def fashion_mnist(settings: DataSettings, cache: Path) -> ImageSet:
    """Fashion-MNIST: torchvision's layout, or the folder of Debian's package."""
    debian = settings.root is None and not settings.download and DEBIAN_FASHION_MNIST.is_dir()
    root = DEBIAN_FASHION_MNIST if debian else _folder(settings, cache)
    packed = list(root.glob("*-ubyte.gz"))  # as in Debian's package
    with TemporaryDirectory() if packed else nullcontext(root) as place:
        for path in packed:
            _unpack(path, Path(place, "FashionMNIST", "raw", path.stem))

        def build(part: str) -> Any:
            return datasets.FashionMNIST(place, part == "train", download=settings.download)

        return _torchvision(settings, root, "Fashion-MNIST", build)


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
    size = _stored_size(settings)
    num_classes = settings.num_classes or 1000
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=source)
    labels = torch.randint(0, num_classes, (batch,), generator=source).tolist()
    train = InMemory(images, labels, [*range(batch)] * SYNTHETIC_STEPS)
    test = InMemory(images, labels, range(batch))
    classes = [str(number) for number in range(num_classes)]
    fingerprint = _digest(repr((seed, batch, size, num_classes)).encode())
    return ImageSet("synthetic", train, test, classes, size, fingerprint, shuffled=False)


# -- opening a set by its name --------------------------------------------------------------------

SETS: Final[dict[str, Callable[[DataSettings, Path], ImageSet]]] = {
    "photos": photos,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "imagenette": imagenette,
    "imagefolder": imagefolder,
    "imagenet": imagenet,
}


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def open_set(settings: DataSettings, cache: Path, seed: int = 0, batch: int = 128) -> ImageSet:
    """Return the data set ``settings.name``; downloads into ``cache`` happen under a file lock.

    ``seed`` and ``batch`` (images per step, of all replicas) determine the synthetic images.
    Raises DataError if images are missing or damaged, SettingsError if the name, the number of
    classes or the image size does not fit.
    """
    if settings.name == "synthetic":
        found = synthetic(settings, seed, batch)
    elif settings.name in SETS:
        with locked(cache / "download.lock") if settings.download else nullcontext():
            found = SETS[settings.name](settings, cache)
    else:
        refuse_choice("data", settings.name, (*SETS, "synthetic"))
    wanted = settings.num_classes
    if wanted is not None and wanted != len(found.classes):
        raise SettingsError(
            f"model.num_classes={wanted}: data={found.name} has {len(found.classes)} classes; "
            "leave model.num_classes unset"
        )
    if found.stored_size < settings.image_size:
        raise SettingsError(
            f"model.image_size={settings.image_size}: data={found.name} is stored at "
            f"{found.stored_size} pixels; use {found.stored_size} or less"
        )
    return found
