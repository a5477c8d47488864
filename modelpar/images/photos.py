"""``data=photos``: crops of the photographs in scikit-image's wheel, which need no download."""

from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from modelpar.errors import DataError, one_line
from modelpar.groups import DataSettings
from modelpar.images.samples import ImageSet, InMemory, sha256
from modelpar.seeding import generator

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
        colours = torch.from_numpy(np.atleast_3d(pixels).copy()).permute(2, 0, 1)
        found = _cells(colours.expand(3, -1, -1))
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
    fingerprint = sha256(
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
