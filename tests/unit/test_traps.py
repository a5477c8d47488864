"""The places where reproductions of the paper go wrong, each by a check of its right answer.

Numbers 7 and 8 need processes: gradients at the exchange, a loss counted once and the same inputs
on both columns, in ``distributed/test_exact.py`` and ``distributed/test_training.py``.  Number 15,
published errors with their images and views, is in ``test_ablations.py``.
"""

import pytest
import torch
from torch import nn

from modelpar import AlexNet, Plan, Recipe
from modelpar.distributed import Mesh
from modelpar.images.augment import Augmentation, CropFlipColour, Statistics, principal_colours
from modelpar.net import paper
from modelpar.net.layers import AcrossMaps, DropoutSeed, WithinMap, fix_dropout
from modelpar.training.engine import evaluate
from modelpar.training.optimizer import MomentumDecay
from modelpar.training.schedule import Schedule

RECIPES = ("paper", "code2012", "clean")
CODE = ("code2012", "clean")
# The authors' colour statistics of ImageNet: standard deviations along the principal axes
# (0-255 units) and the axes themselves, one a row, in RGB (cuda-convnet2 make-data/input_meta).
IMAGENET_COLOUR_STD = (121.780, 37.094, 19.721)
IMAGENET_COLOUR_AXES = (
    (-0.5635, -0.5762, -0.5920),
    (-0.7126, -0.0235, 0.7012),
    (0.4180, -0.8170, 0.3973),
)


def plan(recipe: str) -> Plan:
    return Plan(Recipe.named(recipe), num_classes=10, image_size=64)


@pytest.mark.parametrize(
    ("recipe", "expected"), [("paper", 23.24), ("code2012", 43.87), ("clean", 43.87)]
)
def test_1_response_normalization_constants(recipe: str, expected: float) -> None:
    norm = AcrossMaps(48, Recipe.named(recipe).alpha)
    maps = torch.full((1, 48, 3, 3), 100.0)
    interior = norm(maps)[0, 2:-2]
    assert torch.allclose(interior, torch.full_like(interior, expected), atol=0.01)


def test_2_no_window_reaches_into_the_other_column() -> None:
    net = AlexNet(plan("code2012"), seed=0)
    maps = torch.randn(1, 96, 7, 7)
    other = maps.clone()
    other[:, 48] += 50
    before, after = net.blocks.norm1(maps), net.blocks.norm1(other)
    assert torch.equal(before[:, :48], after[:, :48])
    assert not torch.equal(before[:, 49], after[:, 49])


