"""Figure 4: the net's top predictions, and the training images nearest to test images.

Section 6.1: "if two images produce feature activation vectors with a small Euclidean separation,
we can say that the higher levels of the neural network consider them to be similar".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelpar.analysis.activations import activations_of
from modelpar.distributed import Mesh, all_reduce_sum
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
class Example:
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

    predictions: list[Example]
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


def most_likely(probabilities: Tensor) -> list[tuple[list[int], list[float]]]:
    """Return the ``TOP`` classes of each row of (N, classes) with their values, largest first.

    Of equal values the class with the lower number is first, as errors are counted.
    """
    top = probabilities.sort(dim=1, descending=True, stable=True)
    best = (part[:, :TOP].tolist() for part in (top.indices, top.values))
    return [*zip(*best, strict=True)]


def top_predictions(samples: Sequence[Sample], logits: Tensor) -> list[Example]:
    """Return the most probable classes of each stored image; ``logits`` is (N, classes)."""
    each = zip(samples, most_likely(functional.softmax(logits.double(), dim=1)), strict=True)
    return [Example(*sample, *found) for sample, found in each]


def distances(
    net: nn.Module,
    queries: Tensor,
    images: Images,
    augmentation: Augmentation,
    rows: Sequence[int],
    mesh: Mesh,
    **reading: int,
) -> Tensor:
    """Return the distances (Q, M) in float64 from ``queries`` (Q, D) to the images ``rows``.

    ``queries`` are units as ``features`` returns them.  One batch of images is in memory at a
    time; ``reading`` has ``batch_size`` and ``workers``.  A collective of the pair, whose columns
    each have half of the units.  Replicas do not share the images, since each has its own queries.
    """
    parts: list[Tensor] = []
    alone, queries = replace(mesh, replicas=1, replica=0), queries.double()
    for batch, _ in TestLoader(images, mesh=alone, rows=rows, **reading):
        units = features(net, augmentation.center_crop(batch))[1].double()
        squares = torch.cdist(queries, units, compute_mode="donot_use_mm_for_euclid_dist").square()
        parts.append(all_reduce_sum(squares, mesh.pair).sqrt())
    return torch.cat(parts, dim=1).cpu()


def nearest_distinct(
    images: Images, rows: Sequence[int], distances: Tensor, count: int = NEAREST
) -> list[tuple[Tensor, int, float]]:
    """Return stored images, classes and distances of the ``count`` nearest of ``rows``.

    ``distances`` (M,) of all rows.  An image that appears several times in the data set is
    returned once.
    """
    found: list[tuple[Tensor, int, float]] = []
    for place in distances.argsort(stable=True).tolist():
        image, label = images[rows[place]]
        if not any(torch.equal(image, other) for other, *_ in found):
            found.append((image, label, float(distances[place])))
        if len(found) == count:
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
    reading = {"batch_size": batch_size, "workers": workers}
    wide, mesh = units[len(shown) :], Mesh(device)
    found = distances(net, wide, images.train, augmentation, rows, mesh, **reading)
    neighbours = [
        Neighbours(query, label, nearest_distinct(images.train, rows, row))
        for (query, label), row in zip(queries, found, strict=True)
    ]
    return Figure4(top_predictions(shown, logits[: len(shown)].cpu()), neighbours, len(rows))
