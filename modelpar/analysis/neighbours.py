"""Figure 4: what the net takes test images for, and which training images it finds most like them.

Section 6.1: "if two images produce feature activation vectors with a small Euclidean separation,
we can say that the higher levels of the neural network consider them to be similar".
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset
from torchvision.utils import make_grid

from modelpar.analysis.activations import activations_of
from modelpar.distributed import Mesh, all_reduce_sum
from modelpar.images.augment import Augmentation
from modelpar.images.loader import TestLoader
from modelpar.images.samples import Images, ImageSet
from modelpar.seeding import generator

SHOWN: Final = 8  # figure 4: test images with their likeliest classes
LIKELIEST: Final = 5  # figure 4
QUERIES: Final = 5  # figure 4: test images in the first column
NEAREST: Final = 6  # figure 4: training images beside each
BORDER: Final = 2  # pixels around each picture


@dataclass(frozen=True)
class Prediction:
    """A stored image (3, T, T), its class, the likeliest classes, and how likely they are."""

    image: Tensor
    label: int
    classes: list[int]
    probabilities: list[float]


@dataclass(frozen=True)
class Neighbours:
    """A stored test image, its class, the training images nearest to it and their distances."""

    query: Tensor
    label: int
    images: list[Tensor]
    labels: list[int]
    distances: list[float]


@dataclass(frozen=True)
class Figure4:
    """Both halves of the figure, and how many training images were looked at."""

    predictions: list[Prediction]
    neighbours: list[Neighbours]
    searched: int


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return ``count`` places, or all, at equal distances: sets often lie sorted by class."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


@torch.no_grad()
def features(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (N, classes) and the last hidden units (N, D) of images (N, 3, S, S).

    In evaluation, before dropout halves them, which changes all distances alike: 4096 units, or
    this column's 2048.  Where no activation can be seen, the logits themselves.  A collective of
    the pair; the net's mode is as it was.
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
    """Return the likeliest classes of each stored image, by its logits (N, classes)."""
    shares = functional.softmax(logits.double(), dim=1)
    found = shares.topk(min(LIKELIEST, shares.shape[1]), dim=1)
    return [
        Prediction(image, label, classes.tolist(), values.tolist())
        for image, label, classes, values in zip(
            images, labels, found.indices, found.values, strict=True
        )
    ]


def squared_distances(
    net: nn.Module, queries: Tensor, batches: Iterable[tuple[Tensor, Any]], lens: Augmentation
) -> Tensor:
    """Return squared Euclidean distances (Q, M) of hidden units, one batch in memory at a time.

    ``queries`` (Q, D) against the stored images of ``batches``, M in all: over this column's units
    alone.  A collective of the pair.
    """
    wide = queries.double()
    found: list[Tensor] = []
    for stored, _ in batches:
        units = features(net, lens.center_crop(stored))[1].double()
        found.append(torch.stack([(units - query).square().sum(1) for query in wide]))
    return torch.cat(found, dim=1)


def nearest_distinct(
    images: Images, rows: Sequence[int], squared: Tensor, count: int = NEAREST
) -> tuple[list[Tensor], list[int], list[float]]:
    """Return the ``count`` nearest of ``rows`` by their ``squared`` distances (M,).

    Stored images, classes and distances.  Sets may show an image several times: once is enough.
    """
    near: list[Tensor] = []
    labels: list[int] = []
    distances: list[float] = []
    order = squared.argsort(stable=True)
    for place in order.tolist():
        image, label = images[rows[place]]
        if not any(torch.equal(image, other) for other in near):
            near.append(image)
            labels.append(label)
            distances.append(float(squared[place].sqrt()))
        if len(near) == count:
            break
    return near, labels, distances


def random_subset(total: int, count: int, seed: int) -> list[int]:
    """Return which of ``total`` training images are looked at: ``count`` of them, by the seed."""
    order = torch.randperm(total, generator=generator(seed, "figure4"))
    return sorted(order[:count].tolist())


def figure4(
    net: nn.Module,
    mesh: Mesh,
    images: ImageSet,
    lens: Augmentation,
    rows: Sequence[int],
    batch_size: int,
    workers: int,
) -> Figure4 | None:
    """Return what figure 4 shows, looking at the training images ``rows``; on column 0 alone.

    A collective of the pair, which sums the distances once, at the end.
    """
    places = [*evenly_spaced(len(images.test), SHOWN), *evenly_spaced(len(images.test), QUERIES)]
    samples = [images.test[place] for place in places]
    stored, labels = [sample[0] for sample in samples], [int(sample[1]) for sample in samples]
    logits, units = features(net, lens.center_crop(torch.stack(stored).to(mesh.device)))
    half = len(evenly_spaced(len(images.test), SHOWN))
    looked_at: Any = Subset(images.train, rows)  # pyright: ignore[reportArgumentType] - indexed is enough
    batches = TestLoader(looked_at, batch_size, mesh.device, workers=workers)
    squared = all_reduce_sum(squared_distances(net, units[half:], batches, lens), mesh.pair).cpu()
    if mesh.column:
        return None
    near = [nearest_distinct(images.train, rows, row) for row in squared]
    likenesses = [
        Neighbours(query, label, *found)
        for query, label, found in zip(stored[half:], labels[half:], near, strict=True)
    ]
    answers = top_predictions(stored[:half], labels[:half], logits[:half].cpu())
    return Figure4(answers, likenesses, len(rows))


def nearest_picture(likenesses: Sequence[Neighbours]) -> Tensor:
    """Return figure 4's right half (3, H, W) in 0..1: each query, a gap, what is nearest to it."""
    white = torch.full_like(likenesses[0].query, 255)
    rows = [[*one.images, *[white] * NEAREST][:NEAREST] for one in likenesses]
    queries = _grid([one.query for one in likenesses], 1)
    found = _grid([image for row in rows for image in row], NEAREST)
    gap = torch.ones(3, queries.shape[1], 2 * BORDER)
    return torch.cat([queries, gap, found], dim=2)


def _grid(images: Sequence[Tensor], columns: int) -> Tensor:
    bright = torch.stack(list(images)).float() / 255
    framed = functional.pad(bright, [BORDER] * 4, value=1.0)  # make_grid frames no single picture
    return make_grid(framed, nrow=columns, padding=0)
