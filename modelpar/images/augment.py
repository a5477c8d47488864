"""Section 4.1: random crops and flips, colour noise along the principal axes; the ten views."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from modelpar.seeding import generator

# Images that share a draw (released code: 32); of ``central`` nothing is used.
CHUNK: Final = {"per_image": 1, "per_32": 32, "central": 1}


@dataclass(frozen=True)
class Statistics:
    """What a training set looks like on average.

    ``mean`` (3, T, T) is the mean image at its stored size; ``std`` (3,) the standard deviations
    of the pixels' colours along the principal axes ``axes`` (3, 3), one axis a row, largest first;
    all in units of 0-255.
    """

    mean: Tensor
    std: Tensor
    axes: Tensor


def principal_colours(mean: Tensor, second_moments: Tensor) -> Statistics:
    """Return the statistics of a mean image (3, T, T) and the raw second moments (3, 3)."""
    centre = mean.flatten(1).mean(1)
    values, vectors = torch.linalg.eigh(second_moments - torch.outer(centre, centre))
    return Statistics(
        mean.float(),
        values.flip(0).clamp(min=0).sqrt().float(),
        vectors.T.flip(0).contiguous().float(),
    )


@dataclass(frozen=True)
class CropFlipColour:
    """One epoch's random numbers, by position in its order: crops, flips, colours.

    ``corner`` (N, 2) the crop's top and left in pixels, ``flip`` (N,), ``colour`` (N, 3) normal
    with standard deviation 1.
    """

    corner: Tensor
    flip: Tensor
    colour: Tensor

    @classmethod
    def of_epoch(
        cls, seed: int, epoch: int, num_samples: int, border: int, crops: str
    ) -> "CropFlipColour":
        """Draw for all positions of ``epoch``; ``border`` is stored size less crop size.

        A function of its arguments alone, so that it does not matter which rank or worker asks.
        With ``crops`` ``central`` each image shows its middle, and is never flipped.
        """
        chunk = CHUNK[crops]
        chunks = -(-num_samples // chunk)
        source = generator(seed, "augment", epoch)
        corner = torch.randint(0, border + 1, (chunks, 2), generator=source)
        flip = torch.rand(chunks, generator=source) < 0.5  # noqa: PLR2004 - section 4.1
        colour = torch.randn(num_samples, 3, generator=source)
        if crops == "central":
            corner, flip = torch.full_like(corner, border // 2), torch.zeros_like(flip)
        return cls(
            corner.repeat_interleave(chunk, 0)[:num_samples],
            flip.repeat_interleave(chunk)[:num_samples],
            colour,
        )

    def at(self, positions: slice) -> "CropFlipColour":
        """Return the draws of some positions."""
        return CropFlipColour(self.corner[positions], self.flip[positions], self.colour[positions])


class Augmentation:
    """Turns stored images into the net's input: pixels 0-255 less the mean's central window.

    ``size`` is the side of a crop.  ``scaled``: after the colour noise the image is divided by 1
    plus its standard deviation, as the released code did.
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
        """Crop, flip, subtract the mean, add colour noise of standard deviation ``noise``.

        ``images`` (N, 3, T, T) uint8; returns (N, 3, S, S) float32.
        """
        size = self.size
        out = torch.empty(len(images), 3, size, size, device=images.device)
        corners, flips = draws.corner.tolist(), draws.flip.tolist()
        for image, target, (top, left), flip in zip(images, out, corners, flips, strict=True):
            crop = image[:, top : top + size, left : left + size]
            target.copy_(crop.flip(-1) if flip else crop)
        out -= self.mean
        if noise:
            # Differs: section 4.1 weighs the draws by the eigenvalues; in units of 0-255 that is
            # a noise of hundreds, so both recipes take standard deviations, as the code did.
            shift = noise * draws.colour.to(self.colours) @ self.colours  # (N, 3)
            out += shift[:, :, None, None]
            if self.scaled:
                out /= 1 + noise
        return out

    def center_crop(self, images: Tensor) -> Tensor:
        """Return the central crop less the mean: (N, 3, T, T) uint8 -> (N, 3, S, S) float32."""
        return self._crop(images, self.border // 2, self.border // 2)

    def ten_crop(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the ten views: four corners and centre, and their mirrors (section 4.1)."""
        end, middle = self.border, self.border // 2
        for top, left in ((0, 0), (0, end), (end, 0), (end, end), (middle, middle)):
            for source in (images, images.flip(-1)):
                yield self._crop(source, top, left)

    def _crop(self, images: Tensor, top: int, left: int) -> Tensor:
        crop = images[:, :, top : top + self.size, left : left + self.size]
        return crop.to(self.mean.dtype) - self.mean
