"""modelpar.figures on a run of two steps."""

import csv
import io
import json
import os
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from modelpar import command, config, figures
from modelpar.distributed import Mesh
from modelpar.studies import plots, snapshots
from modelpar.training import prepare, runner

SMALL = [
    "data=imagefolder",
    "data.root=images",
    "model.image_size=64",
    "workers=0",
    "batch_size=8",
    "columns=1",
    "monitor.progress=false",
    "monitor.tensorboard=false",
    "compile=false",
]
PICTURES = ("figure1.png", "figure3.png", "figure4.png", "activations.png")


@pytest.fixture(scope="module")
def place(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; the first query of figure 4 is among the images it learns from."""
    place = tmp_path_factory.mktemp("figures")
    shutil.copytree(images, place / "images")
    shutil.copy(place / "images/val/dark/1.png", place / "images/train/dark/copy.png")
    before = Path.cwd()
    os.chdir(place)
    try:
        settings = config.read("train", [*SMALL, "steps=2"])
        runner.train(settings, prepare.prepare(settings), Mesh(torch.device("cpu")), Path("run"))
    finally:
        os.chdir(before)
    return place


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def run_figures(*words: str) -> Any:
    """Run the command in this process; return its exit status."""
    sys.argv = ["modelpar-figures", *words]
    with pytest.raises(SystemExit) as end:
        figures.main()
    return end.value.code


def test_names_of_classes_are_no_formulas_and_their_missing_glyphs_no_warnings() -> None:
    words = ["checkpoint=run", "workers=0", "device=cpu", "training_images=4"]
    snapshot = snapshots.of_checkpoint(config.read("figures", words))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", command.NOTES, UserWarning)  # as every command does
        figure = plots.figure4(replace(snapshot, classes=["$ \u732b", "$$ \udcff"]))
        figure.savefig(io.BytesIO())
    assert "$$ \\udcff" in {text.get_text() for text in figure.findobj(Text)}


def table(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def test_checkpoint_and_run_give_all_figures_and_tables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_figures("checkpoint=run", "runs=[run]", "workers=0", "out=all") == 0
    for name in PICTURES:
        with Image.open(Path("all") / name) as picture:
            assert min(picture.size) > 400
    kernels = table("all/specialisation.csv")
    assert [(row["run"], row["step"], row["column"], row["kernels"]) for row in kernels] == [
        ("run", "2", "0", "48"),
        ("run", "2", "1", "48"),
    ]  # only once, although it is requested twice
    assert float(kernels[0]["colour_share"]) == pytest.approx(
        2 / 3, abs=0.02
    )  # as random kernels have
    layers = table("all/activations.csv")
    assert len(layers) == 7 * 2 + 1
    assert layers[0].keys() == {"layer", "column", "mean", "std", "zeros", "dead"}
    assert layers[-1]["layer"] == "logits"
    out = capsys.readouterr().out
    assert "| run | 0 | 2 | 0 | 48 | 0.6" in out
    assert "| run | relu | 0.01 | 0 | 1 | " in out
    assert "all: figure1.png, figure3.png, figure4.png, activations.png" in out


def test_training_image_equal_to_a_test_image_is_its_nearest_at_distance_0() -> None:
    words = ["checkpoint=run", "workers=0", "training_images=41"]
    seen = snapshots.of_checkpoint(config.read("figures", words))
    assert seen.figure4.searched == 41
    assert len(seen.figure4.predictions) == 8
    one, *others = seen.figure4.neighbours
    assert torch.equal(one.nearest[0][0], one.query)
    distances = [distance for *_, distance in one.nearest]
    assert distances[0] == pytest.approx(0, abs=1e-3 * distances[1])
    assert distances == sorted(distances)
    for other in others:
        assert len(other.nearest) == 6
        assert other.nearest[0][2] > 0


def test_runs_without_checkpoint_setting_need_no_images(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree("run", "sweep/0", dirs_exist_ok=True)
    shutil.copytree("run", "sweep/1", dirs_exist_ok=True)
    metrics = Path("sweep/1/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    older = [
        {key: row[key] for key in row if key != "top1" or row["kind"] == "test"} for row in rows
    ]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in older))
    shutil.rmtree("sweep/1/checkpoints")
    assert run_figures("runs=[sweep]", "out=runs") == 0
    assert {path.name for path in Path("runs").iterdir()} == {
        "figure1.png",
        "figure3.png",
        "specialisation.csv",
    }
    out = capsys.readouterr().out
    assert "sweep/1: not in figure 1, it has no training errors" in out
    assert "sweep/1: not in figure 3, it has no checkpoint yet" in out
    assert run_figures("runs=[sweep/1]", "out=none") == 3
    assert "none has a checkpoint or a training error yet" in capsys.readouterr().err
    assert not Path("none").exists()


BAD = [
    ([], 2, "checkpoint: missing; add checkpoint=RUN_DIR or runs=[RUN,RUN]"),
    (["runs=[nowhere]"], 2, "runs=nowhere: no run there"),
    (["checkpoint=nowhere"], 4, "/nowhere: no checkpoint there"),
    (["checkpoint=run", "training_images=0"], 2, "training_images=0: use 1 or more"),
    (["checkpoint=run", "device=gpu"], 2, "device=gpu: did you mean cpu?"),
    (["checkpoint=run", "out=images/val/dark/1.png/x"], 2, "is a file; use a folder"),
    (["checkpoint=run", "data.root=nowhere"], 3, "/nowhere: no such folder"),
    (["checkpiont=run"], 2, "did you mean checkpoint?"),
]


@pytest.mark.parametrize(("words", "status", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_setting_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], words: list[str], status: int, message: str
) -> None:
    before = sorted(Path().rglob("*"))
    assert run_figures(*words) == status
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert message in line
    assert not printed.out
    assert sorted(Path().rglob("*")) == before
