"""Data sets by name: where their images come from, their classes, their mean and colours."""

import gzip
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from modelpar.config import refuse_choice
from modelpar.errors import DataError, SettingsError, one_line
from modelpar.images.samples import ImageSet, InMemory, Resized
from modelpar.images.statistics import locked
from modelpar.seeding import generator
from modelpar.settings import DataSettings

# Differs: the paper's stored images are 256 pixels wide for crops of 224 (section 4.1); smaller
# crops keep that proportion.
STORED_PER_CROP: Final = 256 / 224
DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")


# -- photos ------------------------------------------------------------------------------------

# The photographs inside the scikit-image wheel, by the names of its own functions.
PHOTOGRAPHS: Final = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "stereo_motorcycle",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
    "camera",
    "brick",
    "grass",
    "gravel",
    "coins",
    "moon",
)
CELL: Final = 96  # pixels: stored size; crops of 64 lie wholly inside one cell
FLAT: Final = 8.0  # a cell whose grey standard deviation is below says nothing (sky, black)
TEST_SHARE: Final = 5  # one cell in five is held out
TRAIN_PER_CLASS: Final = 160  # so that an epoch is 17 batches of 128
TEST_PER_CLASS: Final = 20


def _cells(photograph: Tensor) -> Tensor:
    """Cut (3, H, W) uint8 into the cells (N, 3, 96, 96) of a grid, without the flat ones."""
    grid = photograph.unfold(1, CELL, CELL).unfold(2, CELL, CELL)
    cells = grid.permute(1, 2, 0, 3, 4).flatten(0, 1)
    return cells[cells.float().mean(1).flatten(1).std(1) >= FLAT].contiguous()


