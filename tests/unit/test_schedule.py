"""The published rates over the epochs, and how they scale with the length."""

from dataclasses import asdict, replace

import pytest

from modelpar import Recipe
from modelpar.training.schedule import Plateau, Schedule


def rates(recipe: str, epoch: int, epochs: int) -> dict[str, float]:
    return Schedule(Recipe.named(recipe), epochs).rates(epoch)


@pytest.mark.parametrize(
    ("epoch", "weight", "conv1"),
    [
        (0, 1e-2, 1e-2),
        (24, 1e-2, 1e-2),
        (25, 1e-3, 1e-3),
        (51, 1e-4, 1e-4),
        (66, 1e-4, 1e-4),
        (67, 1e-4, 1e-5),
        (72, 1e-4, 0.0),
        (79, 1e-5, 0.0),
        (90, 1e-5, 0.0),
    ],
)
def test_run_145(epoch: int, weight: float, conv1: float) -> None:
    found = rates("code2012", epoch, 91)
    assert found["fc8.weight"] == pytest.approx(weight)
    assert found["conv1.weight"] == pytest.approx(conv1)
    assert found["fc8.bias"] == pytest.approx(0.02)  # never divided
    assert found["conv1.bias"] == pytest.approx(0.02 if epoch < 72 else 0.0)


def test_run_167_falls_further_than_run_170() -> None:
    further = changed("clean", 95, schedule="run167")
    assert further.rates(94)["fc8.weight"] == pytest.approx(1e-5)
    assert further.rates(94)["fc8.bias"] == pytest.approx(2e-3)
    assert rates("clean", 94, 95)["fc8.weight"] == pytest.approx(4e-5)
    assert [further.rates(epoch)["conv1.weight"] > 0 for epoch in (72, 73)] == [True, False]
    assert [further.colour_noise(epoch) for epoch in (62, 63)] == [0.1, 0.0]


def test_colour_noise_of_run_145_ends_at_67() -> None:
    schedule = Schedule(Recipe.named("code2012"), 91)
    assert [schedule.colour_noise(epoch) for epoch in (0, 66, 67, 90)] == [0.1, 0.1, 0.0, 0.0]


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


def test_run_170() -> None:
    found = [rates("clean", epoch, 100) for epoch in (0, 24, 25, 49, 50, 74, 75, 99)]
    assert [one["fc6.weight"] for one in found] == pytest.approx(
        [1e-2, 1e-2, 1.587e-3, 1.587e-3, 2.52e-4, 2.52e-4, 4e-5, 4e-5], rel=1e-3
    )
    assert [one["fc6.bias"] for one in found] == pytest.approx([0.02] * 4 + [0.002] * 4)


def test_run_170_late_changes() -> None:
    schedule = Schedule(Recipe.named("clean"), 95)
    assert [schedule.colour_noise(epoch) for epoch in (67, 68)] == [0.1, 0.0]
    assert schedule.rates(73)["conv1.weight"] > 0
    assert schedule.rates(74)["conv1.weight"] == schedule.rates(74)["conv1.bias"] == 0


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
