"""Runs held against each other, from metrics as they lie on a disk."""

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from modelpar import compare, config
from modelpar.errors import DataError, SettingsError
from modelpar.studies import comparison, page, runs
from modelpar.training import run_dir


def stored(folder: Path, top1: float, *words: str, steps: int = 4) -> Path:
    """Write a run as a training leaves it; its test error falls to ``top1``."""
    settings = config.read("train", [f"steps={steps}", *words])
    run_dir.write(folder, asdict(settings))
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append({"kind": "train", "step": step, "epoch": 0, "loss": 3 - step / steps})
        if step % 2 == 0:
            error = top1 + (steps - step)
            views = settings.views if step == settings.steps else 1
            errors = {"top1": error, "top5": error / 2, "views": views}
            rows.append({"kind": "test", "step": step, "loss": 1.0, **errors})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two experiments with two seeds each on photos, one on other images."""
    monkeypatch.chdir(tmp_path)
    for seed, with_norm, without in ((0, 10.0, 13.0), (1, 12.0, 14.0)):
        stored(tmp_path / f"a/{seed}", with_norm, "experiment=two_columns", f"seed={seed}")
        stored(tmp_path / f"b/{seed}", without, "experiment=no_lrn", f"seed={seed}")
    stored(tmp_path / "c", 50.0, "experiment=no_lrn", "data=synthetic")
    return tmp_path


def cells(folder: Path, *patterns: str) -> list[dict[str, str]]:
    sets = comparison.group([runs.read(run) for run in runs.find(patterns)])
    (folder / "out.csv").write_text(comparison.as_csv(sets))
    with (folder / "out.csv").open() as file:
        return list(csv.DictReader(file))


def test_errors_have_a_spread_over_seeds_and_a_difference_for_each(place: Path) -> None:
    control, ours = cells(place, "a", "b")
    assert control["seeds"] == ours["seeds"] == "2"
    assert control["top-1 error, %"] == "11.00 ± 1.41"
    assert ours["top-1 error, %"] == "13.50 ± 0.71"
    assert ours["against"] == "two_columns"
    assert ours["difference, top-1"] == "+2.50 ± 0.71"  # 3 and 2: by seed
    assert ours["published difference, top-1"] == "+1.37"  # 42.034 - 40.664
    assert ours["published"] == "42.034 / 19.362 on ILSVRC-2012 validation, 10 views (run 148)"
    assert not control["against"]
    assert control["views"] == "10"


def test_data_sets_stand_apart(place: Path) -> None:
    found = cells(place, "*", "b/0")
    assert [row["data"] for row in found] == ["photos, 64 pixels"] * 2 + ["synthetic, 224 pixels"]
    assert not found[-1]["difference, top-1"]  # its control was run on other images
    text = comparison.markdown(comparison.group([runs.read(run) for run in runs.find(["*"])]))
    assert comparison.APART in text
    one = comparison.markdown(comparison.group([runs.read(run) for run in runs.find(["a"])]))
    assert comparison.APART not in one
    assert comparison.BESIDE in one


def test_a_control_of_its_own_images_gives_the_published_difference(place: Path) -> None:
    stored(place / "d", 9.0, "experiment=one_column")
    (row,) = cells(place, "d")
    assert row["published difference, top-1"] == "+1.70"  # 39.168 - 37.473, both of 2010


def test_an_experiment_run_another_way_is_another_row(place: Path) -> None:
    stored(place / "d", 9.0, "experiment=no_lrn", "recipe.lr=0.001")
    stored(place / "e", 9.0, "experiment=no_lrn", "model.norm=batch")
    stored(place / "f", 9.0, "experiment=no_lrn", "recipe=paper")
    stored(place / "g", 9.0, "experiment=no_lrn", "precision=bfloat16")
    found = cells(place, "a", "b", "d", "e", "f", "g")
    assert [row["seeds"] for row in found] == ["2", "2", "1", "1", "1", "1"]
    assert [row["experiment"] for row in found[2:]] == [
        "no_lrn recipe.lr=0.001",
        "no_lrn model.norm=batch",
        "no_lrn recipe=paper",
        "no_lrn (g)",
    ]
    # What was published is of the experiment as it stands, and a control is like its run.
    assert [bool(row["published"]) for row in found[1:]] == [True, False, False, False, True]
    assert [bool(row["difference, top-1"]) for row in found[1:]] == [True] + 4 * [False]


def test_a_control_is_trained_as_its_run_was(place: Path) -> None:
    words = ("epochs=36", "precision=bfloat16", "batch_size=32")
    stored(place / "d", 20.0, "experiment=two_columns", *words)
    stored(place / "e", 10.0, "experiment=no_lrn", *words)
    *_, ours = cells(place, "a", "d", "e")
    assert ours["difference, top-1"] == "-10.00"


def test_one_view_is_held_against_ten(place: Path) -> None:
    stored(place / "d", 13.0, "experiment=one_view")
    stored(place / "e", 13.0, "experiment=no_lrn", "views=1")
    _, one_view, other = cells(place, "a", "d", "e")
    assert one_view["difference, top-1"] == "+3.00"
    assert one_view["published difference, top-1"] == "+1.50"
    assert not other["difference, top-1"]


def test_folders_of_images_are_as_many_data_sets(place: Path) -> None:
    for name, error in (("d", 10.0), ("e", 50.0)):
        (place / f"images_{name}/train/cat").mkdir(parents=True)
        stored(place / name, error, "data=imagefolder", f"data.root=images_{name}")
    found = cells(place, "d", "e")
    assert [row["data"] for row in found] == [
        f"imagefolder images_{name}, 224 pixels" for name in "de"
    ]
    stored(place / "f", 50.0, "model.num_classes=20")
    (row,) = cells(place, "f")
    assert row["data"] == "photos, 20 classes, 64 pixels"


def test_what_has_not_ended_is_in_no_mean(place: Path) -> None:
    stored(place / "d", 90.0, "experiment=two_columns", "seed=2")
    begun = (place / "d/metrics.jsonl").read_text().splitlines(keepends=True)
    (place / "d/metrics.jsonl").write_text("".join(begun[:3]))  # two steps and their test
    stored(place / "e", 80.0, "experiment=two_columns", "seed=1")
    rows = [json.loads(line) for line in (place / "a/1/metrics.jsonl").read_text().splitlines()]
    rows[-1]["views"] = 1  # of ten that were asked for
    (row,) = cells(place, "a", "d", "e")
    assert (row["seeds"], row["top-1 error, %"]) == ("2", "11.00 ± 1.41")
    sets = comparison.group([runs.read(run) for run in runs.find(["a", "d", "e"])])
    assert comparison.left_out(sets) == [
        "e: seed 1 once more, it is left out",
        "d: has not come to its end, it is left out",
    ]
    (place / "a/1/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = cells(place, "a")
    assert (row["seeds"], row["top-1 error, %"]) == ("1", "10.00")


def test_a_run_without_an_experiment_is_named_by_its_switches(place: Path) -> None:
    stored(place / "d", 9.0, "model.norm=none", "recipe=paper")
    (row,) = cells(place, "d")
    assert row["experiment"] == "paper norm=none"


def test_the_command_writes_table_and_page(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["modelpar-compare", "runs=[a,b,c]"])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == 0
    assert "| no_lrn | 2 | 4 | 10 | 13.50 ± 0.71 |" in capsys.readouterr().out
    html = (place / "compare" / "compare.html").read_text()
    assert html.count("<svg") == html.count("<table") == 2
    for outside in ("<script", "<link", "<img", 'src="', 'href="http'):  # it needs nothing else
        assert outside not in html


def test_curves_are_means_over_seeds() -> None:
    steps, losses = page.smoothed([[(1, 2.0), (2, 4.0)], [(1, 4.0), (2, 6.0), (3, 9.0)]])
    assert (steps, losses) == ([1, 2], [3.0, 5.0])


@pytest.mark.parametrize("pattern", ["nowhere", "x*", "a/0/metrics.jsonl"])
def test_a_pattern_without_runs_is_refused(place: Path, pattern: str) -> None:
    with pytest.raises(SettingsError, match="no run there"):
        runs.find([pattern])
    assert runs.find(["a"]) == [runs.Path("a/0"), runs.Path("a/1")]
    del place


def test_a_cut_last_line_is_no_damage(place: Path) -> None:
    whole = (place / "a/0/metrics.jsonl").read_text()
    (place / "a/0/metrics.jsonl").write_text(whole + '{"kind": "train", "st')
    assert runs.read(place / "a/0").tests[-1] == (4, 10.0, 5.0)
    (place / "a/1/metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": null}\n')
    with pytest.raises(DataError, match="a/1: not a run that can be read"):
        runs.read(place / "a/1")


def test_a_run_counts_once_by_whatever_name(place: Path) -> None:
    assert len(runs.find(["a", "a/0", str(place / "a"), "./a"])) == 2


def test_a_folder_that_cannot_be_made_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["modelpar-compare", "runs=[a]", "out=/proc/x"])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "modelpar: /proc/x: No such file or directory\n"
    del place


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_damaged_run_is_named(place: Path, name: str) -> None:
    (place / "a/0" / name).write_text("{ no\n")
    with pytest.raises(DataError, match="a/0: not a run that can be read"):
        runs.read(place / "a/0")
