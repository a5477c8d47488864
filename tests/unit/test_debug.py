"""``debug=...``: the table of the layers, one batch again and again, traces."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ranks import Ranks

from modelpar import config, launch
from modelpar.bench.floor import gflop
from modelpar.distributed import Mesh
from modelpar.errors import SettingsError
from modelpar.groups import DebugSettings
from modelpar.images.loader import Batch, TrainLoader
from modelpar.net.plan import Plan, Recipe
from modelpar.training import dry, prepare, runner
from modelpar.training.debug import NEAR_ZERO, UNTRACED, Debugging
from modelpar.training.metrics import read_rows

CODE = Plan(Recipe.named("code2012"))
WAYS = ("forward", "backward")
NAMES = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


def column_rows(plan: Plan, column: int | None, *words: str) -> list[dry.Row]:
    rows = dry.layer_rows(plan, config.read("train", list(words)), column)
    assert [row.layer for row in rows] == NAMES
    return rows


def test_the_table_has_the_papers_numbers() -> None:
    rows = column_rows(CODE, 0)
    assert 2 * sum(row.parameters for row in rows) - 1000 == 60_965_224  # fc8's bias is not shared
    assert [row.output for row in rows[:3]] == [(48, 55, 55), (128, 27, 27), (192, 13, 13)]
    assert [row.output for row in rows[5:]] == [(2048,), (2048,), (1000,)]
    sent = {row.layer: row.sent for row in rows if row.sent}
    assert sent == {"conv3": 86_528, "fc6": 18_432, "fc7": 8_192, "fc8": 4_000}
    assert sum(row.sent + row.returned for row in rows) == 230_304
    assert rows[5].weights == 4 * rows[5].parameters == rows[5].optimizer / 2
    assert rows[0].products == 48 * 55 * 55 * 3 * 11 * 11
    per_step = 2 * 128 * 2 * (2 * rows[0].products + 3 * sum(row.products for row in rows[1:]))
    assert per_step / 1e9 == pytest.approx(gflop(CODE, 128))


def test_the_table_of_a_small_net_counts_memory() -> None:
    plan = Plan(Recipe.named("paper"), 10, 64)
    whole = column_rows(plan, None, "batch_size=4")
    assert not any(row.sent for row in whole)
    eight = column_rows(plan, None, "batch_size=8", "precision=bfloat16")
    for one, two in zip(whole, eight, strict=True):
        assert two.weights == 1.5 * one.weights
        assert two.optimizer == 0.75 * one.optimizer  # the gradients are bfloat16
        assert 0 < one.activations <= two.activations < 1.5 * one.activations  # masks: a byte
    # conv1 keeps its padded input and at least its response, as float32
    assert whole[0].activations >= 4 * 4 * (3 * 67 * 67 + 96 * 15 * 15)
    averaged = column_rows(plan, None, "batch_size=4", "recipe.ema=0.9")
    assert averaged[0].optimizer == 1.5 * whole[0].optimizer
    halved = column_rows(plan, 1, "batch_size=4", "crossing.dtype=float16")
    assert halved[2].sent == 2 * 128 * 3 * 3


@pytest.mark.parametrize("words", [[], ["columns=1", "model.net=four_layer"]])
def test_dry_prints_a_table_and_writes_nothing(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["debug=dry", "model.num_classes=10", "model.image_size=64", *words]
    assert launch.run_launcher("train", lambda *_: None, [*words, "run_dir=run"]) == 0
    title, _, head, *rows = capsys.readouterr().out.splitlines()
    assert title.endswith("recipe code2012, 10 classes, 64 pixels, float32")
    assert head.split()[:5] == ["layer", "col", "output", "parameters", "MACs"]
    names = ["conv1", "conv2", "local3", "local4", "fc10"]
    shown = [row.split()[0] for row in rows[: rows.index("") - 1]]
    assert shown == (names if len(words) > 3 else [name for name in NAMES for _ in "01"])
    assert not list(tmp_path.iterdir())


def test_dry_is_refused_under_torchrun() -> None:
    env = SimpleNamespace(num_replicas=lambda *_: 1, local_size=2, rank=0)
    with pytest.raises(SettingsError, match="starts no ranks; use modelpar-train"):
        launch._rank_settings("train", ["debug=dry"], cast("Any", env))


# -- one batch, and traces ------------------------------------------------------------------------


class Loader:
    """Batches of one image, whose value is their number."""

    order = range(6)

    def epoch(self, epoch: int, first: int, noise: float) -> Iterator[Batch]:
        del noise
        for number in range(first, 6):
            yield Batch(torch.full((1, 1), 10 * epoch + number), torch.zeros(1), waited=1.0)


def seen(debug: Debugging, epoch: int, first: int) -> list[int]:
    loader = cast("TrainLoader", Loader())
    return [int(batch.images) for batch in debug.batches(loader, epoch, first, 0.1)]


def test_one_batch_is_the_first_of_the_run(tmp_path: Path) -> None:
    plain = Debugging(DebugSettings(), tmp_path, 0)
    assert seen(plain, 1, 2) == [12, 13, 14, 15]
    assert not plain.learned(0.0)
    assert plain.end(3) == {}
    one = Debugging(DebugSettings(one_batch=True), tmp_path, 0)
    assert seen(one, 1, 2) == [0] * 4
    assert not one.learned(NEAR_ZERO)
    assert one.end(3)["overfit"].startswith("the net does not learn one batch: loss 0.0500 > 0.05")
    assert one.learned(NEAR_ZERO / 2)
    assert one.end(4)["overfit"] == "the net learns one batch: loss 0.0250 < 0.05 at step 4"


def events(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    debug = Debugging(DebugSettings(trace=2), tmp_path, 1)
    for step, _ in enumerate(debug.batches(cast("TrainLoader", Loader()), 0, 0, 0.1)):
        with torch.profiler.record_function(f"step {step}"):
            pass
    assert debug.end(6)["trace"].startswith(f"{tmp_path}/trace, for ")
    names = [name for name in events(tmp_path / "trace/rank1.pt.trace.json.gz") if "step " in name]
    assert names == [f"step {UNTRACED}", f"step {UNTRACED + 1}"]


def trained(mesh: Mesh, words: list[str], run_dir: str) -> None:
    settings = config.read("train", words)
    runner.train(settings, prepare.prepare(settings), mesh, Path(run_dir))


SMALL = ["model.image_size=64", "workers=0", "monitor.progress=false", "monitor.tensorboard=false"]


@pytest.mark.slow
def test_exchanges_are_named_in_the_traces_of_both_ranks(
    pair: Ranks, images: Path, tmp_path: Path
) -> None:
    words = [*SMALL, "data=imagefolder", f"data.root={images}", "batch_size=4"]
    words += ["debug=profile", "steps=6", "debug.trace=1", "compile=false", "crossing.chunks=1"]
    pair.run(trained, words, str(tmp_path))
    for rank in (0, 1):
        names = events(tmp_path / f"trace/rank{rank}.pt.trace.json.gz")
        found = sorted(name for name in names if name.startswith("exchange of "))
        both = [f"{name}, {way}" for name in ("conv3", "fc6", "fc7") for way in WAYS]
        parts = ("start", "wait")
        wanted = [
            f"exchange of {one}: {part}" for one in [*both, "fc8, forward"] for part in parts
        ]
        assert found == sorted(wanted)


@pytest.mark.slow
def test_the_net_learns_one_batch_and_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "data=imagefolder", f"data.root={images}", "columns=1", "debug=overfit"]
    trained(Mesh(torch.device("cpu")), [*words, "batch_size=4"], str(tmp_path))
    assert "\noverfit   the net learns one batch: loss 0.0" in capsys.readouterr().out
    *rows, test = read_rows(tmp_path)
    assert rows[-1]["loss"] < NEAR_ZERO <= min(row["loss"] for row in rows[:-1])
    assert test["step"] == rows[-1]["step"] < 500


@pytest.mark.parametrize("name", ["fast", "overfit", "profile", "deterministic", "dry"])
def test_debug_is_composed_with_every_kind_of_training(name: str) -> None:
    settings = config.read("train", [f"debug={name}", "experiment=no_lrn", "data=synthetic"])
    assert settings.debug.dry == (name == "dry")
    assert settings.deterministic == (name == "deterministic")
