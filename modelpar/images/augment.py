"""Section 4.1: random crops and flips, colour noise along the principal axes; the ten views."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Final

import torch
from torch import Tensor

from modelpar import gpu
from modelpar.device import check_compiled
from modelpar.gpu.crop import crop
from modelpar.seeding import generator

# Images that share one random crop and flip (released code: 32); ``central`` uses neither.
CHUNK: Final = {"per_image": 1, "per_32": 32, "central": 1}


@dataclass(frozen=True)
class Statistics:
    """Mean image and colour statistics of a training set, in units of 0-255.

    ``mean`` (3, T, T): the mean image at its stored size.  ``axes`` (3, 3): the principal axes of
    the pixels' colours, one per row, largest first.  ``std`` (3,): the standard deviation along
    each axis.
    """

    mean: Tensor
    std: Tensor
    axes: Tensor


def principal_colours(mean: Tensor, second_moments: Tensor) -> Statistics:
    """Return the statistics for a mean image (3, T, T) and raw second moments (3, 3) of colour."""
    centre = mean.flatten(1).mean(1)
    values, vectors = torch.linalg.eigh(second_moments - torch.outer(centre, centre))
    std, axes = values.flip(0).clamp(min=0).sqrt(), vectors.T.flip(0).contiguous()
    return Statistics(mean.float(), std.float(), axes.float())


@dataclass(frozen=True)
class CropFlipColour:
    """The random numbers of one epoch's augmentation, by position in the epoch's order.

    ``corner`` (N, 2): top and left of the crop in pixels.  ``flip`` (N,): whether the crop is
    mirrored.  ``colour`` (N, 3): normal with standard deviation 1, one number per principal axis.
    """

    corner: Tensor
    flip: Tensor
    colour: Tensor

    @classmethod
    def of_epoch(
        cls, seed: int, epoch: int, num_samples: int, border: int, crops: str
    ) -> "CropFlipColour":
        """Return the random numbers for all positions of ``epoch``.

        ``border`` is the stored size minus the crop size.  The result depends on the arguments
        alone, not on the rank or the loader worker that calls this.  If ``crops`` is ``central``,
        each image is cropped at its centre and never flipped.
        """
        chunk = CHUNK[crops]
        chunks = -(-num_samples // chunk)
        source = generator(seed, "augment", epoch)
        corner = torch.randint(0, border + 1, (chunks, 2), generator=source)
        flip = torch.rand(chunks, generator=source) < 0.5  # noqa: PLR2004 - section 4.1
        colour = torch.randn(num_samples, 3, generator=source)
        if crops == "central":
            corner, flip = torch.full_like(corner, border // 2), torch.zeros_like(flip)
        corner, flip = (x.repeat_interleave(chunk, 0)[:num_samples] for x in (corner, flip))
        return cls(corner, flip, colour)

    def at(self, positions: slice) -> "CropFlipColour":
        """Return the random numbers of some positions."""
        return CropFlipColour(self.corner[positions], self.flip[positions], self.colour[positions])

    def to(self, device: torch.device) -> "CropFlipColour":
        """Return the random numbers on ``device``; the host does not wait for a GPU."""
        parts = (send(part, device) for part in (self.corner, self.flip, self.colour))
        return CropFlipColour(*parts)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``, copied to a GPU in the order of its current stream.

    The host does not wait for the copy.  torch does not use the pinned memory again before that.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Augmentation:
    """Converts stored images to the net's input: pixels 0-255 minus the mean's central window.

    ``size`` is the side of a crop in pixels.  If ``scaled``, the image is divided by 1 plus the
    standard deviation of the colour noise, as the released code did.  ``dtype``: float32, or
    bfloat16, to which the result is rounded.
    """

    def __init__(
        self,
        statistics: Statistics,
        size: int,
        *,
        scaled: bool,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.size, self.scaled, self.dtype = size, scaled, dtype
        self.border = statistics.mean.shape[-1] - size
        middle = self.border // 2
        window = statistics.mean[:, middle : middle + size, middle : middle + size]
        self.mean = window.contiguous().to(device)
        self.colours = (statistics.std[:, None] * statistics.axes).to(device)  # std_i * p_i, rows
        self.fused = False

    def compile(self) -> None:
        """Use one kernel for ``train`` where there is one for the device.

        Raises CompileError, and keeps the plain version, if that fails or differs from it.
        """
        if not gpu.available(self.mean.device):
            return
        side = self.size + self.border
        images = torch.arange(2 * 3 * side**2, device=self.mean.device).view(2, 3, side, side)
        images = images.remainder(251).to(torch.uint8)  # a prime, so rows and channels differ
        corner = torch.tensor([[0, self.border], [self.border, 0]], device=images.device)
        flip = torch.tensor([True, False], device=images.device)

        def after(train: Callable[..., Tensor], colour: Tensor) -> Tensor:
            return train(images, CropFlipColour(corner, flip, colour.detach()), 0.1)

        colour = torch.linspace(-1, 1, 6, device=images.device).view(2, 3)
        name = "the crops"
        check_compiled(name, partial(after, self._fused), partial(after, self._plain), colour)
        self.fused = True

    def run_eager(self) -> None:
        """Run eagerly."""
        self.fused = False

    def train(self, images: Tensor, draws: CropFlipColour, noise: float) -> Tensor:
        """Crop, flip, subtract the mean and add colour noise of standard deviation ``noise``.

        ``images``: (N, 3, T, T) uint8.  Returns (N, 3, S, S), from the kernel in channels_last
        memory.
        """
        draws = draws.to(images.device)
        return (self._fused if self.fused else self._plain)(images, draws, noise)

    def _fused(self, images: Tensor, draws: CropFlipColour, noise: float) -> Tensor:
        drawn = (draws.corner, draws.flip, draws.colour)
        divisor = 1 + noise if self.scaled else 1
        return crop(images, drawn, self.mean, self.colours, noise, divisor, self.dtype)

    def _plain(self, images: Tensor, draws: CropFlipColour, noise: float) -> Tensor:
        crops = _gathered_crops if images.is_cuda else _crops
        out = crops(images, draws, self.size)
        out -= self.mean
        if noise:
            # Differs: section 4.1 multiplies the random numbers by the eigenvalues.  For pixels of
            # 0-255 that would be noise of several hundred, so both recipes multiply by standard
            # deviations, as the released code did.
            shift = noise * draws.colour.to(self.colours) @ self.colours  # (N, 3)
            out += shift[:, :, None, None]
            if self.scaled:
                out /= 1 + noise
        return out.to(self.dtype)

    def center_crop(self, images: Tensor) -> Tensor:
        """Return the central crop minus the mean: (N, 3, T, T) uint8 -> (N, 3, S, S)."""
        middle = (images.shape[-1] - self.size) // 2
        return self._crop(images, middle, middle)

    def ten_crop(self, images: Tensor) -> Iterator[Tensor]:
        """Yield ten views (N, 3, S, S): four corners, the centre, and their mirror images."""
        end = images.shape[-1] - self.size  # test images of photos are smaller than its cells
        middle = end // 2
        for top, left in ((0, 0), (0, end), (end, 0), (end, end), (middle, middle)):
            for source in (images, images.flip(-1)):
                yield self._crop(source, top, left)

    def nine_crop(self, images: Tensor) -> Iterator[Tensor]:
        """Yield nine views (N, 3, S, S), 3 x 3 crops as in the code for CIFAR (convdata.py)."""
        end = images.shape[-1] - self.size
        for top, left in product((0, end // 2, end), repeat=2):
            yield self._crop(images, top, left)

    def _crop(self, images: Tensor, top: int, left: int) -> Tensor:
        window = images[:, :, top : top + self.size, left : left + self.size]
        return (window.to(self.mean.dtype) - self.mean).to(self.dtype)


def _crops(images: Tensor, draws: CropFlipColour, size: int) -> Tensor:
    """Return the flipped crops (N, 3, S, S) float32 of ``images``, one after the other.

    On one core of a CPU this took 0.6 (crops of 64 pixels) and 0.25 (224) of the time that
    ``_gathered_crops`` took.
    """
    out = torch.empty(len(images), 3, size, size, device=images.device)
    corners, flips = draws.corner.tolist(), draws.flip.tolist()
    for image, target, (top, left), flip in zip(images, out, corners, flips, strict=True):
        window = image[:, top : top + size, left : left + size]
        target.copy_(window.flip(-1) if flip else window)
    return out


def _gathered_crops(images: Tensor, draws: CropFlipColour, size: int) -> Tensor:
    """Return what ``_crops`` returns, without a loop and without reading ``draws`` on the host."""
    along = torch.arange(size, device=images.device)
    rows = draws.corner[:, :1] + along  # (N, S)
    columns = draws.corner[:, 1:] + torch.where(draws.flip[:, None], along.flip(0), along)
    pixels = rows[:, :, None] * images.shape[-1] + columns[:, None, :]  # in one channel
    source = pixels.flatten(1)[:, None].expand(-1, 3, -1)
    return images.flatten(2).gather(2, source).unflatten(2, (size, size)).float()
