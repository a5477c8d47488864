"""modelpar.compare: tables and page from run directories that a test has written."""

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from modelpar import compare, config
from modelpar.distributed import Mesh
from modelpar.errors import DataError, SettingsError
from modelpar.studies import averages, comparison, plots, runs
from modelpar.studies.html import breakable
from modelpar.training import run_dir
from modelpar.training.schedule import run_length


def stored(folder: Path, top1: float, *words: str, steps: int = 4) -> Path:
    """Write a run directory as a training does; its test error falls to ``top1``."""
    settings = config.read("train", [f"steps={steps}", *words])
    folder.mkdir(parents=True, exist_ok=True)
    run_dir.write_config(folder, settings, Mesh(torch.device("cpu")))
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
    """A folder with two experiments of two seeds on photos, and one run on other images."""
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


def test_row_has_mean_and_deviation_over_seeds_and_difference_by_seed(place: Path) -> None:
    control, ours = cells(place, "a", "b")
    assert control["seeds"] == ours["seeds"] == "2"
    assert control["top-1 error, %"] == "11.00 ± 1.41"
    assert ours["top-1 error, %"] == "13.50 ± 0.71"
    assert ours["control"] == "two_columns"
    assert ours["difference to control, top-1"] == "+2.50"  # 3 and 2: by seed
    assert ours["95 % interval"] == "-3.85 to +8.85, includes zero"  # 2.5 ± 12.706 / 2
    assert not control["95 % interval"]
    assert ours["published difference, top-1"] == "+1.37"  # 42.034 - 40.664
    assert ours["published"] == "42.034 / 19.362 on ILSVRC-2012 validation, 10 views (run 148)"
    assert not control["control"]
    assert control["views"] == "10"


# The quantiles t(0.975) of 1, 2, 4 and 9 degrees of freedom are those of the NIST/SEMATECH
# e-Handbook of Statistical Methods, section 1.3.6.7.2.
@pytest.mark.parametrize(
    ("values", "half"),
    [
        ([1.0, 3.0], 12.706 * 2**0.5 / 2**0.5),
        ([1.0, 2.0, 3.0], 4.303 * 1 / 3**0.5),
        ([-2.0, -1.0, 0.0, 1.0, 2.0], 2.776 * 2.5**0.5 / 5**0.5),
        ([0.0, 1.0] * 5, 2.262 * (2.5 / 9) ** 0.5 / 10**0.5),
    ],
)
def test_interval_is_that_of_students_t(values: list[float], half: float) -> None:
    low, high = comparison.interval(values)
    mean = sum(values) / len(values)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-3)


def test_only_an_interval_with_zero_in_it_is_marked_in_all_outputs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, error in enumerate((13.0, 15.1)):  # 3 and 3.1 more than the control
        stored(place / f"d/{seed}", error, "experiment=no_overlap", f"seed={seed}")
    stored(place / "e", 7.0, "experiment=tanh", "seed=1")
    monkeypatch.setattr(sys, "argv", ["modelpar-compare", "runs=[a,b,d,e]"])
    with pytest.raises(SystemExit):
        compare.main()
    files = [(place / "compare" / name).read_text() for name in ("compare.csv", "compare.html")]
    for text in (capsys.readouterr().out, *files):
        assert text.count("includes zero") == 1
        for cell in ("-3.85 to +8.85, includes zero", "+2.41 to +3.69", "none for one seed"):
            assert cell in text


def test_each_data_set_has_its_own_table(place: Path) -> None:
    found = cells(place, "*", "b/0")
    assert [row["data"] for row in found] == ["photos, 64 pixels"] * 2 + ["synthetic, 224 pixels"]
    assert not found[-1]["difference to control, top-1"]  # its control was run on other images
    text = comparison.markdown(comparison.group([runs.read(run) for run in runs.find(["*"])]))
    assert text.count("| experiment |") == 2
    assert comparison.NOTE in text


def test_published_difference_uses_the_control_on_the_same_images(place: Path) -> None:
    stored(place / "d", 9.0, "experiment=one_column")
    (row,) = cells(place, "d")
    assert row["published difference, top-1"] == "+1.70"  # 39.168 - 37.473, both of 2010


