"""Figure 1: epochs until the training error is 25 %, with ReLU and with tanh."""

from pathlib import Path
from typing import Any

import pytest

from modelpar.studies import plots, runs, snapshots
from modelpar.studies.runs import Run


def run_of(errors: list[float], name: str = "run", **model: Any) -> Run:
    """A run with two steps an epoch, whose errors have these means."""
    rows = [(epoch, error + off) for epoch, error in enumerate(errors) for off in (-1.0, 1.0)]
    settings = {
        "model": {"image_size": None, "activation": None, **model},
        "data": {"name": "photos", "image_size": 64, "num_classes": None, "epochs": 5},
        "recipe": {"name": "code2012", "lr": 0.01},
        "seed": 0,
    }
    train = [{"kind": "train", "step": 1, "loss": 1.0, "epoch": e, "top1": t} for e, t in rows]
    return runs.run_of(Path(name), settings, train)


def test_curve_has_the_mean_error_of_each_epoch() -> None:
    assert run_of([80, 50, 30]).curve() == [(0.5, 80), (1.5, 50), (2.5, 30)]


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
    found = run_of(errors).epochs_to_goal()
    assert found == (None if time is None else pytest.approx(time))


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu"])
def test_figure_1_shows_one_epoch_as_a_point_and_the_goal_as_a_ring(activation: str) -> None:
    one, other = run_of([80], activation=activation), run_of([80, 20], activation=activation)
    _, point, curve, ring = plots.figure1([one, other]).axes[0].lines
    assert [line.get_marker() for line in (point, curve, ring)] == [".", "None", "o"]
    assert point.get_linestyle() == curve.get_linestyle() == plots.LINES[activation]


def test_table_has_a_row_for_each_run_with_training_errors() -> None:
    text = snapshots.report(
        [], [run_of([50, 25]), run_of([90, 80], activation="tanh"), run_of([], "old")]
    )
    assert "| run | relu | 0.01 | 0 | 2 | 1.50 |" in text
    assert "| run | tanh | 0.01 | 0 | 2 | not reached |" in text
    assert "old: not in figure 1, it has no training errors" in text
    assert "six times" in text
    assert "six times" not in snapshots.report([], [run_of([], "old")])
