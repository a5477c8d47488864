"""The baselines without columns: sizes, layers, weights, masks, and refused settings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional

from modelpar import AlexNet, Plan, config
from modelpar.errors import SettingsError
from modelpar.net.four_layer import FourLayer, Local, Torchvision, whole_net
from modelpar.net.layers import AcrossMaps, DropoutSeed, fix_dropout
from modelpar.net.plan import plan_for, plan_of, settings_of
from modelpar.training.optimizer import MomentumDecay


def plan(net: str, *words: str, classes: int = 10, size: int = 28) -> Plan:
    settings = config.read("train", [f"model.net={net}", *words])
    return plan_for(settings.recipe, settings.model, classes, size)


def kept_and_moved(build: Callable[[], Any]) -> tuple[Any, bool]:
    """Return what ``build`` builds, and whether it moved torch's global generator."""
    before = torch.get_rng_state()
    built = build()
    return built, not torch.equal(before, torch.get_rng_state())


# -- locally connected ---------------------------------------------------------------------------


def local(inputs: int, outputs: int, kernel: int, side: int) -> Local:
    layer = Local(inputs, outputs, kernel, side).to_empty(device="cpu").double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def test_each_place_has_other_weights() -> None:
    layer, side = local(3, 4, 3, 5), 5
    maps = torch.randn(2, 3, side, side, dtype=torch.float64)
    around = functional.pad(maps, (1, 1, 1, 1))
    expected = torch.empty(2, 4, side, side, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            window = around[:, :, row : row + 3, column : column + 3]
            place = row * side + column
            kernels = layer.weight[place].view(4, 3, 3, 3)
            sums = (window[:, None] * kernels).sum((2, 3, 4))
            expected[:, :, row, column] = sums + layer.bias[place]
    found = layer(maps)
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_with_shared_weights_it_is_a_convolution(order: torch.memory_format) -> None:
    layer = local(6, 4, 3, 7)
    kernels = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(kernels.flatten(1))
        layer.bias.copy_(bias)
    maps = torch.randn(3, 6, 7, 7, dtype=torch.float64).contiguous(memory_format=order)
    maps.requires_grad_()
    expected = functional.conv2d(maps, kernels, bias, padding=1)
    found = layer(maps)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), maps)
    (gradient,) = torch.autograd.grad((found * weight).sum(), maps)
    assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_locally_connected_passes_gradcheck() -> None:
    layer = local(2, 2, 3, 3)
    maps = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda *values: torch.func.functional_call(
            layer, {"weight": values[1], "bias": values[2]}, (values[0],)
        ),
        (maps, layer.weight, layer.bias),
    )


# -- figure 1's and section 3.3's ----------------------------------------------------------------


