"""Mean image and colour axes of a data set, computed once and cached (sections 2 and 4.1)."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
from filelock import FileLock

from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, DataError, one_line
from modelpar.files import atomic_write
from modelpar.images.augment import Statistics, principal_colours
from modelpar.images.loader import TestLoader
from modelpar.images.samples import ImageSet
from modelpar.progress import progress_bar

STATISTICS_BATCH: Final = 64


def locked(path: Path) -> AbstractContextManager[FileLock]:
    """Acquire the file lock ``path``, creating its folder; raises DataError if that fails.

    There is no timeout, because the holder may be reading a million images.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path).acquire()
    except OSError as error:
        raise DataError(f"{path.parent}: {one_line(error)}; use another cache_dir") from None


def statistics(
    images: ImageSet, cache: Path, workers: int = 0, *, progress: bool = False
) -> Statistics:
    """Return the mean image and colour statistics of the training images.

    A packed store has them.  Otherwise the first call reads all images once and stores the result
    in ``cache`` under the set's fingerprint; a file lock makes other processes wait for it.
    Raises DataError for a damaged image or cache file, CheckpointError if the result cannot be
    written.
    """
    if images.statistics is not None:
        return images.statistics
    path = cache / "statistics" / f"{images.name}-{images.fingerprint[:16]}.safetensors"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                content = safetensors.torch.save(
                    vars(_compute(images, workers, progress=progress))
                )
                try:
                    atomic_write(path, content)
                except OSError as error:
                    raise CheckpointError(
                        f"cache_dir={cache}: cannot write the mean image ({one_line(error)}); "
                        "free some space or use another cache_dir"
                    ) from None
    try:
        return Statistics(**safetensors.torch.load_file(path))
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise DataError(
            f"{path}: damaged ({one_line(error)}); delete it, and it is computed again"
        ) from None


def _compute(images: ImageSet, workers: int, *, progress: bool) -> Statistics:
    """Read the training images once and return their mean and colour covariance (section 4.1)."""
    side = images.stored_size
    total = torch.zeros(3, side, side, dtype=torch.float64)
    products = torch.zeros(3, 3, dtype=torch.float64)
    # The synthetic training images repeat the test batch: one pass over that batch is enough.
    source = images.train if images.may_shuffle else images.test
    batches = TestLoader(source, STATISTICS_BATCH, Mesh(torch.device("cpu")), workers=workers)
    count = len(source)
    bar = progress_bar(
        total=count, desc="mean image", unit="image", leave=False, delay=2, shown=progress
    )
    with bar:
        for batch, _ in batches:
            pixels = batch.double()
            total += pixels.sum(0)
            colours = pixels.transpose(0, 1).flatten(1)
            products += colours @ colours.T
            bar.update(len(batch))
    return principal_colours(total / count, products / (count * side * side))
