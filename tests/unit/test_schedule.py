"""The published rates over the epochs, and how they scale with the length."""

import math
from dataclasses import asdict, replace

import pytest

from modelpar import Recipe, config
from modelpar.errors import SettingsError
from modelpar.net import paper
from modelpar.training.schedule import Plateau, Schedule


def rates(recipe: str, epoch: int, epochs: int) -> dict[str, float]:
    return Schedule(Recipe.named(recipe), epochs).rates(epoch)


# By hand: the notes at the end of layer-params-N.cfg, as epoch and rate; what the notes do not say
# is from the rates in the file.  Length, weights, conv1's weight, biases, epochs of the noise.
LOGGED = {
    "run145": (91, "0 1e-2 25 1e-3 51 1e-4 79 1e-5", "67 1e-5 72 0", "0 .02", "67 off"),
    "run145_continued": (
        135,
        "0 1e-2 25 1e-3 51 1e-4 79 1e-5 91 1e-3 107 1e-4 124 1e-5",
        "67 1e-5 72 0",
        "0 .02",
        "67 off 91 on 124 off",
    ),
    "run145_2010": (
        93,
        "0 1e-2 23 1e-3 51 1e-4 78 1e-5",
        "68 1e-5 72 0",
        "0 .02 78 .002",
        "68 off",
    ),
    "run145_half": (96, "0 1e-2 20 1e-3 48 1e-4 78 1e-5", "66 1e-5 72 0", "0 .02", "66 off"),
    "run147": (90, "0 1e-2 23 1e-3 51 1e-4 79 1e-5", "79 0", "0 .02 79 .002", ""),
    "run148": (97, "0 1e-2 22 1e-3 44 1e-4 86 1e-5", "69 1e-5 73 0", "0 .02", "69 off"),
    "run150": (92, "0 1e-2 25 1e-3 49 1e-4 79 1e-5", "66 1e-5 72 0", "0 .02", "66 off"),
    "run146_2012": (54, "0 1e-3 22 1e-4 42 1e-5", "0 1e-4 5 1e-5 7 0", "0 .02", "38 off"),
    "run146_2009": (7, "0 1e-3", "", "0 .02", ""),
    "run146_2011": (8, "0 1e-3", "", "0 .02", ""),
    # Not a log, but Caffe's solver.prototxt in epochs.
    "caffe": (
        72,
        "0 1e-2 20 1e-3 40 1e-4 60 1e-5",
        "",
        "0 .02 20 .002 40 .0002 60 .00002",
        "",
    ),
}
# By the rules of lr.cu: schedW and schedB with their first rates, conv1 frozen, noise off.
RULED = {
    "run155": (95, ("exp", 0.02, 4000, 0), ("exp", 0.04, 4000, 0), 74, 61),
    "run156": (95, ("exp", 0.02, 2000, 0), ("exp", 0.04, 2000, 0), 72, 61),
    "run157": (95, ("exp", 0.04, 8000, 0), ("exp", 0.08, 8000, 0), 73, 62),
    "run158": (95, ("exp", 0.04, 20000, 0), ("exp", 0.08, 20000, 0), 77, 63),
    "run166": (95, ("dexp", 0.01, 1000, 4), ("dexp", 0.02, 10, 2), 73, 64),
    "run167": (95, ("dexp", 0.01, 1000, 4), ("dexp", 0.02, 10, 2), 73, 63),
    "run169": (95, ("dexp", 0.01, 500, 4), ("dexp", 0.02, 10, 2), 73, 60),
    "run170": (95, ("dexp", 0.01, 250, 4), ("dexp", 0.02, 10, 2), 74, 68),
    "run170_256": (84, ("dexp", 0.02, 250, 4), ("dexp", 0.04, 10, 2), 73, 61),
    "run171": (95, ("dexp", 0.01, 500, 5), ("dexp", 0.02, 10, 2), 72, 60),
    "run174": (86, ("jdexp", 0.01, 500, 4), ("dexp", 0.02, 10, 2), 74, 62),
    "run177": (95, ("dexp", 0.01, 250, 4), ("dexp", 0.02, 10, 2), 73, 60),
    "cuda_convnet2": (90, ("dexp", 0.02, 250, 4), ("dexp", 0.04, 25, 2), 999, 999),
}
NET = [f"{layer}.{kind}" for layer in paper.NETS["conv6"] for kind in ("weight", "bias")]


