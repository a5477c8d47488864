"""Two columns on one host read each image once between them, and get the same batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.images.augment import Augmentation
from modelpar.images.loader import TestLoader, TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.images.samples import Images
from modelpar.training import prepare


class Counted(Images):
    """Images that count how often one of them is read."""

    def __init__(self, images: Images) -> None:
        self.images, self.side, self.labels = images, images.side, images.labels
        self.needs_decoding, self.count = images.needs_decoding, 0

    def image(self, index: int) -> torch.Tensor:
        self.count += 1
        return self.images.image(index)


def batches(mesh: Mesh, words: list[str], workers: int) -> Any:
    """Return training batches of two epochs, test batches, and how many images were read."""
    found = prepare.prepare(config.read("train", words))
    images, tests = Counted(found.images.train), Counted(found.images.test)
    order = BatchOrder(len(images), 7, 0, replica=mesh.replica, replicas=mesh.replicas)
    augmentation = Augmentation(found.statistics, 64, scaled=True, device="cpu")
    loader = TrainLoader(images, order, augmentation, mesh, crops="per_32", workers=workers)
    ends = TestLoader(tests, 3, mesh, workers=workers)
    trained = [batch for epoch in (0, 1) for batch in loader.epoch(epoch, epoch, 0.1)]
    whole = [(batch.images, batch.labels, batch.digest) for batch in trained]
    return whole, list(ends), images.count, tests.count


def equal(ours: Any, theirs: Any) -> bool:
    """Return whether two nested lists of tensors and numbers are equal."""
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("workers", [0, 2])
def test_pair_reads_each_image_once_and_gets_the_batches_of_one_process(
    pair: Ranks, images: Path, workers: int
) -> None:
    words = ["data=imagefolder", f"data.root={images}", "model.image_size=64", "batch_size=7"]
    alone = batches(Mesh(torch.device("cpu")), words, 0)
    ranks = pair.run(batches, words, workers)
    for found in ranks:
        assert equal(found[:2], alone[:2])
    for part in (2, 3):
        # The last of ten test images is a batch of its own, and too small to be divided.
        both = sum(found[part] for found in ranks)
        assert both == alone[part] + (part == 3)
    assert abs(ranks[0][2] - ranks[1][2]) == len(alone[0])  # halves of seven images


def test_replicas_read_their_own_images(two_pairs: Ranks, images: Path) -> None:
    words = ["data=imagefolder", f"data.root={images}", "model.image_size=64", "batch_size=7"]
    one, other, *second = two_pairs.run(batches, words, 2)
    assert equal(one[:2], other[:2])
    assert equal(second[0][:2], second[1][:2])
    assert not equal(one[0], second[0][0])