def photos(settings: DataSettings, cache: Path) -> ImageSet:
    """Which photograph is this crop from: 14 photographs of the scikit-image wheel.

    Cells of a grid, a fifth of each photograph's held out: no test pixel is ever trained on.
    Classes are balanced by showing the cells of small photographs more often.
    """
    del settings, cache
    from skimage import data  # noqa: PLC0415 - half a second, and only this set needs it

    cells: list[Tensor] = []
    labels: list[int] = []
    train: list[int] = []
    test: list[int] = []
    for label, name in enumerate(PHOTOGRAPHS):
        try:
            pixels: Any = getattr(data, name)()
        except (OSError, ModuleNotFoundError, AttributeError) as error:
            raise DataError(
                f"photos: scikit-image has no {name} in its wheel ({one_line(error)})"
            ) from None
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # left eye of the stereo pair
        photograph = torch.from_numpy(np.array(pixels))
        if photograph.ndim == 2:  # noqa: PLR2004 - grey (H, W)
            photograph = photograph[:, :, None].expand(-1, -1, 3)
        own = _cells(photograph.permute(2, 0, 1))
        first, count = len(labels), len(own)
        shuffled = torch.randperm(count, generator=generator(0, "photos", name)).tolist()
        held_out = max(2, count // TEST_SHARE)
        cells.append(own)
        labels += [label] * count
        test += _balanced(shuffled[:held_out], first, TEST_PER_CLASS)
        train += _balanced(shuffled[held_out:], first, TRAIN_PER_CLASS)
    images = torch.cat(cells)
    return ImageSet(
        "photos",
        InMemory(images, labels, train),
        InMemory(images, labels, test),
        PHOTOGRAPHS,
        CELL,
        _digest(images.numpy().tobytes(), repr((train, test)).encode()),
    )


def _balanced(rows: list[int], first: int, count: int) -> list[int]:
    """Return ``count`` of ``rows``, each as often as the others, give or take one."""
    return [first + rows[place % len(rows)] for place in range(count)]


# -- sets that are read from a folder ------------------------------------------------------------


def _folder(settings: DataSettings, cache: Path) -> Path:
    """Return ``data.root``, or the folder downloads go to; raises DataError where neither is."""
    if settings.root is not None:
        root = Path(settings.root).expanduser()
        if not root.is_dir() and not settings.download:
            raise DataError(
                f"data.root={root}: no such folder; give the folder of {settings.name}, "
                "or data.download=true"
            )
        return root
    if settings.download:
        return cache / "downloads"
    raise DataError(f"data={settings.name}: give data.root=FOLDER, or data.download=true")


def _stored(settings: DataSettings) -> int:
    return round(settings.image_size * STORED_PER_CROP)


def _opened(name: str, root: Path, build: Callable[[], Any]) -> Any:
    """Build a torchvision data set; its many complaints become one DataError."""
    try:
        return build()
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        raise DataError(
            f"data.root={root}: no {name} there ({one_line(error)[:200]}); give the folder that "
            "holds it, or data.download=true"
        ) from None


def _of_torchvision(
    settings: DataSettings, root: Path, train: Any, test: Any, stored: int | None = None
) -> ImageSet:
    """Wrap two torchvision data sets whose items are (PIL image, label)."""
    size = stored or _stored(settings)
    classes = [str(name) for name in train.classes]
    if [str(name) for name in test.classes] != classes:
        raise DataError(
            f"data.root={root}: train and test name different classes; make them equal"
        )
    samples = getattr(train, "samples", None)
    if samples is None:  # all in memory
        content = _digest(np.asarray(train.data).tobytes(), np.asarray(test.data).tobytes())
        return ImageSet(
            settings.name,
            Resized(train.__getitem__, len(train), size),
            Resized(test.__getitem__, len(test), size),
            classes,
            size,
            _digest(content.encode(), str(size).encode()),
        )
    try:
        names = "\n".join(
            f"{Path(path).relative_to(root)} {label} {Path(path).stat().st_size}"
            for path, label in [*train.samples, *test.samples]
        )
    except OSError as error:  # a link to nothing, as git-annex leaves
        raise DataError(
            f"{error.filename}: not a readable image ({error.strerror}); remove or replace it"
        ) from None
    return ImageSet(
        settings.name,
        Resized(train.samples.__getitem__, len(train.samples), size),
        Resized(test.samples.__getitem__, len(test.samples), size),
        classes,
        size,
        _digest(names.encode(errors="surrogateescape"), str(size).encode()),
    )


def cifar10(settings: DataSettings, cache: Path) -> ImageSet:
    """CIFAR-10, 50,000 and 10,000 images of 32 pixels, enlarged."""
    root = _folder(settings, cache)
    train, test = (
        _opened(
            "CIFAR-10",
            root,
            lambda part=part: datasets.CIFAR10(root, train=part, download=settings.download),
        )
        for part in (True, False)
    )
    return _of_torchvision(settings, root, train, test)


def imagenette(settings: DataSettings, cache: Path) -> ImageSet:
    """Imagenette: ten classes of ImageNet, shorter side 320 pixels as fast.ai publishes it."""
    root = _folder(settings, cache)
    present = (root / "imagenette2-320").is_dir()
    train, test = (
        _opened(
            "Imagenette",
            root,
            lambda part=part: datasets.Imagenette(
                root, part, size="320px", download=settings.download and not present
            ),
        )
        for part in ("train", "val")
    )
    train.samples, test.samples = train._samples, test._samples  # noqa: SLF001 - no public name
    train.classes = test.classes = [names[0] for names in train.classes]
    return _of_torchvision(settings, root, train, test)


def imagefolder(settings: DataSettings, cache: Path) -> ImageSet:
    """A folder ``train`` and a folder ``val``, in each a folder of images for each class."""
    root = _folder(settings, cache)
    train, test = (
        _opened(settings.name, root / part, lambda part=part: datasets.ImageFolder(root / part))
        for part in ("train", "val")
    )
    return _of_torchvision(settings, root, train, test)


def imagenet(settings: DataSettings, cache: Path) -> ImageSet:
    """ILSVRC-2012: torchvision's layout with the development kit, or plain train and val."""
    root = _folder(settings, cache)
    if not any((root / name).exists() for name in ("meta.bin", "ILSVRC2012_devkit_t12.tar.gz")):
        return imagefolder(settings, cache)
    train, test = (
        _opened("ImageNet", root, lambda part=part: datasets.ImageNet(root, part))
        for part in ("train", "val")
    )
    train.classes = test.classes = [names[0] for names in train.classes]
    return _of_torchvision(settings, root, train, test)


def _read_idx(path: Path) -> np.ndarray:
    """Read a gzip'ed IDX file of bytes: magic with the number of dimensions, sizes, values."""
    try:
        content = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(content, ">i4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(
            f"{path}: not a readable IDX file ({one_line(error)}); install it again"
        ) from None


class _Idx:
    """One part of Debian's Fashion-MNIST, in the form of torchvision's class."""

    classes = datasets.FashionMNIST.classes

    def __init__(self, root: Path, part: str) -> None:
        self.data = _read_idx(root / f"{part}-images-idx3-ubyte.gz")
        self.targets: list[int] = _read_idx(root / f"{part}-labels-idx1-ubyte.gz").tolist()
        if len(self.data) != len(self.targets):
            raise DataError(
                f"{root}: {part} has {len(self.data)} images, {len(self.targets)} labels"
            )
        if self.targets and max(self.targets) >= len(self.classes):
            raise DataError(
                f"{root}: {part} has label {max(self.targets)} of {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), self.targets[index]


def fashion_mnist(settings: DataSettings, cache: Path) -> ImageSet:
    """Fashion-MNIST: torchvision's layout, or Debian's package as it lies in its folder."""
    if settings.root is None and not settings.download and DEBIAN_FASHION_MNIST.is_dir():
        root = DEBIAN_FASHION_MNIST
    else:
        root = _folder(settings, cache)
    if (root / "train-images-idx3-ubyte.gz").is_file():
        return _of_torchvision(settings, root, _Idx(root, "train"), _Idx(root, "t10k"))
    train, test = (
        _opened(
            "Fashion-MNIST",
            root,
            lambda part=part: datasets.FashionMNIST(root, train=part, download=settings.download),
        )
        for part in (True, False)
    )
    return _of_torchvision(settings, root, train, test)


# -- synthetic -----------------------------------------------------------------------------------

SYNTHETIC_STEPS: Final = 1000  # an epoch


def synthetic(settings: DataSettings, seed: int, batch: int) -> ImageSet:
    """Noise with random labels, for benchmarks only: one batch, shown again at every step."""
    source = generator(seed, "synthetic")
    size = _stored(settings)
    num_classes = settings.num_classes or 1000
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=source)
    labels = torch.randint(0, num_classes, (batch,), generator=source).tolist()
    rows = list(range(batch))
    return ImageSet(
        "synthetic",
        InMemory(images, labels, rows * SYNTHETIC_STEPS),
        InMemory(images, labels, rows),
        [str(number) for number in range(num_classes)],
        size,
        _digest(repr((seed, batch, size, num_classes)).encode()),
        shuffled=False,
    )


SETS: Final[dict[str, Callable[[DataSettings, Path], ImageSet]]] = {
    "photos": photos,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "imagenette": imagenette,
    "imagefolder": imagefolder,
    "imagenet": imagenet,
}


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def check_root(settings: DataSettings, cache: Path) -> None:
    """Raise DataError where the set's folder is missing, before anything is made."""
    if settings.name not in {*SETS, "synthetic"}:
        refuse_choice("data", settings.name, (*SETS, "synthetic"))
    if settings.name in {"photos", "synthetic"}:
        return
    if (
        settings.name == "fashion_mnist"
        and settings.root is None
        and DEBIAN_FASHION_MNIST.is_dir()
    ):
        return
    _folder(settings, cache)


def open_set(settings: DataSettings, cache: Path, seed: int = 0, batch: int = 128) -> ImageSet:
    """Open the data set ``settings.name``; downloads, if asked to, into ``cache`` under a lock.

    ``seed`` and ``batch`` (images a step, of all replicas) are what synthetic is made from.
    Raises DataError where images are missing, SettingsError where the classes do not fit.
    """
    check_root(settings, cache)
    if settings.download and settings.name in SETS:
        with locked(cache / "download.lock"):
            found = SETS[settings.name](settings, cache)
    elif settings.name == "synthetic":
        found = synthetic(settings, seed, batch)
    else:
        found = SETS[settings.name](settings, cache)
    wanted = settings.num_classes
    if wanted is not None and wanted != len(found.classes):
        raise SettingsError(
            f"model.num_classes={wanted}: data={found.name} has {len(found.classes)} classes; "
            "leave model.num_classes out"
        )
    if found.stored_size < settings.image_size:
        raise SettingsError(
            f"model.image_size={settings.image_size}: data={found.name} is stored at "
            f"{found.stored_size} pixels; give that or less"
        )
    return found
