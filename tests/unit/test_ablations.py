"""Each experiment composes, is a small override, and builds the net it names."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modelpar import AlexNet, Column, Link, config
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import Plan, Recipe, plan_for
from modelpar.settings import TrainSettings

NAMES = sorted(path.stem for path in (config.conf_dir() / "experiment").glob("*.yaml"))
PAPERS = 60_965_224  # parameters of the paper's net
PARAMETERS = {
    "one_column": 59_798_312,
    "no_crossing": 60_714_408,
    "late_crossing": 60_965_224 - 384 * 128 * 9 + 384 * 192 * 9,  # conv3 reads one, conv4 both
    "conv6": 61_555_304,
    "wide_classes": 146_949_075,
    "drop_conv3": 60_301_288,
    "drop_conv4": 60_301_288,
    "torchvision": 61_100_840,
    # conv1, conv2, local3 and local4 on 7 x 7 places, fc10
    **dict.fromkeys(("cifar_relu", "cifar_tanh", "cifar_no_lrn"), 1_480_906),
    "cifar_lrn": 2_837_226,
}
CLEAN = {
    *("half_precision_crossing", "no_lrn2", "norm_before_relu2", "dropout_conv4", "batch256"),
}
CONTROLS = {
    **dict.fromkeys(CLEAN, "clean"),
    **dict.fromkeys(("two_columns", "two_columns_2010", "cifar_relu", "cifar_lrn")),
    **dict.fromkeys(("one_column", "one_view"), "two_columns_2010"),
    "cifar_tanh": "cifar_relu",
    "cifar_no_lrn": "cifar_lrn",
}
SCHEDULES = {  # of the runs that had their own; the others have that of their recipe
    "continued": "run145_continued",
    "two_columns_2010": "run145_2010",
    "one_view": "run145_2010",
    "one_column": "run145_half",
    "no_overlap": "run147",
    "no_lrn": "run148",
    "no_crossing": "run150",
    "conv6": "run146_2012",
    "wide_classes": "run146_2011",
    "no_lrn2": "run167",
    "norm_before_relu2": "run166",
    "dropout_conv4": "run177",
    "batch256": "run170_256",
    **dict.fromkeys(("cifar_lrn", "cifar_no_lrn"), "cifar"),
    **dict.fromkeys(("cifar_relu", "cifar_tanh"), "constant"),
    "torchvision": "every_30",
}
RECIPES = {**dict.fromkeys(CLEAN | {"clean"}, "clean"), "torchvision": "paper"}


def composed(name: str, *words: str) -> TrainSettings:
    return config.read("train", [f"experiment={name}", "data=synthetic", *words])


def stand_in(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    return torch.empty_like(tensor), lambda: None


def test_all_documented_experiments_exist() -> None:
    assert set(NAMES) >= {
        *("two_columns", "one_column", "no_lrn", "no_overlap", "no_crossing", "late_crossing"),
        *("half_precision_crossing", "no_lrn2", "norm_before_relu2", "dropout_conv4", "batch256"),
        *("clean", "conv6", "wide_classes", "no_dropout", "no_colour_noise", "one_view"),
        *("drop_conv3", "drop_conv4", "batch_norm", "lrn_within_channel", "average_pooling"),
        *("tanh", "sigmoid", "elu"),
        *("cifar_relu", "cifar_tanh", "cifar_lrn", "cifar_no_lrn", "torchvision"),
        *("two_columns_2010", "continued"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_composes_with_its_control_and_published_error(name: str) -> None:
    settings = composed(name)
    assert settings.experiment == name
    assert settings.control == CONTROLS.get(name, "two_columns")
    assert settings.recipe.name == RECIPES.get(name, "code2012")
    published = settings.published
    assert published.source
    assert (published.top1 is None) == (published.set is None) == (published.views is None)
    assert published.views in {None, 1, 9, 10}
    text = (config.conf_dir() / "experiment" / f"{name}.yaml").read_text()
    assert f"python -m modelpar.train experiment={name} " in text


@pytest.mark.parametrize("name", NAMES)
def test_each_is_one_change_of_its_control(name: str) -> None:
    labels = {"experiment", "control", "published", "control_published"}
    settings = asdict(composed(name))
    control = asdict(composed(settings["control"] or name))
    usual = asdict(Recipe.named(settings["recipe"]["name"]))["schedule"]
    assert settings["recipe"]["schedule"] == SCHEDULES.get(name, usual)
    if name not in {"clean", "torchvision"}:
        settings["recipe"]["schedule"] = control["recipe"]["schedule"]  # of a run of its own
    changed = {key for key in settings.keys() - labels if settings[key] != control[key]}
    sizes = {
        "two_columns": set(),
        "two_columns_2010": set(),
        "continued": set(),
        "clean": {"recipe"},
        "one_column": {"columns", "model"},
        "batch256": {"batch_size"},
        "one_view": {"views"},
        "half_precision_crossing": {"crossing"},
        "norm_before_relu2": {"recipe"},
        **{key: {"model", "init"} for key in ("conv6", "wide_classes")},
        "no_colour_noise": {"recipe"},
        "torchvision": {"columns", "batch_size", "model", "recipe"},
        "cifar_relu": set(),
        "cifar_lrn": set(),
    }
    assert changed == sizes.get(name, {"model"})


@pytest.mark.parametrize("name", NAMES)
def test_each_builds_its_net(name: str) -> None:
    settings = composed(name)
    recipe = Recipe(**asdict(settings.recipe))
    classes = settings.model.num_classes or (10 if name.startswith("cifar") else 1000)
    size = settings.model.image_size or 224
    plan = plan_for(recipe, settings.model, classes, size)
    with FakeTensorMode():
        net = whole_net(plan)
        images = torch.empty(2, 3, size, size)
        assert net(images).shape == (2, classes)
        sizes = {key: value.numel() for key, value in net.state_dict().items()}
        weights = sum(weight.numel() for weight in net.parameters())
        assert weights == PARAMETERS.get(name, PAPERS)
        if settings.columns == 1:
            return
        columns = [Column(plan, Link(stand_in, column)) for column in (0, 1)]
        assert columns[0](images).shape == (2, classes)
        halves = [column.state_dict() for column in columns]
        for key, size in sizes.items():
            assert sum(half[key].numel() for half in halves if key in half) == size, key


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("cifar")])
def test_a_cifar_experiment_may_be_of_other_images(name: str) -> None:
    assert config.read("train", [f"experiment={name}"]).data.name == "cifar10"
    for words in (
        ["data=fashion_mnist", f"experiment={name}"],
        [f"experiment={name}", "data=photos"],
    ):
        settings = config.read("train", words)
        assert f"data={settings.data.name}" in words
        assert settings.model.image_size == 28


def test_figure_1_is_without_regularization() -> None:
    relu, tanh = (asdict(composed(f"cifar_{name}")) for name in ("relu", "tanh"))
    for settings in (relu, tanh):
        recipe = settings["recipe"]
        assert recipe["weight_decay"] == 0
        assert (recipe["colour_noise"], recipe["crops"]) == ("none", "central")
    assert {key for key in relu["model"] if relu["model"][key] != tanh["model"][key]} == {
        "activation"
    }
    assert relu["recipe"] == tanh["recipe"]


def test_an_unknown_experiment_suggests_the_nearest() -> None:
    with pytest.raises(config.SettingsError, match="experiment=no_lr: did you mean no_lrn"):
        composed("no_lr")


@pytest.mark.parametrize("name", ["no_crossing", "conv6", "drop_conv3", "two_columns"])
def test_default_crossings_are_those_of_the_experiment(name: str) -> None:
    settings = composed(name)
    recipe = Recipe(**asdict(settings.recipe))
    said = plan_for(recipe, settings.model, 10, 224)
    settings.model.crossing_at = None
    assert plan_for(recipe, settings.model, 10, 224) == said


@pytest.mark.parametrize(
    "words",
    [
        ("model.net=drop_conv4", "model.conv4_dropout=0.2"),
        ("model.net=one_column", "columns=1", "model.crossing_at=[conv9]"),
    ],
)
def test_a_setting_for_a_missing_layer_is_refused(words: tuple[str, ...]) -> None:
    settings = config.read("train", ["data=synthetic", *words])
    with pytest.raises(config.SettingsError, match=words[-1].partition("=")[0]):
        plan_for(settings.recipe, settings.model, 10, 224)


def test_average_pooling_averages_rectified_values() -> None:
    """Whatever the recipe normalizes: only the largest may be rectified after it was chosen."""
    plan = Plan(Recipe.named("code2012"), 10, 64, norm="none", pool="average")
    blocks = AlexNet(plan, 0).eval().blocks
    maps = torch.randn(2, 96, 15, 15, generator=torch.Generator().manual_seed(5))
    expected = blocks.pool(maps.relu())
    assert torch.equal(blocks.after("conv1", maps), expected)


@pytest.mark.parametrize(
    "words",
    [
        ["model.net=conv6", "model.norm=batch", "model.activation=elu", "model.pool=average"],
        ["model.net=drop_conv3", "model.crossing_at=[conv4,fc7]", "model.dropout=0.3"],
        [
            "model.net=one_column",
            "columns=1",
            "model.norm=within_channel",
            "model.pool=non_overlapping",
        ],
    ],
    ids=str,
)
def test_settings_of_the_net_combine(words: list[str]) -> None:
    settings = config.read("train", ["data=synthetic", *words])
    plan = plan_for(settings.recipe, settings.model, 10, 224)
    with FakeTensorMode():
        assert AlexNet(plan)(torch.empty(2, 3, 224, 224)).shape == (2, 10)
