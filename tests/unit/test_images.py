"""Order, augmentation and batches depend only on seed, epoch and position."""

import random
import warnings

import pytest
import torch

from modelpar.distributed import Mesh
from modelpar.errors import DataError, SettingsError
from modelpar.images import loader as loaders
from modelpar.images.augment import Augmentation, CropFlipColour, Statistics
from modelpar.images.loader import TestLoader, TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.images.samples import Images, InMemory, Resized

CPU = Mesh(torch.device("cpu"))


class Numbered(Images):
    """Image i is the constant i."""

    side = 10

    def __init__(self, length: int, damaged: int | None = None) -> None:
        self.labels = torch.arange(length)
        self.damaged = damaged

    def image(self, index: int) -> torch.Tensor:
        if index == self.damaged:
            raise DataError(f"photo {index}.jpg: cannot read image")
        return torch.full((3, 10, 10), index, dtype=torch.uint8)


def augmentation() -> Augmentation:
    statistics = Statistics(torch.zeros(3, 10, 10), torch.ones(3), torch.eye(3))
    return Augmentation(statistics, 8, scaled=False, device="cpu")


def sample_order(seed: int, epoch: int, shuffle: str) -> torch.Tensor:
    return BatchOrder(100, 1, seed, shuffle=shuffle).samples(epoch)


