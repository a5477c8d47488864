"""Figure 4: top predictions and nearest training images, on a tiny net and generated images."""

import pytest
import torch
from torch import nn

from modelpar import AlexNet
from modelpar.analysis.activations import activations_of
from modelpar.analysis.neighbours import (
    evenly_spaced,
    features,
    figure4,
    nearest_distinct,
    random_subset,
    top_predictions,
)
from modelpar.images.augment import Augmentation, Statistics
from modelpar.images.samples import ImageSet, InMemory


class Tiny(nn.Module):
    """Two units, the brightness of two halves of the values; its only activation is torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(48, 2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(2, 3)
        with torch.no_grad():
            self.hidden.weight.zero_()
            self.hidden.weight[0, :24] = 1
            self.hidden.weight[1, 24:] = 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.relu(self.hidden(images.flatten(1))))


def shaded(shades: list[int], tests: list[int]) -> ImageSet:
    """Images of 4 x 4 pixels of one shade each."""
    pixels = torch.tensor([*shades, *tests], dtype=torch.uint8)[:, None, None, None]
    images = pixels.expand(-1, 3, 4, 4).contiguous()
    labels = [shade // 100 for shade in [*shades, *tests]]
    train, test = range(len(shades)), range(len(shades), len(labels))
    return ImageSet(
        "made",
        InMemory(images, labels, list(train)),
        InMemory(images, labels, list(test)),
        ["dark", "grey", "light"],
        4,
        "",
    )


ZERO_MEAN = Statistics(torch.zeros(3, 4, 4), torch.zeros(3), torch.eye(3))
AUGMENTATION = Augmentation(ZERO_MEAN, 4, scaled=False, device="cpu")


def test_identical_image_is_nearest_with_distance_0_and_returned_once() -> None:
    images = shaded([10, 200, 90, 90, 91, 100, 60, 95, 90, 150], tests=[90, 210])
    found = figure4(Tiny(), images, AUGMENTATION, list(range(10)), batch_size=3, workers=0)
    one = found.neighbours[0]
    assert [int(image[0, 0, 0]) for image, *_ in one.nearest] == [90, 91, 95, 100, 60, 150]
    # One step of shade changes both units by 24.
    expected = [24 * 2**0.5 * step for step in (0, 1, 5, 10, 30, 60)]
    assert [distance for *_, distance in one.nearest] == pytest.approx(expected)
    assert [label for _, label, _ in one.nearest] == [0, 0, 0, 1, 0, 1]
    assert int(found.neighbours[1].nearest[0][0][0, 0, 0]) == 200
    assert found.searched == 10


def test_only_the_requested_rows_are_searched() -> None:
    images = shaded([10, 200, 90, 91], tests=[90])
    found = figure4(Tiny(), images, AUGMENTATION, [0, 1, 3], batch_size=2, workers=0)
    (one,) = found.neighbours
    assert [int(image[0, 0, 0]) for image, *_ in one.nearest] == [91, 10, 200]


def test_most_probable_classes_come_first() -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, -2.0, -3.0], [5.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    one, other = top_predictions([(image, 2), (image, 0)], logits)
    assert one.classes == [1, 2, 0, 3, 4]
    assert one.probabilities == sorted(one.probabilities, reverse=True)
    assert sum(one.probabilities) < 1
    assert other.classes[0] == other.label == 0
    assert other.probabilities[0] == pytest.approx(float(logits[1].softmax(0)[0]))


def test_all_classes_are_returned_if_there_are_few() -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    (one,) = top_predictions([(image, 1)], torch.zeros(1, 3))
    assert len(one.classes) == 3


def test_features_are_those_of_fc7_and_the_net_is_unchanged() -> None:
    net = AlexNet.from_recipe("code2012", 10, 64, seed=0).eval()
    images = 100 * torch.randn(2, 3, 64, 64)
    logits, units = features(net, images)
    assert torch.equal(logits, net(images))
    assert units.shape == (2, 4096)
    assert torch.equal(net.fc8(0.5 * units), logits)
    assert not any(module._forward_hooks for module in net.modules())


def test_activations_are_found_with_the_names_of_their_layers() -> None:
    net = AlexNet.from_recipe("code2012", 10, 64, seed=0)
    names = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]
    assert list(activations_of(net)) == names
    assert list(activations_of(Tiny())) == ["hidden"]
    assert not activations_of(nn.Linear(3, 2))


def test_indices_are_evenly_spaced_or_drawn_from_the_seed() -> None:
    assert evenly_spaced(280, 8) == [17, 52, 87, 122, 157, 192, 227, 262]
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert (
        random_subset(1000, 5, seed=0)
        == random_subset(1000, 5, seed=0)
        != random_subset(1000, 5, seed=1)
    )
    assert random_subset(4, 2000, seed=0) == [0, 1, 2, 3]
    assert nearest_distinct(shaded([1], [1]).train, [0], torch.tensor([2.0]))[0][2] == 2.0