@pytest.mark.parametrize(("norm", "maps"), [("none", 32), ("response", 64)])
@pytest.mark.parametrize("size", [24, 28])
def test_the_four_layers_are_those_of_the_files(norm: str, maps: int, size: int) -> None:
    places = (size // 4) ** 2  # pools round up: 24, 12, 6 and 28, 14, 7
    expected = {
        "conv1": 64 * 5 * 5 * 3 + 64,
        "conv2": 64 * 5 * 5 * 64 + 64,
        "local3": places * (maps * 3 * 3 * 64 + maps),
        "local4": places * (32 * 3 * 3 * maps + 32),
        "fc10": 10 * places * 32 + 10,
    }
    net = whole_net(plan("four_layer", f"model.norm={norm}", size=size), seed=0)
    assert isinstance(net, FourLayer)
    found = {
        name: sum(weight.numel() for weight in layer.parameters())
        for name, layer in net.named_children()
        if any(True for _ in layer.parameters())
    }
    assert found == expected
    assert net(torch.randn(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("size", [6, 7, 32])
def test_the_smallest_image_still_fills_the_second_pool(size: int) -> None:
    net = whole_net(plan("four_layer", size=size), seed=0)
    assert net(torch.randn(1, 3, size, size)).shape == (1, 10)
    assert net.plan.pooled(6) == 3


def test_the_four_layers_start_as_in_the_files() -> None:
    net, moved = kept_and_moved(lambda: whole_net(plan("four_layer"), seed=0))
    assert not moved
    for name, std in {
        "conv1": 1e-4,
        "conv2": 0.01,
        "local3": 0.04,
        "local4": 0.04,
        "fc10": 0.01,
    }.items():
        layer = net.get_submodule(name)
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.05)
        assert not layer.bias.any()
    again = whole_net(plan("four_layer"), seed=0).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in net.state_dict().items())
    assert not torch.equal(net.conv2.weight, whole_net(plan("four_layer"), seed=1).conv2.weight)


def test_the_norm_equals_torchs_over_nine_maps() -> None:
    net = whole_net(plan("four_layer"), seed=0).double()
    maps = (torch.randn(2, 64, 5, 5, dtype=torch.float64) * 60).requires_grad_()
    torchs = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
    weight = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((torchs(maps) * weight).sum(), maps)
    for norm in (net.norm1, net.norm2):
        assert torch.allclose(norm(maps), torchs(maps), rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad((norm(maps) * weight).sum(), maps)
        assert torch.allclose(gradient, wanted, rtol=1e-11, atol=1e-12)
    assert gradcheck(
        AcrossMaps(11, 0.5, 9, 1.0).double(), (maps[:1, :11].detach().clone().requires_grad_(),)
    )


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_increasing_function_may_follow_the_pool(activation: str) -> None:
    """The first file rectifies conv1 and pools, the second pools and rectifies."""
    net = whole_net(
        plan("four_layer", f"model.activation={activation}", "model.norm=none"), seed=0
    )
    maps = torch.randn(2, 64, 28, 28)
    activate = net.activations["conv1"]
    assert torch.equal(activate(net.pool(maps)), net.pool(activate(maps)))


@pytest.mark.parametrize(("norm", "fc10"), [("none", 0.004), ("response", 0.01)])
def test_each_layer_decays_as_in_its_file(norm: str, fc10: float) -> None:
    words = [f"model.norm={norm}", "recipe.weight_decay=0.004"]
    chosen = plan("four_layer", *words)
    net = whole_net(chosen, seed=0)
    optimizer = MomentumDecay(net, chosen.recipe, factors=chosen.decays)
    found = {group["name"]: group["decay"] for group in optimizer.param_groups}
    assert {key: value for key, value in found.items() if value} == pytest.approx(
        {"local3.weight": 0.004, "local4.weight": 0.004, "fc10.weight": fc10}
    )


# -- torchvision's -------------------------------------------------------------------------------


def test_torchvisions_net_is_its_class_with_its_weights() -> None:
    chosen = plan("torchvision", classes=1000, size=224)
    net, moved = kept_and_moved(lambda: whole_net(chosen, seed=0))
    assert not moved
    assert isinstance(net, torchvision.models.AlexNet)
    theirs = torchvision.models.AlexNet()
    theirs.load_state_dict(net.state_dict())  # its names and shapes
    assert sum(weight.numel() for weight in net.parameters()) == 61_100_840
    images = torch.randn(2, 3, 224, 224) * 60
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.equal(net.eval()(images), theirs.eval()(images / (255 * std)))


def test_torchvisions_weights_depend_only_on_the_seed() -> None:
    chosen = plan("torchvision", size=64)
    nets = [whole_net(chosen, seed).state_dict() for seed in (0, 0, 1)]
    torch.manual_seed(5)
    nets.append(whole_net(chosen, None).state_dict())
    torch.manual_seed(5)
    nets.append(torchvision.models.AlexNet(10).state_dict())
    same = [
        all(torch.equal(one[key], other[key]) for key in one)
        for one, other in ((nets[0], nets[1]), (nets[0], nets[2]), (nets[3], nets[4]))
    ]
    assert same == [True, False, True]


def masked(net: Torchvision, draw: DropoutSeed | None, units: torch.Tensor) -> torch.Tensor:
    fix_dropout(net, draw)
    return net.classifier[0](units)


def test_torchvisions_masks_cover_the_whole_batch_and_are_scaled() -> None:
    net = whole_net(plan("torchvision", size=64), seed=0).train()
    assert isinstance(net, Torchvision)
    units = torch.ones(8, 9216)
    all_rows, moved = kept_and_moved(lambda: masked(net, DropoutSeed(0, 3, slice(0, 8), 8), units))
    assert not moved
    torch.manual_seed(99)
    assert torch.equal(all_rows, masked(net, DropoutSeed(0, 3, slice(0, 8), 8), units))
    assert torch.equal(all_rows[4:], masked(net, DropoutSeed(0, 3, slice(4, 8), 8), units[4:]))
    assert not torch.equal(all_rows, masked(net, DropoutSeed(0, 4, slice(0, 8), 8), units))
    assert set(all_rows.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(all_rows[:, :4096], net.classifier[3](units[:, :4096]))
    assert torch.equal(masked(net.eval(), None, units), units)


def test_torchvisions_dropout_may_be_left_out() -> None:
    net = whole_net(plan("torchvision", "model.dropout=0", size=64), seed=0).train()
    units = torch.randn(2, 9216)
    assert torch.equal(net.classifier[0](units), units)


# -- both ----------------------------------------------------------------------------------------


def test_any_other_net_is_alexnet() -> None:
    assert isinstance(whole_net(plan("one_column", size=64), seed=0), AlexNet)


@pytest.mark.parametrize("net", ["four_layer", "torchvision"])
def test_a_plan_equals_the_plan_of_its_settings(net: str) -> None:
    chosen = plan(net, size=64)
    assert plan_of(settings_of(chosen)) == chosen
    assert chosen.columns == 1
    assert chosen.crossing_at == ()


@pytest.mark.parametrize("net", ["four_layer", "torchvision"])
def test_each_baseline_computes_in_bfloat16(net: str) -> None:
    chosen = plan(net, size=64)
    built = whole_net(chosen, seed=0).eval()
    images = torch.randn(2, 3, 64, 64) * 60
    exact = built(images)
    half = built.to(torch.bfloat16, memory_format=torch.channels_last)(images)
    assert half.dtype == torch.bfloat16
    assert float((half - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(
    ("net", "word", "expected"),
    [
        (
            "four_layer",
            "model.dropout=0.5",
            "model.dropout=0.5: model.net=four_layer takes only 0.0",
        ),
        ("four_layer", "model.conv4_dropout=0.2", "model.conv4_dropout=0.2: model.net=four_layer"),
        (
            "four_layer",
            "model.norm=first_only",
            "takes only response or none; leave model.norm out",
        ),
        (
            "four_layer",
            "model.pool=non_overlapping",
            "model.pool=non_overlapping: model.net=four_layer takes only over",
        ),
        (
            "four_layer",
            "model.crossing_at=[conv3]",
            "model.crossing_at=[conv3]: model.net=four_la",
        ),
        ("torchvision", "model.norm=response", "model.norm=response: model.net=torchvision takes"),
        ("torchvision", "model.activation=tanh", "model.activation=tanh: model.net=torchvision"),
        ("torchvision", "model.pool=average", "model.pool=average: model.net=torchvision takes o"),
        ("torchvision", "model.conv4_dropout=0.2", "model.conv4_dropout=0.2: model.net=torchvis"),
        ("torchvision", "model.crossing_at=[fc6]", "model.crossing_at=[fc6]: model.net=torchvis"),
    ],
)
def test_a_setting_that_the_net_does_not_have_is_refused(
    net: str, word: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as error:
        plan(net, word, size=64)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("net", "size", "least"), [("four_layer", 5, 6), ("torchvision", 62, 63), ("conv6", 63, 64)]
)
def test_each_net_has_a_smallest_image(net: str, size: int, least: int) -> None:
    with pytest.raises(SettingsError, match=f"model.image_size={size}: use {least} pixels"):
        plan(net, size=size)
    assert plan(net, size=least).image_size == least
