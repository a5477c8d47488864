"""Section 4.1: random crops and flips, colour noise along the principal axes; the ten views."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

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


class Augmentation:
    """Converts stored images to the net's input: pixels 0-255 minus the mean's central window.

    ``size`` is the side of a crop in pixels.  If ``scaled``, the image is divided by 1 plus the
    standard deviation of the colour noise, as the released code did.
    """

    def __init__(
        self, statistics: Statistics, size: int, *, scaled: bool, device: torch.device | str
    ) -> None:
        self.size = size
        self.scaled = scaled
        self.border = statistics.mean.shape[-1] - size
        middle = self.border // 2
        self.mean = statistics.mean[:, middle : middle + size, middle : middle + size].to(device)
        self.colours = (statistics.std[:, None] * statistics.axes).to(device)  # std_i * p_i, rows

    def train(self, images: Tensor, draws: CropFlipColour, noise: float) -> Tensor:
        """Crop, flip, subtract the mean and add colour noise of standard deviation ``noise``.

        ``images``: (N, 3, T, T) uint8.  Returns (N, 3, S, S) float32.
        """
        size = self.size
        out = torch.empty(len(images), 3, size, size, device=images.device)
        corners, flips = draws.corner.tolist(), draws.flip.tolist()
        for image, target, (top, left), flip in zip(images, out, corners, flips, strict=True):
            crop = image[:, top : top + size, left : left + size]
            target.copy_(crop.flip(-1) if flip else crop)
        out -= self.mean
        if noise:
            # Differs: section 4.1 multiplies the random numbers by the eigenvalues.  For pixels of
            # 0-255 that would be noise of several hundred, so both recipes multiply by standard
            # deviations, as the released code did.
            shift = noise * draws.colour.to(self.colours) @ self.colours  # (N, 3)
            out += shift[:, :, None, None]
            if self.scaled:
                out /= 1 + noise
        return out

    def center_crop(self, images: Tensor) -> Tensor:
        """Return the central crop minus the mean: (N, 3, T, T) uint8 -> (N, 3, S, S) float32."""
        return self._crop(images, self.border // 2, self.border // 2)

    def ten_crop(self, images: Tensor) -> Iterator[Tensor]:
        """Yield ten views (N, 3, S, S): four corners, the centre, and their mirror images."""
        end, middle = self.border, self.border // 2
        for top, left in ((0, 0), (0, end), (end, 0), (end, end), (middle, middle)):
            for source in (images, images.flip(-1)):
                yield self._crop(source, top, left)

    def _crop(self, images: Tensor, top: int, left: int) -> Tensor:
        crop = images[:, :, top : top + self.size, left : left + self.size]
        return crop.to(self.mean.dtype) - self.mean