def loader(workers: int = 0, **how: int | bool) -> TrainLoader:
    order = BatchOrder(50, 8 // int(how.get("replicas", 1)), seed=1, **how)  # type: ignore[arg-type]
    return TrainLoader(Numbered(50), order, augmentation(), CPU, crops="per_32", workers=workers)


def test_shuffle_once_uses_the_same_order_in_each_epoch() -> None:
    orders = [sample_order(3, epoch, "once") for epoch in range(3)]
    assert torch.equal(orders[0], orders[2])
    assert sorted(orders[0].tolist()) == list(range(100))
    assert not torch.equal(orders[0], sample_order(4, 0, "once"))


def test_shuffle_every_epoch_uses_a_new_order() -> None:
    one, other = (sample_order(3, epoch, "every_epoch") for epoch in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(other, sample_order(3, 1, "every_epoch"))


def test_incomplete_last_batch_is_dropped() -> None:
    assert len(BatchOrder(50, 8, 0)) == 6
    assert len(BatchOrder(50, 4, 0, replicas=2)) == 6


def test_batch_larger_than_the_data_is_an_error() -> None:
    with pytest.raises(SettingsError, match="batch_size=51"):
        BatchOrder(50, 51, 0)


def test_replicas_split_the_global_batch() -> None:
    whole = BatchOrder(50, 8, 1).batches(0)
    parts = [BatchOrder(50, 4, 1, replica=replica, replicas=2).batches(0) for replica in (0, 1)]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(batch, torch.cat(halves))


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_can_start_at_any_batch(workers: int) -> None:
    whole = [(b.images, b.labels) for b in loader().epoch(2, 0, 0.1)]
    rest = [(b.images, b.labels) for b in loader(workers).epoch(2, 4, 0.1)]
    assert len(whole) == 6
    assert len(rest) == 2
    for (images, labels), (again, labels_again) in zip(whole[4:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


def test_two_replicas_read_the_images_of_one_process() -> None:
    whole = list(loader().epoch(0, 0, 0.1))
    parts = [list(loader(replica=replica, replicas=2).epoch(0, 0, 0.1)) for replica in (0, 1)]
    for number, batch in enumerate(whole):
        both = torch.cat([part[number].images for part in parts])
        assert torch.equal(batch.images, both)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_do_not_use_the_global_generators(workers: int) -> None:
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    list(loader(workers).epoch(0, 0, 0.1))
    list(TestLoader(Numbered(5), 2, CPU, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def of_memory(channels: int, shuffle: str, replica: int, *, resident: bool = True) -> TrainLoader:
    """Return a loader over 50 images in memory, which hold 60 samples."""
    pixels = torch.randint(
        0,
        256,
        (50, channels, 10, 10),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(4),
    )
    images = InMemory(pixels, list(range(100, 150)), [*range(50), *range(10)])
    order = BatchOrder(60, 4, seed=1, replica=replica, replicas=2, shuffle=shuffle)
    return TrainLoader(images, order, augmentation(), CPU, crops="per_image", resident=resident)


@pytest.mark.parametrize("shuffle", ["once", "every_epoch", "never"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_stay_on_the_device_give_the_same_batches(
    monkeypatch: pytest.MonkeyPatch, channels: int, shuffle: str
) -> None:
    monkeypatch.setattr(loaders, "PIXELS_EVERY", 3)
    for replica in (0, 1):
        read = of_memory(channels, shuffle, replica)
        with monkeypatch.context() as patched:
            patched.setattr(loaders, "_fits", lambda *_: True)
            never = of_memory(channels, shuffle, replica, resident=False)
            resident = of_memory(channels, shuffle, replica)
        assert type(read.source) is type(never.source) is not type(resident.source)
        for epoch, start in ((0, 0), (1, 0), (2, 4), (1, 0), (5, 3)):
            pairs = zip(
                read.epoch(epoch, start, 0.1), resident.epoch(epoch, start, 0.1), strict=True
            )
            for expected, found in pairs:
                assert torch.equal(found.images, expected.images)
                assert torch.equal(found.labels, expected.labels)
                assert found.labels.dtype == expected.labels.dtype
                assert found.digest == expected.digest


def test_digest_of_images_on_the_device_shows_another_pixel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loaders, "_fits", lambda *_: True)
    one, other = (of_memory(3, "once", 0) for _ in range(2))
    row = int(other.source.order.samples(0)[0]) % 50
    other.source.pixels[row, 1, 2, 3] ^= 1  # type: ignore[union-attr]
    digests = [[batch.digest for batch in each.epoch(0, 0, 0.1)] for each in (one, other)]
    assert digests[0][0] != digests[1][0]
    assert digests[0][1:] == digests[1][1:]  # without their pixels


def test_warnings_of_pillow_are_hidden_when_a_set_exists() -> None:
    with warnings.catch_warnings(record=True) as shown:
        for _ in range(2):
            warnings.warn_explicit("odd metadata", UserWarning, "f", 1, module="PIL.TiffTags")
            Resized(str, [], 1)
    assert len(shown) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_reported_in_one_line(workers: int) -> None:
    tests = TestLoader(Numbered(9, damaged=7), 2, CPU, workers=workers)
    with pytest.raises(DataError) as error:
        list(tests)
    assert str(error.value) == "photo 7.jpg: cannot read image"


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_test_image_is_read_once(replicas: int) -> None:
    found: list[int] = []
    for replica in range(replicas):
        mesh = Mesh(CPU.device, replicas=replicas, replica=replica)
        for _, labels in TestLoader(Numbered(10), 4, mesh):
            found += labels.tolist()
    assert sorted(found) == list(range(10))


def test_crop_and_flip_are_shared_by_32_images_or_drawn_per_image() -> None:
    shared = CropFlipColour.of_epoch(0, 0, 100, 32, "per_32")
    for first in range(0, 100, 32):
        chunk = shared.at(slice(first, min(first + 32, 100)))
        assert len(chunk.corner.unique(dim=0)) == 1
        assert len(chunk.flip.unique()) == 1
        assert len(chunk.colour.unique(dim=0)) == len(
            chunk.colour
        )  # each image has its own colour noise
    single = CropFlipColour.of_epoch(0, 0, 20_000, 32, "per_image")
    assert len(single.corner.unique(dim=0)) == 33 * 33  # offsets 0 to 32 in each direction
    assert float(single.flip.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert not torch.equal(
        single.corner, CropFlipColour.of_epoch(0, 1, 20_000, 32, "per_image").corner
    )


def test_central_crops_equal_those_of_an_evaluation() -> None:
    crops = augmentation()
    images = torch.randint(0, 256, (5, 3, 10, 10), dtype=torch.uint8)
    draws = CropFlipColour.of_epoch(0, 3, 5, crops.border, "central")
    assert torch.equal(crops.train(images, draws, 0.0), crops.center_crop(images))


def test_training_image_is_the_flipped_crop_minus_the_central_mean() -> None:
    mean = torch.randn(3, 10, 10)
    statistics = Statistics(mean, torch.ones(3), torch.eye(3))
    crops = Augmentation(statistics, 8, scaled=True, device="cpu")
    image = torch.randint(0, 256, (2, 3, 10, 10), dtype=torch.uint8)
    draws = CropFlipColour(
        torch.tensor([[0, 2], [1, 0]]), torch.tensor([True, False]), torch.zeros(2, 3)
    )
    found = crops.train(image, draws, 0.0)
    window = mean[:, 1:9, 1:9]
    assert torch.equal(found[0], image[0, :, 0:8, 2:10].flip(-1).float() - window)
    assert torch.equal(found[1], image[1, :, 1:9, 0:8].float() - window)
    noisy = crops.train(image, draws, 0.1)
    assert torch.allclose(noisy, found / 1.1)  # scaled although the colour noise is zero
