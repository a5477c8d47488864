"""Images as samples: images of any size and mode are returned as RGB of one size."""

import hashlib
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn import functional

from modelpar.errors import DataError, one_line
from modelpar.images.augment import Statistics

try:
    import simplejpeg
except ImportError:  # the extra jpeg
    simplejpeg = None

Sample = tuple["Tensor", int]  # (3, T, T) uint8, label
MAX_PIXELS: Final = 89_478_485  # Pillow's limit; above it Pillow only warns of a bomb and decodes
MAX_ASPECT: Final = 16  # long side by short side: a choice of ours
DEEP: Final = ("I;16", "I;16B", "I;16L", "I;16N")  # 16 bits per pixel; Pillow clips them to 8
RAW: Final = ("I", "F")  # 32 bits per pixel; their range is unknown


class Images(ABC):
    """Images (3, T, T) uint8 and their labels, by number; several threads may read them at once.

    ``side``: T in pixels.  ``labels``: (N,) int64.  ``needs_decoding``: reading an image
    takes much longer than copying it.
    """

    side: int
    labels: Tensor
    needs_decoding: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.image(index), int(self.labels[index])

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return one image; raises DataError with its name if it is damaged."""

    def read(self, rows: Sequence[int], out: Tensor) -> None:
        """Write the images ``rows`` to ``out``; raises DataError."""
        for row, target in zip(rows, out, strict=True):
            target.copy_(self.image(row))


@dataclass(frozen=True)
class ImageSet:
    """A data set: training and test images at their stored size, and the names of the classes.

    ``fingerprint`` is a hash of the pixels if the images are in memory, otherwise of their names
    and sizes.  ``may_shuffle``: whether training may shuffle them.  ``test_groups``: for each test
    image a number that it shares with those it depends on; None: all are independent.
    ``folders``: those of the classes, if there are any.  ``skipped``: the files among the images
    that are not used.  ``statistics``: those of the training images, where they are known already.
    """

    name: str
    train: Images
    test: Images
    classes: Sequence[str]
    stored_size: int
    fingerprint: str
    may_shuffle: bool = True
    test_groups: Sequence[int] | None = None
    folders: Sequence[str] = ()
    skipped: str = ""
    statistics: Statistics | None = None

    @property
    def groups(self) -> Sequence[int]:
        """The number of each test image's group: of images that depend on each other."""
        return range(len(self.test)) if self.test_groups is None else self.test_groups

    @property
    def class_ids(self) -> list[str]:
        """What tells the classes apart, however they are shown: their folders or their names."""
        return list(self.folders or self.classes)


class InMemory(Images):
    """Images ``pixels`` (M, C, T, T) uint8 in memory, C = 1 for grey ones, and their ``labels``.

    Sample i is image ``rows[i]``; an image may appear in more than one sample.
    """

    needs_decoding = False

    def __init__(
        self, pixels: Tensor, labels: Sequence[int] | Tensor, rows: Sequence[int]
    ) -> None:
        self.pixels, self.rows = pixels, torch.as_tensor(rows)
        self.side, self.labels = pixels.shape[-1], torch.as_tensor(labels)[self.rows]

    def image(self, index: int) -> Tensor:
        """Return one image."""
        return self.pixels[self.rows[index]].expand(3, -1, -1)

    def read(self, rows: Sequence[int], out: Tensor) -> None:
        """Write the images ``rows`` to ``out``."""
        chosen = self.rows[torch.as_tensor(rows)]
        if self.pixels.shape[1] == out.shape[1]:
            torch.index_select(self.pixels, 0, chosen, out=out)
        else:
            out.copy_(self.pixels[chosen])


class Resized(Images):
    """Images of any size and mode as squares of one size, see ``square``.

    ``source(i)`` returns a PIL image, or the path to one.
    """

    def __init__(self, source: Callable[[int], Any], labels: Sequence[int], side: int) -> None:
        hide_warnings()
        self.source, self.side = source, side
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def image(self, index: int) -> Tensor:
        """Return one image as (3, T, T) uint8; raises DataError with its name."""
        image = self.source(index)
        is_path = isinstance(image, (str, os.PathLike))
        try:
            with Image.open(image) if is_path else nullcontext(image) as opened:
                return square(opened, self.side)
        except Exception as error:  # noqa: BLE001 - Pillow's decoders raise almost any
            raise DataError(unreadable(image if is_path else f"image {index}", error)) from None


def hide_warnings() -> None:
    """Hide Pillow's warnings about metadata; an image that cannot be decoded is an error."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def square(image: Image.Image, size: int) -> Tensor:
    """Return ``image`` as RGB (3, T, T) uint8: shorter side resized, then the centre (section 2).

    Raises what Pillow's decoders raise, and ValueError, see ``as_rgb``.

    Differs: the filter is Pillow's bilinear one, computed by torch, see docs/benchmarks.md for
    its time.  cuda-convnet2 used OpenCV's area filter, or its cubic one to enlarge, and stored
    JPEG files of quality 95 (make-data, pyext.cpp).
    """
    rgb = torch.from_numpy(_pixels(image)).permute(2, 0, 1)
    short = min(rgb.shape[1:])
    height, width = (size * side // short for side in rgb.shape[1:])
    scaled = functional.interpolate(rgb[None], (height, width), mode="bilinear", antialias=True)[0]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return scaled[:, top : top + size, left : left + size].contiguous()


def decode_jpeg(content: bytes) -> "np.ndarray[Any, Any]":
    """Return the pixels (H, W, 3) uint8 of a JPEG file; raises what the decoders raise.

    simplejpeg and Pillow both use libjpeg-turbo, and return the same pixels.  Of a damaged file
    Pillow decodes as much as it can, and simplejpeg raises ValueError.
    """
    if simplejpeg:
        return simplejpeg.decode_jpeg(content, "RGB")
    return np.array(Image.open(io.BytesIO(content), formats=["JPEG"]))


def _pixels(image: Image.Image) -> "np.ndarray[Any, Any]":
    """Return the pixels (H, W, 3) uint8 of ``as_rgb(image)``, whatever decodes them."""
    rgb = as_rgb(image)
    # Once decoded it has no file any more, and may have been changed.
    if simplejpeg and isinstance(rgb, JpegImageFile) and rgb.fp:
        with suppress(ValueError):  # of damaged files, which are left to Pillow
            rgb.fp.seek(0)
            return decode_jpeg(rgb.fp.read())
    return np.array(rgb)


def unreadable(name: object, error: Exception) -> str:
    """Return the message for an image that cannot be read."""
    reason = getattr(error, "strerror", None) or one_line(error)
    return f"{name}: cannot read image ({reason}); fix or delete it"


def as_rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` as RGB: grey is repeated, 16 bits are scaled to 8, transparency is ignored.

    Of a very long image the central part is returned.  Raises ValueError, before decoding, if the
    image is too large or its range is unknown.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
    if image.mode in RAW:
        raise ValueError(f"mode {image.mode}, 32 bits per pixel")
    # Differs: scaled whole, an image of one row would need gigabytes for a few central pixels.
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        left, top = (max(0, side - longest) // 2 for side in (width, height))
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
    if image.mode in DEEP:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def sha256(*parts: bytes | bytearray) -> str:
    """Return the SHA-256 of all parts, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
