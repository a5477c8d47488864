"""Figure 1: when the training error falls to a quarter, and how much later with tanh."""

from pathlib import Path
from typing import Any

import pytest

from modelpar.studies.curves import curve, races, reached, report
from modelpar.studies.runs import Run


def run_of(errors: list[float], name: str = "run", **model: Any) -> Run:
    """A run with two steps an epoch, whose errors have these means."""
    rows = [(epoch, error + off) for epoch, error in enumerate(errors) for off in (-1.0, 1.0)]
    rate = model.pop("lr", 0.01)
    settings = {
        "model": {"image_size": None, "activation": None, **model},
        "data": {"name": "photos", "image_size": 64, "num_classes": None, "epochs": 5},
        "recipe": {"name": "code2012", "lr": rate},
        "seed": 0,
    }
    return Run(Path(name), settings, [], [], rows)


def test_epochs_are_means_of_their_steps() -> None:
    assert curve(run_of([80, 50, 30])) == [(0.5, 80), (1.5, 50), (2.5, 30)]


@pytest.mark.parametrize(
    ("errors", "time"),
    [
        ([80, 50, 20], 1.5 + 25 / 30),  # straight between the middles of epochs
        ([80, 25, 20], 1.5),
        ([20, 10], 0.5),
        ([80, 20, 40, 10], 0.5 + 55 / 60),  # the first time
        ([80, 50], None),
        ([], None),
    ],
)
def test_a_quarter_is_reached(errors: list[float], time: float | None) -> None:
    found = reached(curve(run_of(errors)))
    assert found == (None if time is None else pytest.approx(time))


def test_tanh_is_held_against_relu_of_the_same_net() -> None:
    runs = [
        run_of([50, 0]),  # 1.0
        run_of([50, 25], activation="relu"),  # 1.5
        run_of([90, 80, 75, 50, 0], activation="tanh"),  # 4.0
        run_of([90, 0], activation="tanh", norm="none"),  # of another net
        run_of([90, 80], net="no_crossing"),  # not there yet
        run_of([90, 80], net="no_crossing", activation="tanh"),
    ]
    (race,) = races(runs)
    assert (race.relu, race.tanh) == ((1.25, 0.01), (4.0, 0.01))
    assert race.ratio == pytest.approx(3.2)
    said = report([*runs, run_of([], "old")])
    assert (
        "photos, 64 pixels: 3.2 times as many epochs with tanh (4.00, at a rate of 0.01) as with "
        "ReLU (1.25, at 0.01); figure 1 says 6, on CIFAR-10" in said
    )
    assert "old: its rows have no training error, it is not in figure 1" in said
    assert "| run | tanh | 0.01 | 0 | 2 | not yet |" in said


def test_each_activation_has_its_best_rate() -> None:
    tanh = {"activation": "tanh"}
    runs = [
        run_of([90, 80, 70, 0]),
        run_of([50, 0], lr=0.001),  # 1.0
        *(run_of(errors, **tanh) for errors in ([50, 0], [90, 80])),  # one seed never came there
        run_of([90, 50, 0], **tanh, lr=0.02),  # 2.0
    ]
    (race,) = races(runs)
    assert (race.relu, race.tanh) == ((1.0, 0.001), (2.0, 0.02))
    assert races(runs[:-1]) == []
