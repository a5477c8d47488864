"""The whole net and its columns: shapes, sizes, split and merge, other devices."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from modelpar import AlexNet, Column, Link, Plan, Recipe, merge, split
from modelpar.errors import CheckpointError, SettingsError
from modelpar.groups import ModelSettings
from modelpar.net.plan import plan_for, plan_of, settings_of
from modelpar.net.weights import check_state
from modelpar.training.optimizer import MomentumDecay

RECIPES = ("paper", "code2012", "clean")


def stand_in(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """A transport without a peer: it receives a tensor of the same shape."""
    return torch.empty_like(tensor), lambda: None


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dict_has_the_documented_keys_and_shapes(recipe: str) -> None:
    net = AlexNet.from_recipe(recipe)
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == {
        "conv1.weight": (96, 3, 11, 11),
        "conv1.bias": (96,),
        "conv2.weight": (256, 48, 5, 5),
        "conv2.bias": (256,),
        "conv3.weight": (384, 256, 3, 3),
        "conv3.bias": (384,),
        "conv4.weight": (384, 192, 3, 3),
        "conv4.bias": (384,),
        "conv5.weight": (256, 192, 3, 3),
        "conv5.bias": (256,),
        "fc6.weight": (4096, 9216),
        "fc6.bias": (4096,),
        "fc7.weight": (4096, 4096),
        "fc7.bias": (4096,),
        "fc8.weight": (1000, 4096),
        "fc8.bias": (1000,),
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_initial_weights_have_the_published_distribution(recipe: str) -> None:
    net = AlexNet.from_recipe(recipe, image_size=64, seed=0)
    for name, weight in net.named_parameters():
        layer = name.partition(".")[0]
        if name.endswith("bias"):
            ones = {"conv2", "conv4", "conv5", "fc6", "fc7"}
            assert bool((weight == float(layer in ones)).all()), name
        else:
            wide = recipe != "paper" and layer in {"conv3", "conv4", "conv5"}
            assert float(weight.detach().std()) == pytest.approx(0.03 if wide else 0.01, rel=0.02)
            assert abs(float(weight.detach().mean())) < 1e-3


def test_weights_depend_on_the_seed_or_else_on_torchs_generator() -> None:
    def first(**how: int) -> torch.Tensor:
        return AlexNet.from_recipe("clean", 10, 64, **how).conv1.weight  # type: ignore[arg-type]

    assert torch.equal(first(seed=1), first(seed=1))
    assert not torch.equal(first(seed=1), first(seed=2))
    torch.manual_seed(5)
    drawn = first()
    assert not torch.equal(drawn, first())
    torch.manual_seed(5)
    assert torch.equal(drawn, first())


@pytest.mark.parametrize("size", [64, 65, 66, 67, 96, 128, 200, 224, 227, 256])
@pytest.mark.parametrize("pool", ["overlapping", "non_overlapping", "average"])
def test_other_image_sizes_work(size: int, pool: str) -> None:
    net = AlexNet.from_recipe("code2012", 7, size, pool=pool).eval()
    assert net(torch.zeros(1, 3, size, size)).shape == (1, 7)


def test_float64_works() -> None:
    net = AlexNet.from_recipe("code2012", 10, 64).double()
    assert net(torch.randn(2, 3, 64, 64).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"image_size": 63}, "image_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"pool": "max"}, "pool"),
        ({"norm": "group"}, "norm"),
        ({"net": "three_columns"}, "net"),
        ({"conv4_dropout": -0.1}, "conv4_dropout"),
        ({"net": "drop_conv3"}, "crossing_at"),  # it has no conv3 to read both
        ({"activation": "gelu"}, "activation"),
        ({"crossing_at": ("conv9",)}, "crossing_at"),
    ],
    ids=str,
)
def test_an_impossible_plan_is_refused_with_the_setting(
    change: dict[str, object], named: str
) -> None:
    with pytest.raises(SettingsError, match=named):
        AlexNet.from_recipe("paper", **change)  # type: ignore[arg-type]


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean code2012"):
        AlexNet.from_recipe("code2013")


def test_split_and_merge_are_inverse() -> None:
    whole = AlexNet.from_recipe("code2012", seed=0).state_dict()
    columns = split(whole)
    assert [sum(value.numel() for value in column.values()) for column in columns] == [
        30_483_112,  # column 0 holds fc8's bias
        30_482_112,
    ]
    assert torch.equal(columns[1]["fc8.weight"], whole["fc8.weight"][:, 2048:])
    assert torch.equal(columns[1]["conv3.weight"], whole["conv3.weight"][192:])
    merged = merge(columns)
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[key], whole[key]) for key in whole)


@pytest.mark.parametrize("column", [0, 1])
def test_a_column_loads_its_part_of_split(column: int) -> None:
    whole = AlexNet.from_recipe("clean", 10, 64, seed=1).state_dict()
    net = Column.from_recipe("clean", Link(stand_in, column), 10, 64, seed=2)
    net.load_state_dict(split(whole)[column])
    assert torch.equal(net.fc6.weight, whole["fc6.weight"][column * 2048 :][:2048])


def test_check_state_names_the_tensor() -> None:
    net = AlexNet.from_recipe("clean", 10, 64)
    state = net.state_dict()
    with pytest.raises(CheckpointError, match=r"fc8\.bias is missing"):
        check_state(net, {key: state[key] for key in state if key != "fc8.bias"}, "here")
    with pytest.raises(CheckpointError, match="extra is not a tensor of this net"):
        check_state(net, {**state, "extra": state["fc8.bias"]}, "here")
    with pytest.raises(CheckpointError, match=r"fc8\.bias has shape \(10,\)"):
        check_state(AlexNet.from_recipe("clean", 11, 64), state, "here")


def test_a_plan_equals_the_plan_of_its_settings() -> None:
    plan = Plan(Recipe.named("clean"), 10, 96, crossing_at=("fc6",), pool="average")
    assert plan_of(settings_of(plan)) == plan


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("column", [0, 1])
def test_forward_leaves_no_tensor_on_the_cpu(column: int, *, overlap: bool) -> None:
    """A tensor on the CPU would raise here; no GPU is needed."""
    device = torch.device("cuda", column)
    with FakeTensorMode(), device:
        net = Column.from_recipe("code2012", Link(stand_in, column, overlap=overlap)).train()
        logits = net(torch.empty(2, 3, 224, 224, device=device))
        assert logits.device == device
        assert logits.shape == (2, 1000)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("column", [0, 1])
def test_a_training_step_works_on_meta_tensors(column: int, recipe: str) -> None:
    net = Column.from_recipe(recipe, Link(stand_in, column)).to("meta").train()
    optimizer = MomentumDecay(net, net.plan.recipe)
    logits = net(torch.empty(2, 3, 224, 224, device="meta"))
    loss = functional.cross_entropy(logits, torch.empty(2, dtype=torch.long, device="meta"))
    loss.backward()
    for name, weight in net.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.device.type == "meta"
    optimizer.set_rates(dict.fromkeys((name for name, _ in net.named_parameters()), 0.1))
    optimizer.step()
    assert all(value.device.type == "meta" for value in optimizer.velocities().values())


def test_half_precision_norms_are_computed_in_float32() -> None:
    net = AlexNet.from_recipe("code2012", 10, 64, seed=0).eval()
    images = torch.randn(2, 3, 64, 64) * 60
    with torch.no_grad():
        exact = net.blocks.norm1(net.conv1(net.blocks.pad(images, net.conv1.weight)))
        rounded = net.blocks.norm1(net.conv1(net.blocks.pad(images, net.conv1.weight)).bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), exact, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        ("one_column", "has one column; use AlexNet"),
        ("torchvision", "is not AlexNet; use modelpar-predict"),
    ],
)
def test_a_net_that_is_not_split_has_no_column(net: str, said: str) -> None:
    plan = plan_for(Recipe.named("clean"), ModelSettings(net=net), 10, 64)
    with pytest.raises(SettingsError, match=f"net={net}: {said}"):
        Column(plan, Link(stand_in, 0))
