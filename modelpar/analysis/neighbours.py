"""Figure 4: the net's top predictions, and the training images nearest to test images.

Section 6.1: "if two images produce feature activation vectors with a small Euclidean separation,
we can say that the higher levels of the neural network consider them to be similar".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset

from modelpar.analysis.activations import activations_of
from modelpar.distributed import Mesh, all_reduce_sum
from modelpar.images.augment import Augmentation
from modelpar.images.loader import TestLoader
from modelpar.images.samples import Images, ImageSet
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
    """A stored test image, its class, its nearest training images and their distances."""

    query: Tensor
    label: int
    images: list[Tensor]
    labels: list[int]
    distances: list[float]


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

    The net runs in evaluation mode and then returns to its previous mode.  The units are those
    before the factor 0.5 of dropout, which scales all distances equally: 4096, or the 2048 of
    this column.  A net without activation modules has its logits as features.  Collective over
    the pair.
    """
    units: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        units.append(output.flatten(1))

    training = net.training
    net.eval()
    last = list(activations_of(net).values())[-1:]
    handles = [module.register_forward_hook(keep) for module in last]
    try:
        logits = net(images)
    finally:
        for handle in handles:
            handle.remove()
        net.train(training)
    return logits, torch.cat(units) if units else logits


def top_predictions(
    images: Sequence[Tensor], labels: Sequence[int], logits: Tensor
) -> list[Prediction]:
    """Return the most probable classes of each stored image; ``logits`` is (N, classes)."""
    top = functional.softmax(logits.double(), dim=1).topk(min(TOP, logits.shape[1]), dim=1)
    each = zip(images, labels, top.indices.tolist(), top.values.tolist(), strict=True)
    return [Prediction(*one) for one in each]


def nearest_distinct(
    images: Images, rows: Sequence[int], squared: Tensor, count: int = NEAREST
) -> tuple[list[Tensor], list[int], list[float]]:
    """Return stored images, classes and distances of the ``count`` nearest of ``rows``.

    ``squared`` (M,): their squared distances.  An image that appears several times in the data
    set is returned once.
    """
    near: list[Tensor] = []
    labels: list[int] = []
    distances: list[float] = []
    for place in squared.argsort(stable=True).tolist():
        image, label = images[rows[place]]
        if not any(torch.equal(image, other) for other in near):
            near.append(image)
            labels.append(label)
            distances.append(float(squared[place].sqrt()))
        if len(near) == count:
            break
    return near, labels, distances


def figure4(
    net: nn.Module,
    mesh: Mesh,
    images: ImageSet,
    augmentation: Augmentation,
    rows: Sequence[int],
    batch_size: int,
    workers: int,
) -> Figure4 | None:
    """Return the content of figure 4 on column 0, None on the other column.

    ``rows``: the training images to search; one batch of them is in memory at a time.  Collective
    over the pair: each column has squared distances of its units, which are added at the end.
    """
    shown, queries = (evenly_spaced(len(images.test), count) for count in (SHOWN, QUERIES))
    samples = [images.test[row] for row in (*shown, *queries)]
    stored, labels = [sample[0] for sample in samples], [int(sample[1]) for sample in samples]
    half = len(shown)
    logits, units = features(net, augmentation.center_crop(torch.stack(stored).to(mesh.device)))
    wide = units[half:].double()
    searched: Any = Subset(images.train, rows)  # pyright: ignore[reportArgumentType] - it needs an index only
    parts: list[Tensor] = []  # (queries, images of the batch)
    for batch, _ in TestLoader(searched, batch_size, mesh.device, workers=workers):
        units = features(net, augmentation.center_crop(batch))[1].double()
        parts.append(torch.stack([(units - query).square().sum(1) for query in wide]))
    squared = all_reduce_sum(torch.cat(parts, dim=1), mesh.pair).cpu()
    if mesh.column:
        return None
    neighbours = [
        Neighbours(query, label, *nearest_distinct(images.train, rows, row))
        for query, label, row in zip(stored[half:], labels[half:], squared, strict=True)
    ]
    predictions = top_predictions(stored[:half], labels[:half], logits[:half].cpu())
    return Figure4(predictions, neighbours, len(rows))
