"""Images as samples: of whatever size and mode, they come as RGB of one size."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from modelpar.errors import DataError, one_line

Sample = tuple["Tensor", int]  # (3, T, T) uint8, label
MAX_PIXELS: Final = 89_478_485  # Pillow's own, over which it warns of a bomb and decodes it
DEEP: Final = ("I;16", "I;16B", "I;16L", "I;16N")  # 16 bits a pixel, which Pillow clips to 8
RAW: Final = ("I", "F")  # 32 bits a pixel: of no known range
# Of odd metadata, one line an image; what cannot be decoded is an error of its own.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Images(Protocol):
    """A sized source of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class ImageSet:
    """A data set: training and test images at their stored size, and the names of the classes.

    ``fingerprint`` changes with the images: their pixels where they are in memory, else their
    names and sizes.  ``shuffled``: whether training may mix them.
    """

    name: str
    train: Images
    test: Images
    classes: Sequence[str]
    stored_size: int
    fingerprint: str
    shuffled: bool = True


class InMemory(Dataset[Sample]):
    """Images (N, C, T, T) uint8 that fit in memory, grey ones with C = 1, and their labels."""

    def __init__(self, images: Tensor, labels: Sequence[int], rows: Sequence[int]) -> None:
        self.images = images
        self.labels = labels
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of samples, which may show an image more than once."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Return one image as (3, T, T) and its label."""
        row = self.rows[index]
        return self.images[row].expand(3, -1, -1), self.labels[row]


class Resized(Dataset[Sample]):
    """Images of any size and mode as RGB, shorter side scaled, central square (section 2).

    ``source[i]`` gives a PIL image, or a path to one, and its label.
    """

    def __init__(self, source: Callable[[int], tuple[Any, int]], length: int, size: int) -> None:
        self.source = source
        self.length = length
        self.transform = v2.Compose(
            [
                v2.Resize(size, antialias=True),
                v2.CenterCrop(size),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Return one image as (3, T, T) uint8 and its label; raises DataError with its name."""
        image, label = self.source(index)
        name = image if isinstance(image, (str, os.PathLike)) else f"image {index}"
        try:
            if isinstance(image, (str, os.PathLike)):
                with Image.open(image) as opened:
                    return self.transform(as_rgb(opened)), label
            return self.transform(as_rgb(image)), label
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{name}: not a readable image ({one_line(error)}); mend or remove it"
            ) from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` as RGB: grey repeated, 16 bits scaled to 8, what is transparent ignored.

    Raises ValueError for what has no such meaning, before any of it is decoded.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
    if image.mode in RAW:
        raise ValueError(f"mode {image.mode}, 32 bits a pixel")
    if image.mode in DEEP:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
