"""Runs held against each other, from metrics as they lie on a disk."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from modelpar import compare, config
from modelpar.errors import DataError, SettingsError
from modelpar.studies import gather, page, table
from modelpar.training import runs

if TYPE_CHECKING:
    from pathlib import Path


def stored(folder: Path, top1: float, *words: str, steps: int = 4) -> Path:
    """Write a run as a training leaves it; its test error falls to ``top1``."""
    runs.write(folder, asdict(config.read("train", list(words))))
    rows = []
    for step in range(1, steps + 1):
        rows.append({"kind": "train", "step": step, "loss": 3 - step / steps})
        if step % 2 == 0:
            error = top1 + (steps - step)
            rows.append(
                {"kind": "test", "step": step, "loss": 1.0, "top1": error, "top5": error / 2}
            )
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
    sets = table.group([gather.read(run) for run in gather.find(patterns)])
    (folder / "out.csv").write_text(table.as_csv(sets))
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
    text = table.markdown(table.group([gather.read(run) for run in gather.find(["*"])]))
    assert table.APART in text
    one = table.markdown(table.group([gather.read(run) for run in gather.find(["a"])]))
    assert table.APART not in one
    assert table.BESIDE in one


def test_a_control_of_its_own_images_gives_the_published_difference(place: Path) -> None:
    stored(place / "d", 9.0, "experiment=one_column")
    (row,) = cells(place, "d")
    assert row["published difference, top-1"] == "+1.70"  # 39.168 - 37.473, both of 2010


def test_an_experiment_run_another_way_is_another_row(place: Path) -> None:
    stored(place / "d", 9.0, "experiment=no_lrn", "recipe.lr=0.001")
    found = cells(place, "b", "d")
    assert [row["seeds"] for row in found] == ["2", "1"]
    assert found[1]["experiment"] == "no_lrn (d)"


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
        gather.find([pattern])
    assert gather.find(["a"]) == [gather.Path("a/0"), gather.Path("a/1")]
    del place


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_damaged_run_is_named(place: Path, name: str) -> None:
    (place / "a/0" / name).write_text("{ no")
    with pytest.raises(DataError, match="a/0: not a run that can be read"):
        gather.read(place / "a/0")
