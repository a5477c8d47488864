"""Mean image and colour axes of a data set, measured once and kept (sections 2 and 4.1)."""

from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
from filelock import FileLock
from torch.utils.data import DataLoader
from tqdm import tqdm

from modelpar.errors import CheckpointError, DataError, one_line
from modelpar.images.augment import Statistics, principal_colours
from modelpar.images.samples import ImageSet

STATISTICS_BATCH: Final = 64


def locked(path: Path) -> AbstractContextManager[FileLock]:
    """Return a held file lock, its folder made; raises DataError where it cannot be had.

    It waits without end: whoever holds it may be reading a million images.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path).acquire()
    except OSError as error:
        raise DataError(
            f"cache_dir={path.parent}: {one_line(error)}; give another cache_dir"
        ) from None


def statistics(images: ImageSet, cache: Path, workers: int = 0) -> Statistics:
    """Return the mean image and colours of the training images, computed once and kept.

    Kept in ``cache`` under the set's fingerprint, behind a file lock; one pass over the images.
    """
    path = cache / "statistics" / f"{images.name}-{images.fingerprint[:16]}.safetensors"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                _keep(_measure(images, workers), path)
    try:
        return Statistics(**safetensors.torch.load_file(path))
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise DataError(
            f"{path}: damaged ({one_line(error)}); remove it, it is computed again"
        ) from None


def _keep(found: Statistics, path: Path) -> None:
    unfinished = path.with_suffix(".part")
    tensors = {"mean": found.mean, "std": found.std, "axes": found.axes}
    try:
        safetensors.torch.save_file(tensors, unfinished)
        unfinished.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise CheckpointError(
            f"cache_dir={path.parents[1]}: the mean image cannot be kept ({one_line(error)}); "
            "make room, or give another cache_dir"
        ) from None


def _measure(images: ImageSet, workers: int) -> Statistics:
    """Pass over the training images once: mean image, colour covariance (section 4.1)."""
    side = images.stored_size
    total = torch.zeros(3, side, side, dtype=torch.float64)
    products = torch.zeros(3, 3, dtype=torch.float64)
    count = 0
    # Synthetic images are one batch, shown again and again: once is enough.
    shown = images.train if images.shuffled else images.test
    loader = DataLoader(
        shown,  # pyright: ignore[reportArgumentType] - sized and indexed is enough
        STATISTICS_BATCH,
        num_workers=workers,
        generator=torch.Generator(),
    )
    for batch, _ in tqdm(loader, desc="mean image", unit="batch", leave=False, delay=2):
        pixels = batch.double()
        total += pixels.sum(0)
        colours = pixels.transpose(0, 1).flatten(1)
        products += colours @ colours.T
        count += len(batch)
    return principal_colours(total / count, products / (count * side * side))
