"""Figure 1: epochs until the training error is 25 %, with ReLU and with tanh."""

from pathlib import Path
from typing import Any

import pytest

from modelpar.studies.curves import Best, curve, epochs_to, report, speed_ups
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
    train = [{"kind": "train", "step": 1, "loss": 1.0, "epoch": e, "top1": t} for e, t in rows]
    return Run.of(Path(name), settings, train)


def test_curve_has_the_mean_error_of_each_epoch() -> None:
    assert curve(run_of([80, 50, 30])) == [(0.5, 80), (1.5, 50), (2.5, 30)]


@pytest.mark.parametrize(
    ("errors", "time"),
    [
        ([80, 50, 20], 1.5 + 25 / 30),  # linear between the middles of epochs
        ([80, 25, 20], 1.5),
        ([20, 10], 0.5),
        ([80, 20, 40, 10], 0.5 + 55 / 60),  # the first time
        ([80, 50], None),
        ([], None),
    ],
)
def test_epochs_to_25_percent_are_interpolated(errors: list[float], time: float | None) -> None:
    found = epochs_to(curve(run_of(errors)))
    assert found == (None if time is None else pytest.approx(time))


def test_tanh_is_compared_with_relu_in_otherwise_equal_runs() -> None:
    runs = [
        run_of([50, 0]),  # 1.0
        run_of([50, 25], activation="relu"),  # 1.5
        run_of([90, 80, 75, 50, 0], activation="tanh"),  # 4.0
        run_of([90, 0], activation="tanh", norm="none"),  # of another net
        run_of([90, 80], net="no_crossing"),  # not there yet
        run_of([90, 80], net="no_crossing", activation="tanh"),
    ]
    assert list(speed_ups(runs)) == [("photos, 64 pixels", Best(1.25, 0.01), Best(4.0, 0.01))]
    text = report([*runs, run_of([], "old")])
    assert (
        "photos, 64 pixels: tanh needs 3.2 times as many epochs (4.00 at rate 0.01) as ReLU "
        "(1.25 at rate 0.01); figure 1 has 6 times, on CIFAR-10" in text
    )
    assert "old: not in figure 1, it has no training errors" in text
    assert "| run | tanh | 0.01 | 0 | 2 | not reached |" in text


def test_each_activation_uses_its_best_rate() -> None:
    tanh = {"activation": "tanh"}
    runs = [
        run_of([90, 80, 70, 0]),
        run_of([50, 0], lr=0.001),  # 1.0
        *(run_of(errors, **tanh) for errors in ([50, 0], [90, 80])),  # one seed never reaches it
        run_of([90, 50, 0], **tanh, lr=0.02),  # 2.0
    ]
    ((_, relu, tanh_best),) = speed_ups(runs)
    assert (relu, tanh_best) == ((1.0, 0.001), (2.0, 0.02))
    assert not list(speed_ups(runs[:-1]))