@pytest.mark.parametrize("recipe", RECIPES)
def test_3_norm_before_pool(recipe: str) -> None:
    net = AlexNet(plan(recipe), seed=0)
    order: list[str] = []
    for block in net.blocks.modules():
        if isinstance(block, AcrossMaps | WithinMap | torch.nn.MaxPool2d):
            name = type(block).__name__
            block.register_forward_hook(lambda *_, name=name: order.append(name))
    net(torch.randn(1, 3, 64, 64))
    within = [] if recipe == "paper" else ["WithinMap"]
    assert order == [
        "AcrossMaps",
        "MaxPool2d",
        "AcrossMaps",
        *within,
        "MaxPool2d",
        "MaxPool2d",
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_3_the_first_norm_reads_what_the_recipe_says(recipe: str) -> None:
    net = AlexNet(plan(recipe), seed=0)
    entered: list[torch.Tensor] = []
    for norm in (net.blocks.norm1, net.blocks.norm2):
        norm.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    net(torch.randn(1, 3, 64, 64) * 60)
    assert (float(entered[0].detach().min()) < 0) == (
        recipe in CODE
    )  # run 145: the linear response
    assert float(entered[1].detach().min()) == 0  # rectified in every recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_4_conv1_geometry(recipe: str) -> None:
    net = AlexNet.from_recipe(recipe, seed=0)
    image = torch.zeros(1, 3, 224, 224, requires_grad=True)
    maps = net.conv1(net.blocks.pad(image, net.conv1.weight))
    assert maps.shape == (1, 96, 55, 55)
    maps[0, :, 27, 27].sum().backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    columns = image.grad.abs().sum((0, 1, 2)).nonzero().flatten().tolist()
    assert rows == columns == list(range(108, 119))


def test_4_padding_around_is_torchvisions_geometry() -> None:
    recipe = Recipe(**{**vars(Recipe.named("paper")), "conv1_padding": "around"})
    net = AlexNet.from_recipe(recipe, seed=0)
    image = torch.zeros(1, 3, 224, 224, requires_grad=True)
    net.conv1(net.blocks.pad(image, net.conv1.weight))[0, :, 27, 27].sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == list(range(106, 117))


def test_5_conv3_is_dense_and_the_others_grouped() -> None:
    net = AlexNet.from_recipe("code2012", seed=0)
    groups = {
        name: net.get_submodule(name).groups
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5")
    }
    assert groups == {"conv1": 1, "conv2": 2, "conv3": 1, "conv4": 2, "conv5": 2}
    count = {
        name: sum(w.numel() for w in net.get_submodule(name).parameters()) for name in paper.LAYERS
    }
    assert count == {
        "conv1": 34_944,
        "conv2": 307_456,
        "conv3": 885_120,
        "conv4": 663_936,
        "conv5": 442_624,
        "fc6": 37_752_832,
        "fc7": 16_781_312,
        "fc8": 4_097_000,
    }
    assert sum(count.values()) == 60_965_224


@pytest.mark.parametrize("recipe", RECIPES)
def test_6_dropout_masks_in_training_and_halves_in_evaluation(recipe: str) -> None:
    net = AlexNet(plan(recipe), seed=0)
    drop = net.blocks.dropouts["fc6"]
    units = torch.rand(64, 4096) + 0.5
    drop.train()
    masked = drop(units)
    kept = masked != 0
    assert torch.equal(masked[kept], units[kept])  # never scaled
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.01)
    mean = torch.stack([drop(units) for _ in range(400)]).mean(0)
    drop.eval()
    assert torch.equal(drop(units), units * 0.5)
    assert torch.allclose(mean.mean(0), drop(units).mean(0), rtol=0.05)


def test_6_a_mask_depends_only_on_seed_step_and_layer() -> None:
    net = AlexNet(plan("code2012"), seed=0).train()
    six, seven = net.blocks.dropouts["fc6"], net.blocks.dropouts["fc7"]
    ones = torch.ones(8, 4096)

    def masks(seed: int, step: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        fix_dropout(net, DropoutSeed(seed, step, rows, 8))
        return six(ones[rows]), seven(ones[rows])

    first = masks(0, 5, slice(0, 8))
    torch.rand(100)  # the global generator must not matter
    again = masks(0, 5, slice(0, 8))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], masks(0, 6, slice(0, 8))[0])
    assert not torch.equal(first[0], masks(1, 5, slice(0, 8))[0])
    assert torch.equal(first[0][4:], masks(0, 5, slice(4, 8))[0])  # a replica's rows


def pink_images(count: int) -> torch.Tensor:
    """Images with the 1/f spectrum of photographs, standard deviation 65."""
    frequency = torch.fft.fftfreq(224)[:, None].hypot(torch.fft.rfftfreq(224)[None])
    frequency[0, 0] = 1
    noise = torch.fft.rfft2(torch.randn(count, 3, 224, 224)) / frequency
    noise[..., 0, 0] = 0
    images = torch.fft.irfft2(noise, s=(224, 224))
    return images / images.std() * 65


@pytest.mark.parametrize(("recipe", "spread"), [("code2012", 3.3e-2), ("paper", 2.3e-3)])
def test_9_logits_of_the_initial_net_differ_between_images(recipe: str, spread: float) -> None:
    net = AlexNet.from_recipe(recipe, seed=0).eval()
    with torch.no_grad():
        logits = net(pink_images(6))
    found = float(logits.std(0).mean())
    assert spread / 2.5 < found < spread * 2.5