def test_overridden_experiment_has_its_own_row_without_published_error(place: Path) -> None:
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
    assert [bool(row["difference to control, top-1"]) for row in found[1:]] == [True] + 4 * [False]


def test_runs_that_started_from_different_nets_have_rows_of_their_own(place: Path) -> None:
    for seed, start in enumerate(("n1", "n2", "n1")):
        words = ("experiment=conv6", f"init.checkpoint={place / start}", f"seed={seed}")
        stored(place / f"s/{seed}", 10.0 + seed, *words)
    first, second = cells(place, "s")
    assert [row["top-1 error, %"] for row in (first, second)] == ["11.00 ± 1.41", "11.00"]
    assert first["experiment"] == f"conv6 init.checkpoint={place / 'n1'}"
    assert all("run 146" in row["published"] for row in (first, second))


def test_control_has_the_same_other_settings_as_its_run(place: Path) -> None:
    words = ("epochs=36", "precision=bfloat16", "batch_size=32")
    stored(place / "d", 20.0, "experiment=two_columns", *words)
    stored(place / "e", 10.0, "experiment=no_lrn", *words)
    *_, ours = cells(place, "a", "d", "e")
    assert ours["difference to control, top-1"] == "-10.00"


def test_experiment_that_changes_views_is_compared_with_a_control_of_ten_views(
    place: Path,
) -> None:
    stored(place / "d", 13.0, "experiment=one_view")
    stored(place / "e", 13.0, "experiment=no_lrn", "views=1")
    stored(place / "f", 10.0, "experiment=two_columns_2010")
    _, one_view, other, _ = cells(place, "a", "d", "e", "f")
    assert one_view["difference to control, top-1"] == "+3.00"
    assert one_view["published difference, top-1"] == "+1.50"
    assert not other["difference to control, top-1"]


def test_runs_of_imagenet_have_the_lengths_of_their_own_schedules(place: Path) -> None:
    words = ("data=imagenet", "data.root=images", "steps=null")
    for name, epochs in (("two_columns", 91), ("no_lrn", 97)):
        settings = config.read("train", [f"experiment={name}", *words])
        assert run_length(settings) == epochs
        for last, folder in ((epochs - 1, "d"), (epochs - 2, "e")):
            run = stored(place / folder / name, 10.0, f"experiment={name}", *words)
            rows = (run / "metrics.jsonl").read_text().replace('"epoch": 0', f'"epoch": {last}')
            (run / "metrics.jsonl").write_text(rows.replace('"views": 1', '"views": 10'))
    assert [row["difference to control, top-1"] for row in cells(place, "d")] == ["+0.00", ""]
    assert [row["seeds"] for row in cells(place, "e")] == ["0", "0"]
    assert run_length(config.read("train", ["experiment=clean", *words])) == 95


@pytest.mark.parametrize("data", ["imagefolder", "packed"])
def test_each_image_folder_and_number_of_classes_is_a_data_set(place: Path, data: str) -> None:
    for name, error in (("d", 10.0), ("e", 50.0)):
        (place / f"images_{name}").mkdir(parents=True)
        stored(place / name, error, f"data={data}", f"data.root=images_{name}")
    found = cells(place, "d", "e")
    assert [row["data"] for row in found] == [
        f"{data} {place}/images_{name}, 224 pixels" for name in "de"
    ]
    assert [row["seeds"] for row in found] == ["1", "1"]
    stored(place / "f", 50.0, "model.num_classes=20")
    (row,) = cells(place, "f")
    assert row["data"] == "photos, 20 classes, 64 pixels"


def test_replicas_count_as_a_larger_batch(place: Path) -> None:
    stored(place / "d", 11.0, "experiment=two_columns", "seed=2", "replicas=2", "batch_size=64")
    stored(place / "e", 50.0, "experiment=two_columns", "seed=3", "replicas=2")
    same, other = cells(place, "a", "d", "e")
    assert (same["seeds"], same["top-1 error, %"]) == ("3", "11.00 ± 1.00")
    assert (other["seeds"], other["experiment"]) == ("1", "two_columns (e)")


