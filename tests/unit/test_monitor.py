"""What a run shows: one row per step, and the kernels of both columns as one picture."""

import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    parse_session_start_info_plugin_data,
)

from modelpar import config, progress
from modelpar.analysis.activations import Activity
from modelpar.analysis.histograms import Histogram
from modelpar.analysis.kernels import kernel_picture
from modelpar.errors import SettingsError
from modelpar.groups import MonitorSettings
from modelpar.training.metrics import Errors, evaluations, read_rows
from modelpar.training.monitor import KERNELS, Monitor
from modelpar.training.prepare import prepare
from modelpar.training.showing import Embedding, Seen

RATES = {"conv1.weight": 0.01, "fc8.weight": 0.01, "fc8.bias": 0.02}


def row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "epoch": 0,
        "loss": 1.0 / step,
        "top1": 50.0,
        "lr": 0.01,
        "images_per_s": 1.0,
        "data_wait_s": 0.0,
        "crossing_s": 0.0,
        "exchange_bytes_per_image": 0.0,
    }


def opened(run_dir: Path, start: int, end: int, *, repeats: bool = False) -> Monitor:
    return Monitor(run_dir, start, end, MonitorSettings(progress=False), repeats=repeats)


def watched(run_dir: Path, start: int, end: int, *, repeats: bool = False) -> None:
    monitor = opened(run_dir, start, end, repeats=repeats)
    for step in range(start + 1, end + 1):
        monitor.train(row(step), RATES)
    monitor.test(end, 1, Errors(top1=50.0, top5=10.0, loss=1.5, samples=20, standard_error=1.0))
    monitor.kernels(torch.randn(96, 3, 11, 11), end)
    monitor.close()


def test_each_step_is_recorded_once_after_a_crash(tmp_path: Path) -> None:
    watched(tmp_path, 0, 5)
    watched(tmp_path, 3, 6)  # resumed from its checkpoint of step 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in rows if one["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [one["step"] for one in rows if one["kind"] == "test"] == [6]
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("test/top1")] == [6]
    assert board.Images("weights_conv1/kernels")[-1].step == 6
    rates = board.Scalars("train_rate/fc8.bias")
    assert round(rates[-1].value, 6) == 0.02
    assert [event.value for event in board.Scalars("train/top1")] == [50.0] * 6


