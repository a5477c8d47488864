"""Activations of the pair equal those of the whole net, and TensorBoard changes no training."""

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.images.augment import Augmentation
from modelpar.images.loader import TestLoader
from modelpar.training import prepare, runner
from modelpar.training.checkpoint import newest, read_part
from modelpar.training.engine import build, evaluate
from modelpar.training.showing import Watch

ALONE = Mesh(torch.device("cpu"))


def words_of(images: Path, *more: str) -> list[str]:
    return [
        "data=imagefolder",
        f"data.root={images}",
        "model.image_size=64",
        "workers=0",
        "batch_size=8",
        "recipe.lr=0.0005",
        "monitor.progress=false",
        "compile=false",
        *more,
    ]


def seen(mesh: Mesh, words: list[str]) -> dict[str, Any]:
    """What is shown of a net that has learnt nothing, in float64."""
    settings = config.read("train", words)
    found = prepare.prepare(settings)
    net = build(found.plan, mesh, settings, seed=3).eval()
    augmentation = Augmentation(found.statistics, 64, scaled=False, device="cpu")
    tests = TestLoader(found.images.test, 8, mesh)
    watch = Watch(net, found.plan, mesh, found.images.test, augmentation, 4, on=True)
    evaluate(net, mesh, tests, augmentation, found.images.groups, confusion=watch.counts())
    batch = 60 * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    functional.cross_entropy(net(batch), torch.tensor([0, 1, 1, 0])).backward()
    watch.see_gradients()
    shown = watch.result(ends=True)
    embedding = shown.embedding
    assert embedding is not None
    return {
        "activity": [astuple(row) for row in shown.activity],
        "histograms": [astuple(row) for row in shown.histograms],
        "confusion": shown.confusion,
        "labels": embedding.labels,
        "products": embedding.products,
    }


@pytest.mark.parametrize("net", ["two_columns", "no_crossing"])
def test_the_pair_shows_what_the_whole_net_shows(pair: Ranks, images: Path, net: str) -> None:
    crossing = ["model.crossing_at=[]"] if net == "no_crossing" else []
    how = ["precision=float64", "crossing.chunks=1"]  # samples are taken of each chunk
    words = words_of(images, f"model.net={net}", *how, *crossing)
    whole = seen(ALONE, words)
    first, second = pair.run(seen, words)
    for key in ("activity", "histograms", "labels"):
        assert first[key] == second[key]
    assert len(whole["activity"]) == 7 * 2 + 1
    assert len(whole["histograms"]) == 7 * 2 + 8 * 2
    for key, precise in (("activity", 1e-9), ("histograms", 1e-5)):
        for one, other in zip(first[key], whole[key], strict=True):
            assert one[:2] == other[:2]  # layer and column
            assert one[2:6] == pytest.approx(other[2:6], rel=precise, abs=1e-12)
    assert torch.equal(first["confusion"], whole["confusion"])
    assert whole["confusion"].sum() == len(whole["labels"]) == 10
    assert torch.allclose(first["products"], whole["products"], rtol=1e-9)


def trained(mesh: Mesh, words: list[str], run_dir: str) -> None:
    settings = config.read("train", words)
    settings.replicas = mesh.replicas
    runner.train(settings, prepare.prepare(settings), mesh, Path(run_dir))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found = newest(run_dir)
    assert found is not None
    return read_part(found, "weights", None) | {
        f"{key} velocity": value for key, value in read_part(found, "velocities", None).items()
    }


def rows(run_dir: Path, *keys: str) -> list[tuple[Any, ...]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [tuple(row.get(key) for key in ("kind", *keys)) for row in map(json.loads, lines)]


def tags(run_dir: Path) -> tuple[set[str], set[str], set[str]]:
    board = EventAccumulator(str(run_dir))
    board.Reload()
    scalars, pictures, histograms = (
        set(board.Tags()[kind]) for kind in ("scalars", "images", "histograms")
    )
    return scalars, pictures, histograms


@pytest.mark.slow
def test_tensorboard_changes_no_bit_of_the_training(
    pair: Ranks, images: Path, tmp_path: Path
) -> None:
    words = words_of(images, "steps=7", "checkpoint_every=3")
    for name, shows in (("shown", "true"), ("plain", "false")):
        pair.run(trained, [*words, f"monitor.tensorboard={shows}"], str(tmp_path / name))
    one, other = weights(tmp_path / "shown"), weights(tmp_path / "plain")
    assert all(torch.equal(one[key], other[key]) for key in one)
    keys = ("step", "loss", "top1", "top5", "exchange_bytes_per_image")
    assert rows(tmp_path / "shown", *keys) == rows(tmp_path / "plain", *keys)
    scalars, pictures, histograms = tags(tmp_path / "shown")
    assert pictures == {"weights_conv1/kernels", "train_batch/augmented", "test/confusion_matrix"}
    assert scalars >= {
        "train/top1",
        "weights_conv1/column1_off_grey",
        "units_dead/fc7/column1",
        "units_std/logits",
    }
    assert histograms >= {"units_histogram/fc7/column1", "weights_gradient/fc8/column1"}
    assert (tmp_path / "shown" / "00007" / "fc7" / "sprite.png").is_file()
    assert not list((tmp_path / "plain").glob("events.*"))


@pytest.mark.slow
def test_replicas_record_the_error_of_the_global_batch(
    two_pairs: Ranks, images: Path, tmp_path: Path
) -> None:
    words = words_of(images, "steps=3", "precision=float64")
    two_pairs.run(trained, [*words, "batch_size=4"], str(tmp_path / "four"))
    trained(ALONE, [*words, "columns=1"], str(tmp_path / "one"))
    four, one = (rows(tmp_path / name, "step", "top1") for name in ("four", "one"))
    assert four == one
    assert {row[2] for row in one[:3]} - {0.0, 100.0}  # the rows differ
    assert all((row[2] / 12.5).is_integer() for row in one[:3])  # of eight images
    assert tags(tmp_path / "four") == tags(tmp_path / "one")