def test_steps_are_those_of_the_evaluations_that_the_means_include(place: Path) -> None:
    stored(place / "d", 90.0, "experiment=two_columns", "seed=2")
    begun = (place / "d/metrics.jsonl").read_text().splitlines(keepends=True)
    (place / "d/metrics.jsonl").write_text("".join(begun[:3]))
    (with_d,), (row,) = cells(place, "a", "d"), cells(place, "a")
    assert with_d["steps"] == row["steps"] == "4"


def test_unfinished_and_repeated_runs_are_left_out_of_the_means(place: Path) -> None:
    stored(place / "d", 90.0, "experiment=two_columns", "seed=2")
    begun = (place / "d/metrics.jsonl").read_text().splitlines(keepends=True)
    (place / "d/metrics.jsonl").write_text("".join(begun[:3]))  # two steps and their test
    stored(place / "e", 80.0, "experiment=two_columns", "seed=1")
    rows = [json.loads(line) for line in (place / "a/1/metrics.jsonl").read_text().splitlines()]
    rows[-1]["views"] = 1  # of ten that were asked for
    (row,) = cells(place, "a", "d", "e")
    assert (row["seeds"], row["top-1 error, %"]) == ("2", "11.00 ± 1.41")
    sets = comparison.group([runs.read(run) for run in runs.find(["a", "d", "e"])])
    assert list(comparison.notes(sets)) == [
        "e: left out, another run has the same seed 1",
        "d: left out, it is not finished",
        comparison.NOTE,
    ]
    (place / "a/1/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = cells(place, "a")
    assert (row["seeds"], row["top-1 error, %"]) == ("1", "10.00")


def test_every_setting_of_a_training_identifies_it_or_is_known_not_to() -> None:
    incidental = {
        *("seed", "run_dir", "resume", "device", "threads", "workers", "cache_dir", "restarts"),
        *("checkpoint_every", "keep_last", "keep_every", "keep_best", "log_every", "compile"),
        *("channels_last", "columns", "replicas", "comm", "monitor", "tf32", "on_failure"),
        *("published", "control_published", "control", "experiment", "cuda_graph", "share_gpu"),
        *("deterministic", "accumulate"),
    }
    settings = asdict(config.read("train", ["data=synthetic"]))
    identifying = {key.partition(".")[0] for key in runs.identity(settings)}
    assert identifying | incidental == settings.keys()
    assert not identifying & incidental


def test_run_without_experiment_is_labelled_by_recipe_and_switches(place: Path) -> None:
    stored(place / "d", 9.0, "model.norm=none", "recipe=paper")
    (row,) = cells(place, "d")
    assert row["experiment"] == "paper norm=none"


def test_command_prints_tables_and_writes_a_page_without_external_files(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["modelpar-compare", "runs=[a,b,c]"])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == 0
    assert "| no_lrn | 2 | 4 | 10 | 13.50 ± 0.71 |" in capsys.readouterr().out
    html = (place / "compare" / "compare.html").read_text()
    assert html.count("<svg") == html.count("<table") == html.count("<th>experiment</th>") == 2
    assert html.count('role="img" aria-label="') == 2
    for outside in ("<script", "<link", "<img", 'src="', 'href="http'):  # it needs nothing else
        assert outside not in html


def test_names_on_a_page_break_after_underscores_and_slashes() -> None:
    assert breakable("a/b_<c>/d") == "a/<wbr>b_&lt;c&gt;/<wbr>d"


def errors(top1: float) -> dict[str, float]:
    return {"top1": top1, "top5": 5.0, "loss": 1.0, "samples": 800, "standard_error": 0.5}


@pytest.mark.parametrize("names", ["a,average.json", "av*.json"])
def test_averaged_nets_are_shown_beside_the_averages_of_the_paper(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: str,
) -> None:
    found = {"data": "photos", "views": 10, "checkpoints": ["one", "two"], "searched": 200}
    parts = {"members": [errors(13.0), errors(12.0)], "average": errors(10.0)}
    (place / "average.json").write_text(json.dumps({**found, **parts, "weights": [0.25, 0.75]}))
    monkeypatch.setattr(sys, "argv", ["modelpar-compare", f"runs=[{names}]"])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == 0
    output = capsys.readouterr().out
    rows = list(csv.DictReader((place / "compare" / "averages.csv").read_text().splitlines()))
    assert [row["net"] for row in rows] == [
        *("one", "two", "average of 2 nets, weights searched on 200 other images")
    ]
    assert [row["weight"] for row in rows] == ["0.250", "0.750", ""]
    assert rows[2]["top-1 error, %"] == "10.00 (standard error 0.50)"
    published = "5 CNNs: 38.1 / 16.4; 7 CNNs*: 36.7 / 15.4"  # table 2
    assert [row["published, top-1 / top-5"] for row in rows] == ["", "", published]
    html = (place / "compare" / "compare.html").read_text()
    for text in (output, html):
        assert text.count(published) == text.count("table 2 of the paper") == 1
    assert (place / "compare" / "compare.csv").exists() == output.count("two_columns")


def test_file_that_is_no_evaluation_is_named(place: Path) -> None:
    for content in ("{", "[]", '{"data": "photos"}'):
        (place / "x.json").write_text(content)
        with pytest.raises(DataError, match=r"x\.json: cannot read this evaluation"):
            averages.rows([place / "x.json"])
    with pytest.raises(SettingsError, match=r"runs=y\.json: no such file"):
        averages.find(["a", "y.json"])


def test_loss_curves_are_means_over_seeds_at_common_steps() -> None:
    curve = plots.mean_curve([{1: 2.0, 2: 4.0}, {1: 4.0, 2: 6.0, 3: 9.0}])
    assert curve == ([1, 2], [3.0, 5.0])
    steps, losses = plots.smoothed(range(1, 82), [float(step % 2) for step in range(1, 82)])
    assert (steps[:2], steps[-1], losses) == ([2, 4], 81, [0.5] * 40 + [1.0])


@pytest.mark.parametrize("pattern", ["nowhere", "x*", "a/0/metrics.jsonl"])
def test_pattern_without_runs_is_an_error(place: Path, pattern: str) -> None:
    with pytest.raises(SettingsError, match="no run there"):
        runs.find([pattern])
    assert runs.find(["a"]) == [runs.Path("a/0"), runs.Path("a/1")]
    del place


def test_brackets_in_the_name_of_a_run_are_no_pattern(place: Path) -> None:
    stored(place / "lr[1]", 10.0)
    assert runs.find(["lr[1]"]) == [runs.Path("lr[1]")]


def test_run_that_stopped_before_its_first_row_is_not_finished(place: Path) -> None:
    (place / "a/1/metrics.jsonl").unlink()
    (row,) = cells(place, "a")
    assert (row["seeds"], row["top-1 error, %"]) == ("1", "10.00")


def test_incomplete_last_line_is_ignored(place: Path) -> None:
    whole = (place / "a/0/metrics.jsonl").read_text()
    (place / "a/0/metrics.jsonl").write_text(whole + '{"kind": "train", "st')
    assert runs.read(place / "a/0").tests[-1] == (4, 10.0, 5.0)
    (place / "a/1/metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": null}\n')
    with pytest.raises(DataError, match="a/1: cannot read this run"):
        runs.read(place / "a/1")


def test_a_run_counts_once_by_whatever_name(place: Path) -> None:
    assert len(runs.find(["a", "a/0", str(place / "a"), "./a"])) == 2


def test_output_folder_that_cannot_be_created_is_a_one_line_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["modelpar-compare", "runs=[a]", "out=/proc/x"])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "modelpar: /proc/x: No such file or directory\n"
    del place


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.jsonl", "{ no\n"), ("config.yaml", "{ no\n"), ("config.yaml", "- no\n")],
)
def test_damaged_run_is_named_in_the_error(place: Path, name: str, content: str) -> None:
    (place / "a/0" / name).write_text(content)
    with pytest.raises(DataError, match="a/0: cannot read this run"):
        runs.read(place / "a/0")