def test_repeated_evaluation_replaces_the_earlier_row(tmp_path: Path) -> None:
    watched(tmp_path, 0, 3)
    (tmp_path / "metrics.jsonl").open("a").write('{"kind": "train", "st')  # killed while writing
    watched(tmp_path, 3, 5)  # not repeated: kept
    assert list(evaluations(tmp_path)) == [3, 5]
    opened(tmp_path, 5, 9, repeats=True).close()
    rows = read_rows(tmp_path)
    assert [one["step"] for one in rows if one["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert {step: row["top1"] for step, row in evaluations(tmp_path).items()} == {3: 50.0}


def test_a_full_disk_while_drawing_ends_the_run_without_a_line_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monitor = opened(tmp_path, 0, 2)
    with pytest.raises(OSError, match="No space left"), monitor.drawing():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monitor.close()
    assert not capfd.readouterr().err


def test_training_continues_when_nothing_can_be_drawn(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / KERNELS).mkdir()  # so the picture cannot be written
    monitor = opened(tmp_path, 0, 2)
    with monitor.drawing():
        monitor.kernels(torch.randn(96, 3, 11, 11), 1)
    assert f"modelpar: {tmp_path}: TensorBoard is no longer written (" in capfd.readouterr().err
    for step in (1, 2):
        monitor.train(row(step), RATES)
    monitor.flush()
    monitor.close()
    assert len(read_rows(tmp_path)) == 2


def test_wandb_copies_the_events_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module is a fake, so nothing is sent."""
    (tmp_path / "config.yaml").write_text("seed: 3\nkey: ${oc.env:SECRET}\n")
    calls: list[Any] = []

    def init(**how: Any) -> None:
        assert len(list(tmp_path.glob("events.*"))) == len(calls)  # before TensorBoard starts
        calls.append(how)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = MonitorSettings(progress=False, wandb=True)
    for start in (0, 2):
        Monitor(tmp_path, start, 4, settings, repeats=False).close()
    first, second = calls
    assert first == second
    assert (first["sync_tensorboard"], first["resume"]) == (True, "allow")
    assert first["config"] == {"seed": 3, "key": "${oc.env:SECRET}"}


def test_run_goes_on_where_wandb_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_how: Any) -> Any:
        raise RuntimeError("api_key not configured (no-tty)\ncall wandb login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    (tmp_path / "config.yaml").touch()
    settings = MonitorSettings(progress=False, wandb=True)
    monitor = Monitor(tmp_path, 0, 1, settings, repeats=False)
    monitor.train(row(1), RATES)
    monitor.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"modelpar: {tmp_path}: not sent to Weights & Biases (api_key not")
    assert len(list(tmp_path.glob("events.*"))) == 1


def test_missing_wandb_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match=r"^monitor.wandb=true: needs wandb; pip install"):
        prepare(config.read("train", ["monitor.wandb=true"]))
    with pytest.raises(SettingsError, match=r"use monitor.tensorboard=true"):
        config.read("train", ["monitor.wandb=true", "monitor.tensorboard=false"])


def test_kernels_of_one_column_have_no_gap() -> None:
    kernels = torch.randn(64, 3, 5, 5)
    assert kernel_picture(kernels, 1).shape == (3, 4 * (4 * 6 + 1), 4 * (16 * 6 + 1))
    both = kernel_picture(kernels, 2)
    assert both.shape == (3, 4 * (2 * (2 * 6 + 1) + 3), 4 * (16 * 6 + 1))


def test_scalars_of_figure_3_and_of_the_layers(tmp_path: Path) -> None:
    monitor = opened(tmp_path, 0, 5)
    grey = torch.ones(48, 3, 11, 11)
    red_less_green = torch.tensor([1.0, -1.0, 0.0])[None, :, None, None] * grey
    monitor.kernels(torch.cat([grey, red_less_green]), 5)
    monitor.activations(
        [
            Activity("conv1", 0, mean=1.0, std=2.0, zeros=0.5, dead=0.25),
            Activity("conv1", 1, mean=3.0, std=4.0, zeros=0.0, dead=0.0),
            Activity("logits", None, mean=0.0, std=6.0, zeros=0.0, dead=0.0),
        ],
        5,
    )
    monitor.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    values = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}
    assert values == pytest.approx(
        {
            "weights_conv1/column0_off_grey": 0.0,
            "weights_conv1/column0_frequency": 0.0,
            "weights_conv1/column0_colour_kernels": 0,
            "weights_conv1/column1_off_grey": 1.0,
            "weights_conv1/column1_frequency": 0.0,
            "weights_conv1/column1_colour_kernels": 48,
            "weights_conv1/difference_off_grey": -1.0,
            "units_mean/conv1/column0": 1.0,
            "units_std/conv1/column0": 2.0,
            "units_zeros/conv1/column0": 0.5,
            "units_dead/conv1/column0": 0.25,
            "units_mean/conv1/column1": 3.0,
            "units_std/conv1/column1": 4.0,
            "units_zeros/conv1/column1": 0.0,
            "units_dead/conv1/column1": 0.0,
            "units_mean/logits": 0.0,
            "units_std/logits": 6.0,
        },
        abs=1e-6,
    )


def test_one_column_has_no_scalars_of_a_second_one(tmp_path: Path) -> None:
    assert kernel_picture(torch.randn(64, 3, 11, 11), 1).shape == (3, 4 * 49, 4 * 193)
    monitor = opened(tmp_path, 0, 5)
    monitor.kernels(torch.randn(64, 3, 11, 11), 5, columns=1)
    monitor.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert not [tag for tag in board.Tags()["scalars"] if "column1" in tag or "difference" in tag]


def test_kernels_of_both_columns_are_one_picture(tmp_path: Path) -> None:
    kernels = torch.zeros(96, 3, 11, 11)
    kernels[48:, 0] = 1.0  # column 1: red
    picture = kernel_picture(kernels)
    height = picture.shape[1]
    above, below = picture[:, : height // 2 - 6], picture[:, height // 2 + 7 :]
    assert torch.equal(above[0], above[2])  # column 0: grey
    assert float((below[0] - below[2]).max()) == 0.5
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
    watched(tmp_path, 0, 1)
    with Image.open(tmp_path / "conv1.png") as saved:
        assert saved.size[0] == picture.shape[2]


def test_settings_versions_and_hyperparameters(tmp_path: Path) -> None:
    monitor = opened(tmp_path, 0, 5)
    monitor.describe({"seed": 3, "run_dir": "runs/a", "recipe": {"lr": 0.5, "bias_drop": None}})
    monitor.finish()
    monitor.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    texts = {
        tag: board.Tensors(tag)[0].tensor_proto.string_val[0] for tag in board.Tags()["tensors"]
    }
    assert b"    recipe:\n      lr: 0.5\n" in texts["run/settings/text_summary"]
    assert f"torch: {torch.__version__}".encode() in texts["run/versions/text_summary"]
    content = board.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    given = dict(parse_session_start_info_plugin_data(content).hparams)
    assert set(given) == {"seed", "recipe.lr", "recipe.bias_drop"}
    assert given["recipe.lr"].number_value == 0.5
    assert given["recipe.bias_drop"].string_value == "null"  # a run without it has another value
    assert board.SummaryMetadata(SESSION_END_INFO_TAG)


def test_what_an_evaluation_has_seen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    units = torch.randn(6, 10, dtype=torch.float64)
    images = torch.randint(0, 256, (6, 3, 80, 80), dtype=torch.uint8)
    seen = Seen(
        [],
        [Histogram("units_histogram/conv1", 1, -1.0, 3.0, 2.0, 4.0, [1.0, 0.0, 2.0, 3.0])],
        torch.eye(2, dtype=torch.int64),
        Embedding(images, [0, 1, 0, 1, 0, 1], units @ units.T),
    )
    monitor = opened(tmp_path, 0, 5)
    monitor.seen(seen, ["brick", "moon"], 5)
    assert monitor.board
    monitor.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    (event,) = board.Histograms("units_histogram/conv1/column1")
    assert event.histogram_value.num == 6
    assert event.histogram_value.bucket_limit[-1] == 3.0
    assert board.Images("test/confusion_matrix")[0].step == 5
    place = tmp_path / "00005" / "fc7"
    assert (place / "metadata.tsv").read_text().split() == ["brick", "moon"] * 3
    points = [line.split() for line in (place / "tensors.tsv").read_text().splitlines()]
    assert [len(point) for point in points] == [5] * 6
    assert "00005/fc7/sprite.png" in (tmp_path / "projector_config.pbtxt").read_text()

    monitor = opened(tmp_path, 5, 9)
    (tmp_path / "00009").touch()  # so the images cannot be written
    monitor.seen(seen, ["brick", "moon"], 9)
    assert "TensorBoard is no longer written (" in capfd.readouterr().err
    monitor.close()


def test_bar_in_a_log_file_is_a_line_for_each_state(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_FILE_INTERVAL", 0)
    for _ in progress.progress_bar(iterable=range(2), desc="images"):
        pass
    printed = capfd.readouterr().err
    assert "\r" not in printed
    assert [line.partition("|")[0] for line in printed.splitlines()] == [
        "images:   0%",
        "images:  50%",
        "images: 100%",
        "images: 100%",
    ]
    for _ in progress.progress_bar(iterable=range(2), shown=False):
        pass
    assert not capfd.readouterr().err
