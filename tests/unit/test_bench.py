"""What the benchmark compares is the same net, and what it prints is what it measured."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from modelpar import AlexNet, config, settings
from modelpar.bench import anatomy, measure, report
from modelpar.bench.steps import CONTENDERS, Plain, gflop
from modelpar.errors import SettingsError
from modelpar.net.plan import plan_from


@pytest.mark.parametrize("recipe", ["paper", "code2012", "clean"])
def test_plain_torch_is_the_same_net(recipe: str) -> None:
    plan = plan_from(recipe, 10, 64, {"dropout": 0.0})
    plain, ours = Plain(plan).double(), AlexNet(plan, seed=1).double()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64) * 60
    torch.testing.assert_close(plain(images), ours(images), rtol=1e-11, atol=1e-11)


def test_the_work_of_a_step_is_counted() -> None:
    # 665,784,864 multiplications of the convolutions, 58,621,952 of the rest (section 3.5);
    # forward, weights' and inputs' gradients, but none of conv1's inputs (105,415,200)
    plan = plan_from("code2012", 1000, 224, {})
    expected = 2 * (3 * (665_784_864 + 58_621_952) - 105_415_200) / 1e9
    assert gflop(plan, 2) == pytest.approx(2 * expected, rel=1e-6)
    assert gflop(plan, 128) == pytest.approx(529, rel=0.01)


def test_settings_and_contenders_name_the_same() -> None:
    assert tuple(CONTENDERS) == settings.CONTENDERS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["contenders=[plane]"], "contenders=plane: did you mean plain?"),
        (["contenders=[]"], "contenders=[]: use one or more"),
        (["precisions=[float16]"], "precisions=float16: did you mean bfloat16?"),
        (["batch_sizes=[7]"], "batch_sizes=7: ddp halves a batch"),
        (["batch_sizes=[]"], "batch_sizes=[]: use one or more"),
        (["rounds=0"], "rounds=0: use 1 or more"),
        (["link.rates=[100]"], "link: requires two hosts; use launch/slow_link.sh"),
        (["link.hosts=[a,b]", "link.rates=[0]"], "link.rates=0.0: use 0.001 or more"),
        (["link.hosts=[a]"], "link: requires two hosts"),
        (["link.rate=3"], "did you mean link.rates?"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        config.read("benchmark", words)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


class World:
    """Stands for processes that told what they took."""

    def __init__(self, name: str) -> None:
        self.name, self.precision = name, "float32"


def case(name: str, rate: float | None, *seconds: float) -> measure.Case:
    turns = [[{"seconds": [one, one, 9 * one]}, {"seconds": [one / 2] * 3}] for one in seconds]
    return measure.Case(World(name), rate, turns)  # type: ignore[arg-type]


def test_ratios_are_taken_round_by_round() -> None:
    plain, ddp = case("plain", None, 4.0, 8.0), case("ddp", None, 3.0, 6.0)
    ours, slow = case("pair", None, 1.0, 2.0), case("pair", 100.0, 2.0, 8.0)
    slow.world = ours.world
    cases = [plain, ddp, ours, slow]
    assert ours.seconds() == [1.0, 2.0]  # the slower process, the median step
    assert measure._ratios(ours, cases)["plain float32"] == {"median": 4, "low": 4, "high": 4}
    assert measure._ratios(ours, cases)["ddp"]["median"] == 3
    found = measure._ratios(slow, cases)
    assert found["full rate"] == {"median": 0.375, "low": 0.25, "high": 0.5}
    assert found["plain"] == {"median": 1.5, "low": 1.0, "high": 2.0}  # needs no wire
    assert "ddp" not in found  # not at that rate


def test_a_step_is_laid_out_by_layer() -> None:
    plan = plan_from("code2012", 10, 64, {})
    net = Plain(plan)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)

    def step() -> None:
        net(torch.randn(4, 3, 64, 64)).sum().backward()
        optimizer.step()

    spans = anatomy.profiled(step, net)
    spent = anatomy.seconds(spans)
    assert list(spent) == list(anatomy.PLACES)
    assert spent.pop("crossings") == 0
    assert all(value > 0 for value in spent.values())
    assert spent["rest"] < sum(spent.values()) / 2
    for one, other in pairwise(spans):
        assert other.start >= one.end - 1e-6 or other.start == one.start


def test_shapes_that_two_layers_share_are_the_firsts() -> None:
    shapes = anatomy._shapes(AlexNet.from_recipe("code2012", 1000, 224))
    weights = {name: module for name, module in shapes.items() if module.startswith("fc")}
    assert weights[4096, 9216] == weights[9216, 4096] == weights[4096, 4608] == "fc6"
    assert weights[4096, 4096] == "fc7"


def test_tables_and_picture_are_made_of_the_result(tmp_path: Path) -> None:
    picture = pytest.importorskip("modelpar.bench.picture")
    spread = {"median": 2.0, "low": 1.5, "high": 2.5}
    row: dict[str, Any] = {
        "contender": "pair",
        "precision": "float32",
        "batch_size": 8,
        "link_mbit": None,
        "step_s": spread,
        "images_per_s": {key: 8 / value for key, value in spread.items()},
        "ratios": {"plain float32": spread, "ddp": spread},
        "share_of_peak": 0.5,
        "peak_bytes": 2_000_000,
        "wire_bytes": 3_000_000,
        "counted_bytes": 2_900_000,
        "crossing_s": 0.004,
        "swaps_alone_s": 0.016,
        "hidden": 0.75,
        "first_step_s": 7.0,
        "layers": dict.fromkeys(anatomy.PLACES, 0.001),
    }
    slow = {**row, "link_mbit": 100.0, "ratios": {"full rate": {**spread, "median": 0.9}}}
    spans = [{"from": 0.0, "to": 1.0, "place": "conv1"}, {"from": 0.5, "to": 2, "place": "travel"}]
    result = {
        "machine": measure.machine(),
        "settings": {
            "image_size": 64,
            "num_classes": 10,
            "recipe": {"name": "paper"},
            "rounds": 2,
            "steps": 1,
        },
        "peaks": [{"batch_size": 8, "float32": {"matrix": 90.0, "convolution": 100.0}}],
        "rows": [row, slow],
        "timelines": {"float32, batch 8": [spans, spans]},
    }
    text = report.tables(json.loads(json.dumps(result)))
    assert "| pair | float32 | 2.00 (1.50-2.50) | 4.0 | 2.00 (1.50-2.50) |  |" in text
    assert "| 50% | 2 | 3.0 | 4 | 16 | 75% | 7 |" in text
    assert "| 100 Mbit/s | pair | float32 |" in text
    picture.draw(result, tmp_path / "benchmark.png")
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
