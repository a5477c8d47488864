"""What a training prints at its start and at its end, on terminals and in files."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.net.plan import Plan, Recipe
from modelpar.settings import TrainSettings
from modelpar.training import report
from modelpar.training.monitor import Monitor, MonitorSettings
from modelpar.training.prepare import Prepared

SETTINGS: TrainSettings = config.read("train", ["experiment=no_lrn", "batch_size=64"])


def prepared(**fields: Any) -> Prepared:
    found = {
        "plan": Plan(Recipe.named("code2012"), 14, 64),
        "data": SETTINGS.data,
        "images": SimpleNamespace(train=range(2352), test=range(1008)),
        "steps": 306,
        "epoch_steps": 17,
        "start": None,
    }
    return cast("Prepared", SimpleNamespace(**found | fields))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has its lowest error before its end, in a folder that needs quotes."""
    run_dir = tmp_path / "it's a run=1"
    for step in (204, 306):
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    rows = [
        {"kind": "test", "step": step, "top1": top1, "top5": 2.5, "views": 1}
        for step, top1 in ((102, 10.0), (204, 12.5), (306, 14.0))  # 102 is not saved any more
    ]
    rows[-1] |= {"standard_error": 1.25, "views": 10}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def test_the_start_names_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    mesh = Mesh(torch.device("cpu"), columns=2)
    report.started(SETTINGS, prepared(), mesh, Path("/runs/first"), own=10_000_014)
    start = SimpleNamespace(step=17, folder=Path("/runs/first/checkpoints/step-00000017"))
    report.started(SETTINGS, prepared(start=start), mesh, Path("/runs/first"), own=10_000_014)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "net       experiment no_lrn, two_columns, recipe code2012, 20,000,014 parameters",
        "data      photos, 2,352 training and 1,008 test images, 14 classes, crops of 64 pixels",
        "length    306 steps of 64 images, 18 epochs",
        "run_dir   /runs/first",
        "start     new run",
    ]
    assert lines[-1] == f"start     continues from step 17 ({start.folder})"


def test_the_end_has_errors_and_commands(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = SimpleNamespace(step=100)
    report.ended(SETTINGS, prepared(start=start), run_dir, seconds=3725.4)
    *rows, evaluate, predict, export, board = capsys.readouterr().out.splitlines()
    spread = "(standard error 1.25 %)"
    assert rows == [
        "finished  step 306 of 306; 206 steps in 1:02:05",
        f"error     14.00 % of 1,008 test images, 10 views {spread}; guessing: 92.86 %",
        "top-5     2.50 %",
        "best      12.50 % at step 204",
    ]
    for command, main in ((evaluate, "evaluate"), (export, "export")):
        name, *words = shlex.split(command)
        assert name == f"modelpar-{main}"
        assert config.read(main, words).checkpoint == str(run_dir)
    assert shlex.split(predict)[-1] == "images=[FILE]"
    assert shlex.split(board) == ["tensorboard", "--logdir", str(run_dir)]
    assert "columns=1" in report.commands(Path("/runs/first"), columns=1)[0]
    assert report.commands(Path("/r"), 2)[0] == "modelpar-evaluate checkpoint=/r views=10"


@pytest.mark.parametrize("width", [40, 200])
def test_rows_are_wrapped_on_a_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: SimpleNamespace(columns=width))
    report.started(SETTINGS, prepared(), Mesh(torch.device("cpu")), Path("/runs/first"), own=7)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (10 if width == 40 else 5)
    assert all(len(line) <= width for line in lines)
    assert all(line.startswith(" " * 10) for line in lines if line[0] == " ")


def test_in_a_file_each_state_of_the_bar_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = Monitor(tmp_path, 0, 3, MonitorSettings(tensorboard=False), repeats=False)
    monitor.bar.update(3)
    monitor.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("%")[0] for line in lines] == ["0", "100"]
    assert "\r" not in "".join(lines)