def of_run(name: str) -> tuple[Schedule, range]:
    recipe = replace(Recipe.named("code2012"), schedule=name)
    length = paper.SCHEDULES[name].length
    return Schedule(recipe, length, NET), range(length)


def last(changes: str, epoch: int) -> str | None:
    words = changes.split()
    reached = [what for at, what in zip(words[::2], words[1::2], strict=True) if int(at) <= epoch]
    return reached[-1] if reached else None


@pytest.mark.parametrize("name", LOGGED)
def test_a_run_by_hand_has_the_rates_of_its_notes(name: str) -> None:
    length, weights, conv1, biases, noise = LOGGED[name]
    schedule, epochs = of_run(name)
    assert len(epochs) == length
    for epoch in epochs:
        found, usual = schedule.rates(epoch), float(last(weights, epoch) or 0)
        first = float(last(conv1, epoch) or usual)
        assert found["conv3.weight"] == pytest.approx(usual), epoch
        assert found["conv1.weight"] == pytest.approx(first), epoch
        assert found["fc7.bias"] == pytest.approx(float(last(biases, epoch) or 0)), epoch
        assert (found["conv1.bias"] == 0) == (first == 0), epoch
        assert (schedule.colour_noise(epoch) == 0) == (last(noise, epoch) == "off"), epoch


def rule(kind: str, first: float, factor: float, steps: int, progress: float) -> float:
    """Return what ``getRate`` of lr.cu does, just after ``progress``."""
    progress += 1e-9
    if kind == "exp":
        return first ** (1 + progress * (math.log(first / factor) / math.log(first) - 1))
    rates = [first * factor ** (-step / (steps - 1)) for step in range(steps)]
    index = next(i for i in range(steps) if progress <= (i + 1) / steps)
    jumps = index > 0 and 0.2 < progress < 0.9 and progress > (index + 0.5) / steps
    if kind == "jdexp" and jumps:
        return math.sqrt(rates[index] * rates[index - 1])
    return rates[index]


@pytest.mark.parametrize("name", RULED)
def test_a_run_by_a_rule_has_the_rates_of_lr_cu(name: str) -> None:
    length, weights, biases, frozen, quiet = RULED[name]
    schedule, epochs = of_run(name)
    assert len(epochs) == length
    planned = 90 if name == "cuda_convnet2" else 95
    for epoch in epochs:
        found, progress = schedule.rates(epoch), epoch / planned
        usual = rule(*weights, progress)
        assert found["conv3.weight"] == pytest.approx(usual, rel=1e-5), epoch
        assert found["fc7.bias"] == pytest.approx(rule(*biases, progress), rel=1e-5), epoch
        assert found["conv1.weight"] == pytest.approx(usual if epoch < frozen else 0, rel=1e-5)
        assert (found["conv1.bias"] == 0) == (epoch >= frozen)
        assert (schedule.colour_noise(epoch) == 0) == (epoch >= quiet), epoch


def test_every_published_run_is_compared_with_its_log() -> None:
    runs = {name for name in paper.SCHEDULES if name.startswith(("run", "cuda", "caffe"))}
    assert runs == LOGGED.keys() | RULED.keys()


