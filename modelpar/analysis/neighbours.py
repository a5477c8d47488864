"""Figure 4: the net's top predictions, and the training images nearest to test images.

Section 6.1: "if two images produce feature activation vectors with a small Euclidean separation,
we can say that the higher levels of the neural network consider them to be similar".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelpar.analysis.activations import activations_of
from modelpar.distributed import Mesh
from modelpar.images.augment import Augmentation
from modelpar.images.loader import TestLoader
from modelpar.images.samples import Images, ImageSet, Sample
from modelpar.seeding import generator

# The numbers of figure 4:
SHOWN: Final = 8  # test images with their top predictions
TOP: Final = 5  # predictions per test image
QUERIES: Final = 5  # test images in the first column of the right half
NEAREST: Final = 6  # training images next to each query


@dataclass(frozen=True)
class Prediction:
    """A stored image (3, T, T), its class, the most probable classes and their probabilities."""

    image: Tensor
    label: int
    classes: list[int]
    probabilities: list[float]


@dataclass(frozen=True)
class Neighbours:
    """A stored test image, its class, its nearest training images with classes and distances."""

    query: Tensor
    label: int
    nearest: list[tuple[Tensor, int, float]]


@dataclass(frozen=True)
class Figure4:
    """Both halves of the figure, and the number of training images that were searched."""

    predictions: list[Prediction]
    neighbours: list[Neighbours]
    searched: int


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return ``count`` of the indices 0..total-1, or all; data sets are often sorted by class."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def random_subset(total: int, count: int, seed: int) -> list[int]:
    """Return ``count`` random indices of 0..total-1, or all, in increasing order."""
    order = torch.randperm(total, generator=generator(seed, "figure4"))
    return sorted(order[:count].tolist())


@torch.no_grad()
def features(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (N, classes) and the last hidden units (N, D) of images (N, 3, S, S).

    The net is in evaluation mode.  The units are those before the factor 0.5 of dropout, which
    scales all distances equally.
    """
    units: list[Tensor] = []
    *_, last = activations_of(net).values()
    handle = last.register_forward_hook(lambda *call: units.append(call[2].flatten(1)))
    try:
        logits = net(images)
    finally:
        handle.remove()
    return logits, torch.cat(units)


def top_predictions(samples: Sequence[Sample], logits: Tensor) -> list[Prediction]:
    """Return the most probable classes of each stored image; ``logits`` is (N, classes)."""
    top = functional.softmax(logits.double(), dim=1).topk(min(TOP, logits.shape[1]), dim=1)
    each = zip(samples, top.indices.tolist(), top.values.tolist(), strict=True)
    return [Prediction(*sample, classes, shares) for sample, classes, shares in each]


def nearest_distinct(
    images: Images, rows: Sequence[int], distances: Tensor
) -> list[tuple[Tensor, int, float]]:
    """Return stored images, classes and distances of the ``NEAREST`` nearest of ``rows``.

    ``distances`` (M,) of all rows.  An image that appears several times in the data set is
    returned once.
    """
    found: list[tuple[Tensor, int, float]] = []
    for place in distances.argsort(stable=True).tolist():
        image, label = images[rows[place]]
        if not any(torch.equal(image, other) for other, *_ in found):
            found.append((image, label, float(distances[place])))
        if len(found) == NEAREST:
            break
    return found


def figure4(
    net: nn.Module,
    images: ImageSet,
    augmentation: Augmentation,
    rows: Sequence[int],
    batch_size: int,
    workers: int,
) -> Figure4:
    """Return the content of figure 4.

    ``rows``: the training images to search; one batch of them is in memory at a time.
    """
    device, test = augmentation.mean.device, images.test
    shown = [test[row] for row in evenly_spaced(len(test), SHOWN)]
    queries = [test[row] for row in evenly_spaced(len(test), QUERIES)]
    stored = torch.stack([image for image, _ in (*shown, *queries)]).to(device)
    logits, units = features(net, augmentation.center_crop(stored))
    wide = units[len(shown) :].double()
    parts: list[Tensor] = []  # (queries, images of the batch)
    for batch, _ in TestLoader(images.train, batch_size, Mesh(device), rows=rows, workers=workers):
        units = features(net, augmentation.center_crop(batch))[1].double()
        parts.append(torch.cdist(wide, units, compute_mode="donot_use_mm_for_euclid_dist"))
    distances = torch.cat(parts, dim=1).cpu()
    neighbours = [
        Neighbours(query, label, nearest_distinct(images.train, rows, row))
        for (query, label), row in zip(queries, distances, strict=True)
    ]
    return Figure4(top_predictions(shown, logits[: len(shown)].cpu()), neighbours, len(rows))