def update(recipe: str, lr: float, *, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and velocity after two steps with gradient 1, the second at ``lr``."""
    holder = nn.Module()
    name = "bias" if bias else "weight"
    holder.conv2 = nn.Module()
    holder.conv2.register_parameter(name, nn.Parameter(torch.full((1,), 2.0)))
    weight = holder.conv2.get_parameter(name)
    optimizer = MomentumDecay(holder, Recipe.named(recipe))
    for rate in (0.01, lr):
        weight.grad = torch.ones(1)
        optimizer.set_rates({f"conv2.{name}": rate})
        optimizer.step()
    return weight.detach(), optimizer.velocities()[f"conv2.{name}"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_10_the_rate_is_inside_the_velocity(recipe: str) -> None:
    first = -0.01 * (1 + 0.0005 * 2.0)
    weight = 2.0 + first
    second = 0.9 * first - 0.001 * (1 + 0.0005 * weight)
    updated, velocity = update(recipe, 0.001, bias=False)
    assert float(velocity) == pytest.approx(second, rel=1e-5)
    assert float(updated) == pytest.approx(weight + second, rel=1e-6)


def test_10_a_rate_of_zero_changes_nothing() -> None:
    updated, velocity = update("code2012", 0.0, bias=False)
    assert float(velocity) == pytest.approx(-0.01 * 1.001, rel=1e-5)
    assert float(updated) == pytest.approx(2 - 0.01 * 1.001, rel=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_10_biases(recipe: str) -> None:
    _, velocity = update(recipe, 0.0, bias=True)
    decay = 0.0005 * 2.0 if recipe == "paper" else 0.0
    assert float(velocity) == pytest.approx(-0.01 * (1 + decay), rel=1e-5)
    rates = Schedule(Recipe.named(recipe), 90).rates(0)
    ratio = 1 if recipe == "paper" else 2
    assert rates["conv2.bias"] == pytest.approx(ratio * rates["conv2.weight"])
    assert rates["conv2.weight"] == 0.01


def imagenet_augmentation(*, scaled: bool) -> Augmentation:
    colours = Statistics(
        torch.zeros(3, 8, 8),
        torch.tensor(IMAGENET_COLOUR_STD),
        torch.tensor(IMAGENET_COLOUR_AXES),
    )
    return Augmentation(colours, 8, scaled=scaled, device="cpu")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("paper", (7.40, 7.20, 7.70)),
        ("code2012", (6.73, 6.55, 7.00)),
        ("clean", (6.73, 6.55, 7.00)),
    ],
)
def test_11_colour_noise(recipe: str, expected: tuple[float, ...]) -> None:
    augmentation = imagenet_augmentation(
        scaled=Recipe.named(recipe).colour_noise == "added_and_scaled"
    )
    draws = CropFlipColour.of_epoch(0, 0, 20_000, 0, "per_image")
    noise = Schedule(Recipe.named(recipe), 90).colour_noise(0)
    seen = augmentation.train(torch.zeros(20_000, 3, 8, 8, dtype=torch.uint8), draws, noise)
    assert torch.equal(seen[:, :, 0, 0], seen[:, :, 7, 7])  # one shift for all pixels
    assert torch.allclose(seen[:, :, 0, 0].std(0), torch.tensor(expected), rtol=0.02)
    assert not augmentation.center_crop(
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    ).any()  # not at test


def test_11_colours_are_standard_deviations_of_the_pixels() -> None:
    axes = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    pixels = torch.randn(100_000, 3, dtype=torch.float64) * torch.tensor([50.0, 20.0, 5.0])
    pixels = pixels @ axes.T + 120
    found = principal_colours(
        pixels.mean(0)[:, None, None].expand(3, 4, 4), pixels.T @ pixels / len(pixels)
    )
    assert torch.allclose(found.std, torch.tensor([50.0, 20.0, 5.0]), rtol=0.02)
    assert torch.allclose((found.axes.double() @ axes).abs(), torch.eye(3).double(), atol=0.02)


class _Constant(nn.Module):
    """Returns the top left pixel of each view as a logit."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images[:, 0, 0, 0], torch.zeros(len(images))], dim=1)


def test_12_ten_views_average_probabilities() -> None:
    mean = torch.arange(3 * 64.0).view(3, 8, 8)
    augmentation = Augmentation(
        Statistics(mean, torch.ones(3), torch.eye(3)), 6, scaled=True, device="cpu"
    )
    image = torch.arange(3 * 64, dtype=torch.uint8).view(1, 3, 8, 8)
    views = list(augmentation.ten_crop(image))
    assert len(views) == 10
    window = mean[:, 1:7, 1:7]  # central, whatever the crop
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]
    for place, (top, left) in enumerate(corners):
        assert torch.equal(
            views[2 * place][0], image[0, :, top : top + 6, left : left + 6] - window
        )
        mirrored = image.flip(-1)[0, :, top : top + 6, left : left + 6] - window
        assert torch.equal(views[2 * place + 1][0], mirrored)
    net = _Constant()
    errors = evaluate(
        net, Mesh(torch.device("cpu")), [(image, torch.tensor([0]))], augmentation, [0], views=10
    )  # type: ignore[arg-type]
    answers = torch.cat([net(view) for view in views])
    probability = answers.softmax(1).mean(0)[0]
    assert errors.loss == pytest.approx(-float(probability.log()), rel=1e-6)
    assert errors.loss != pytest.approx(-float(answers.mean(0).log_softmax(0)[0]), rel=1e-2)