def test_layers_with_rates_of_their_own() -> None:
    schedule, _ = of_run("run145")
    slow = [schedule.rates(epoch)["conv1.bias"] for epoch in (66, 67, 71, 72)]
    assert slow == pytest.approx([0.02, 0.002, 0.002, 0])  # run 149 while conv1 was slow
    schedule, _ = of_run("run145_half")  # its file: .002 in conv1 and conv2, .02 elsewhere
    conv2 = [schedule.rates(epoch)["conv2.bias"] for epoch in (65, 66, 95)]
    assert conv2 == pytest.approx([0.02, 0.002, 0.002])
    schedule, _ = of_run("run146_2012")
    fc8 = [schedule.rates(epoch)["fc8.weight"] for epoch in (0, 8, 9, 22, 42)]
    assert fc8 == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-5])
    assert schedule.rates(0)["conv6.bias"] == pytest.approx(0.022)
    for name, end, layers in (("2009", 2, ("conv6", "fc7", "fc8")), ("2011", 6, ("fc6", "fc8"))):
        schedule, _ = of_run(f"run146_{name}")
        for layer in layers:
            found = [schedule.rates(epoch)[f"{layer}.weight"] for epoch in (0, end - 1, end)]
            assert found == pytest.approx([1e-2, 1e-2, 1e-3])
        assert schedule.rates(0)["conv6.bias"] == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("drop", "falls"), [("none", {}), ("first", {25: 0.002}), ("last", {79: 0.002})]
)
def test_the_rate_of_biases_falls_with_a_drop_of_the_weights(
    drop: str, falls: dict[int, float]
) -> None:
    schedule = changed("code2012", 91, bias_drop=drop)
    rate, found = 0.02, []
    for epoch in range(91):
        rate = falls.get(epoch, rate)
        found.append(schedule.rates(epoch)["fc7.bias"] == pytest.approx(rate))
    assert all(found)
    doubled = changed("code2012", 90, schedule="cuda_convnet2", bias_drop=drop)
    assert doubled.rates(0)["fc7.bias"] == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("recipe", "switches", "why"),
    [
        ("paper", {}, "recipe.bias_drop=first: requires recipe.rates=double_bias"),
        ("code2012", {"schedule": "constant"}, "recipe.schedule=constant has no fixed drops"),
        ("code2012", {"schedule": "run155"}, "recipe.schedule=run155 has no fixed drops"),
        (
            "code2012",
            {"schedule": "run146_2011"},
            "schedule=run146_2011 has no fixed drops",
        ),
        ("code2012", {"schedule": "run145_half"}, "or its biases do not fall together"),
    ],
)
def test_a_drop_of_biases_that_cannot_be_is_refused(
    recipe: str, switches: dict[str, str], why: str
) -> None:
    with pytest.raises(SettingsError, match=why):
        changed(recipe, 90, bias_drop="first", **switches)


def test_rates_by_layer_multiply_and_name_layers_of_the_net() -> None:
    factors = {"fc8": 10.0, "conv1": 0.0}
    recipe = replace(Recipe.named("code2012"), rates_by_layer=factors)
    found, usual = Schedule(recipe, 91).rates(30), rates("code2012", 30, 91)
    for name, rate in usual.items():
        factor = factors.get(name.partition(".")[0], 1.0)
        assert found[name] == pytest.approx(factor * rate)
    with pytest.raises(SettingsError, match=r"recipe.rates_by_layer=fc9: did you mean fc8\?"):
        Schedule(replace(recipe, rates_by_layer={"fc9": 1.0}), 91)
    read = config.read("train", ["recipe.rates_by_layer={fc8: 10, conv1: 0}"])
    assert read.recipe.rates_by_layer == factors
    with pytest.raises(SettingsError, match=r"recipe.rates_by_layer=-1.0: use 0 or more"):
        config.read("train", ["recipe.rates_by_layer={fc8: -1}"])


def changed(recipe: str, epochs: int, **switches: str) -> Schedule:
    return Schedule(replace(Recipe.named(recipe), **switches), epochs)  # type: ignore[arg-type]


def test_with_equal_rates_biases_follow_the_weights() -> None:
    found = changed("code2012", 91, rates="equal").rates(30)
    assert found["fc8.bias"] == found["fc8.weight"] == pytest.approx(1e-3)


def test_colour_noise_ends_in_the_code_and_stays_in_the_paper() -> None:
    assert changed("code2012", 91, colour_noise="added").colour_noise(90) == 0.1
    assert changed("paper", 90, colour_noise="added_and_scaled").colour_noise(89) == 0.0
    for schedule in ("constant", "cifar", "every_30"):
        found = changed("code2012", 91, schedule=schedule)
        assert [found.colour_noise(epoch) for epoch in (66, 67)] == [0.1, 0.0]


def test_a_constant_rate_stays() -> None:
    schedule = changed("code2012", 90, schedule="constant")
    found = [schedule.rates(epoch) for epoch in (0, 45, 89)]
    assert found[0] == found[1] == found[2]
    assert found[0]["conv1.weight"] == found[0]["fc8.bias"] / 2 == 0.01


def test_weight_rates_of_the_cifar_net_fall_twice_and_bias_rates_never() -> None:
    schedule = changed("code2012", 520, schedule="cifar")
    found = [schedule.rates(epoch) for epoch in (0, 499, 500, 509, 510, 519)]
    assert [one["conv1.weight"] for one in found] == pytest.approx(
        [1e-2] * 2 + [1e-3] * 2 + [1e-4] * 2
    )
    assert {one["fc8.bias"] for one in found} == {0.02}
    short = changed("code2012", 60, schedule="cifar")
    falls = [short.rates(epoch)["fc7.weight"] for epoch in (57, 58, 59)]
    assert falls == pytest.approx([1e-2, 1e-3, 1e-4])


def test_torchvisions_rates_fall_every_thirty_epochs() -> None:
    schedule = changed("paper", 90, schedule="every_30")
    found = [schedule.rates(epoch) for epoch in (0, 29, 30, 59, 60, 89)]
    assert [one["fc8.weight"] for one in found] == pytest.approx(
        [1e-2] * 2 + [1e-3] * 2 + [1e-4] * 2
    )
    assert all(one["fc8.weight"] == one["fc8.bias"] for one in found)


def test_fixed_epochs_scale_with_the_length() -> None:
    short = Schedule(Recipe.named("code2012"), 10)
    drops = [
        epoch
        for epoch in range(1, 10)
        if short.rates(epoch)["fc7.weight"] < short.rates(epoch - 1)["fc7.weight"]
    ]
    assert drops == [3, 6, 9]  # 25, 51, 79 of 91
    assert [short.colour_noise(epoch) for epoch in (7, 8)] == [0.1, 0.0]


def test_plateau_waits_five_epochs_and_drops_three_times() -> None:
    schedule = Schedule(Recipe.named("paper"), 90)
    errors = [50.0, 40.0] + [41.0] * 30
    seen = []
    for epoch, error in enumerate(errors):
        seen.append(schedule.rates(epoch)["conv1.weight"])
        schedule.plateau.observe(epoch, error)
    assert seen[:7] == [0.01] * 7
    assert seen[7:12] == pytest.approx([1e-3] * 5)
    assert seen[12:17] == pytest.approx([1e-4] * 5)
    assert seen[17:] == pytest.approx([1e-5] * len(seen[17:]))  # three drops, no more


def test_plateau_continues_from_its_state() -> None:
    schedule = Schedule(Recipe.named("paper"), 90)
    for epoch, error in enumerate([50.0] + [60.0] * 5):
        schedule.plateau.observe(epoch, error)
    again = Schedule(Recipe.named("paper"), 90)
    again.plateau = Plateau(**asdict(schedule.plateau))
    assert again.rates(6) == schedule.rates(6)
    assert again.rates(6)["fc8.bias"] == pytest.approx(1e-3)  # equal rates: biases too


def test_paper_rates_are_equal_for_all_layers() -> None:
    assert set(rates("paper", 0, 90).values()) == {0.01}