def test_12_nine_views_are_a_grid_without_mirror_images() -> None:
    mean = torch.rand(3, 8, 8)
    augmentation = Augmentation(
        Statistics(mean, torch.ones(3), torch.eye(3)), 4, scaled=True, device="cpu"
    )
    image = torch.arange(3 * 64, dtype=torch.uint8).view(1, 3, 8, 8)
    places = [(top, left) for top in (0, 2, 4) for left in (0, 2, 4)]
    for view, (top, left) in zip(augmentation.nine_crop(image), places, strict=True):
        assert torch.equal(view, image[:, :, top : top + 4, left : left + 4] - mean[:, 2:6, 2:6])
    net = _Constant()
    errors = evaluate(
        net, Mesh(torch.device("cpu")), [(image, torch.tensor([0]))], augmentation, [0], views=9
    )  # type: ignore[arg-type]
    answers = torch.cat([net(view) for view in augmentation.nine_crop(image)])
    assert errors.loss == pytest.approx(-float(answers.softmax(1).mean(0)[0].log()), rel=1e-5)


def test_13_the_one_column_control_keeps_the_pairs_width() -> None:
    net = AlexNet.from_recipe("code2012", net="one_column", seed=0)
    assert net.conv5.weight.shape == (256, 192, 3, 3)
    assert net.fc6.weight.shape == (4096, 9216)
    assert net.fc7.weight.shape == (4096, 4096)
    assert sum(weight.numel() for weight in net.parameters()) == 59_798_312
    assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_14_non_overlapping_pooling_keeps_the_inputs_of_fc6() -> None:
    net = AlexNet.from_recipe("code2012", pool="non_overlapping", seed=0)
    sizes: list[int] = []
    for name in ("conv1", "conv2", "conv3", "conv5"):
        net.get_submodule(name).register_forward_hook(lambda *a: sizes.append(a[2].shape[-1]))
    net.blocks.pool.register_forward_hook(lambda *a: sizes.append(a[2].shape[-1]))
    assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert sizes == [55, 28, 26, 13, 13, 11, 6]
    assert net.fc6.weight.shape == (4096, 9216)
