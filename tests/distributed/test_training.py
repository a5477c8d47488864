"""Whole trainings on real processes: the same inputs, exact resume over epochs, divergence."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.errors import DivergedError
from modelpar.images.augment import Augmentation
from modelpar.images.loader import Batch, TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.training import prepare, trainer
from modelpar.training.checkpoint import newest, read_part, signed
from modelpar.training.engine import Learner

QUIET = ["monitor.progress=false", "monitor.tensorboard=false"]


def overrides(images: Path, *more: str) -> list[str]:
    return [
        "data=imagefolder",
        f"data.root={images}",
        "model.image_size=64",
        "workers=0",
        "batch_size=8",
        *QUIET,
        *more,
    ]


def trained(mesh: Mesh, words: list[str], run_dir: str) -> float:
    settings = config.read("train", words)
    settings.replicas = mesh.replicas
    return trainer.train(settings, prepare.prepare(settings), mesh, Path(run_dir))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keep = ("kind", "step", "epoch", "loss", "lr", "top1")
    return [{key: row[key] for key in keep if key in row} for row in found]


@pytest.mark.parametrize("recipe", [pytest.param("paper", marks=pytest.mark.slow), "code2012"])
def test_resume_is_exact_over_epochs_and_their_ends(
    pair: Ranks, images: Path, tmp_path: Path, recipe: str
) -> None:
    """Stopped inside an epoch, at its last step, at its first; evaluated in between."""
    words = overrides(images, f"recipe={recipe}", "epochs=3", "recipe.lr=0.0005")
    pair.run(trained, words, str(tmp_path / "once"))
    for steps in (3, 5, 6, 14):
        pair.run(trained, [*words, f"steps={steps}"], str(tmp_path / "often"))
        stopped = newest(tmp_path / "often")
        assert stopped is not None
        assert (stopped.manifest["schedule"]["best"] is None) == (steps == 3)  # not due yet
    pair.run(trained, words, str(tmp_path / "often"))
    once, often = newest(tmp_path / "once"), newest(tmp_path / "often")
    assert once is not None
    assert often is not None
    assert once.step == often.step == 15
    assert once.manifest["schedule"] == often.manifest["schedule"]
    for kind in ("weights", "velocities"):
        one, other = (read_part(each, kind, None) for each in (once, often))  # type: ignore[arg-type]
        assert all(torch.equal(one[key], other[key]) for key in one), kind
    straight = rows(tmp_path / "once")
    broken = [row for row in rows(tmp_path / "often") if row["kind"] == "train"]
    assert [row for row in straight if row["kind"] == "train"] == broken
    assert [row["step"] for row in straight if row["kind"] == "test"] == [5, 10, 15]


@pytest.mark.slow
def test_a_pairs_checkpoint_goes_on_in_one_process_and_back(
    pair: Ranks, images: Path, tmp_path: Path
) -> None:
    words = overrides(images, "epochs=2", "precision=float64", "recipe.lr=0.0005")
    pair.run(trained, [*words, "steps=3"], str(tmp_path / "run"))
    alone = Mesh(torch.device("cpu"))
    trained(alone, [*words, "columns=1", "steps=6"], str(tmp_path / "run"))
    pair.run(trained, words, str(tmp_path / "run"))
    pair.run(trained, words, str(tmp_path / "once"))
    mixed, once = newest(tmp_path / "run"), newest(tmp_path / "once")
    assert mixed is not None
    assert once is not None
    for key, value in read_part(once, "weights", None).items():
        other = read_part(mixed, "weights", None)[key]
        assert float((value - other).norm() / value.norm()) < 1e-12, key


def test_a_run_ends_with_an_evaluation_wherever_it_ends(images: Path, tmp_path: Path) -> None:
    alone, run_dir = Mesh(torch.device("cpu")), tmp_path / "run"
    words = overrides(images, "columns=1", "checkpoint_every=3", "recipe.lr=0.0005")
    trained(alone, [*words, "steps=5"], str(run_dir))
    shutil.rmtree(run_dir / "checkpoints" / "step-00000005")  # as if killed before it was saved
    for _ in range(2):  # ended where no evaluation was due; then there is no more to do
        top1 = trained(alone, [*words, "steps=3"], str(run_dir))
        assert [(row["kind"], row["step"]) for row in rows(run_dir)] == [
            *(("train", step) for step in (1, 2, 3)),
            ("test", 3),
        ]
        found = newest(run_dir)
        assert found is not None
        assert (found.step, found.manifest["tested"], found.manifest["top1"]) == (3, 3, top1)


def test_an_evaluation_that_was_lost_stands_there_once(images: Path, tmp_path: Path) -> None:
    """Killed after the evaluation was made up for, before that was saved."""
    alone, run_dir = Mesh(torch.device("cpu")), tmp_path / "run"
    words = overrides(images, "columns=1", "recipe.lr=0.0005", "steps=5")
    trained(alone, words, str(run_dir))
    once = rows(run_dir)
    found = newest(run_dir)
    assert found is not None
    lost = signed(found.manifest | {"tested": -1, "untested": True})
    (found.folder / "manifest.json").write_text(json.dumps(lost))
    trained(alone, words, str(run_dir))
    assert rows(run_dir) == once


def digests(mesh: Mesh, words: list[str]) -> list[str]:
    settings = config.read("train", words)
    found = prepare.prepare(settings)
    lens = Augmentation(found.statistics, 64, scaled=True, device="cpu")
    order = BatchOrder(len(found.images.train), 4, 0, replica=mesh.replica, replicas=mesh.replicas)
    loader = TrainLoader(found.images.train, order, lens, mesh.device, crops="per_32")
    return [
        hashlib.sha256(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest()
        for batch in loader.epoch(1, 0, 0.1)
    ]


def test_both_columns_see_the_same_and_replicas_do_not(two_pairs: Ranks, images: Path) -> None:
    zero, one, two, three = two_pairs.run(digests, overrides(images))
    assert len(set(zero)) == 5
    assert zero == one
    assert two == three
    assert not set(zero) & set(two)


def diverged(mesh: Mesh, words: list[str], run_dir: str) -> str:
    try:
        trained(mesh, words, run_dir)
    except DivergedError as error:
        return str(error)
    return ""


def test_a_loss_that_is_no_number_stops_all_and_saves_nothing(
    pair: Ranks, images: Path, tmp_path: Path
) -> None:
    words = overrides(images, "epochs=4", "recipe.lr=1e30", "checkpoint_every=1")
    said = pair.run(diverged, words, str(tmp_path / "run"))
    assert said[0] == said[1]
    assert "the loss is nan" in said[0]
    found = newest(tmp_path / "run")
    if found is not None:
        weights = read_part(found, "weights", None)
        assert all(bool(value.isfinite().all()) for value in weights.values())
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_bfloat16_learns_too(pair: Ranks, images: Path, tmp_path: Path) -> None:
    words = overrides(images, "epochs=2", "precision=bfloat16", "recipe.lr=0.0005")
    pair.run(trained, words, str(tmp_path / "half"))
    pair.run(trained, [*words, "precision=float32"], str(tmp_path / "full"))
    half, full = (rows(tmp_path / name) for name in ("half", "full"))
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in full], rel=0.1)
    found = newest(tmp_path / "half")
    assert found is not None
    assert read_part(found, "weights", None)["fc6.weight"].dtype == torch.float32


def poisoned(mesh: Mesh, words: list[str], run_dir: str, layer: str, what: str) -> str:
    """Train; from the third step on rank 1 has a number that is not finite in ``layer``."""
    real = Learner.gradients

    def gradients(self: Learner, batch: Batch, step: int) -> torch.Tensor:
        weight = self.net.get_submodule(layer).weight
        if mesh.rank == 1 and step == 2 and what == "weight":
            with torch.no_grad():
                weight[0] = float("inf")
        if mesh.rank == 1 and step == 2 and what == "maps":
            with torch.no_grad():
                weight[0] = 3e38  # the weight is finite, what it gives is not
        loss = real(self, batch, step)
        if mesh.rank == 1 and step == 2 and what == "gradient":
            assert weight.grad is not None
            weight.grad[0] = float("nan")
        return loss

    Learner.gradients = gradients  # type: ignore[method-assign]
    try:
        return diverged(mesh, words, run_dir)
    finally:
        Learner.gradients = real  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("layer", "what", "named"),
    [
        ("conv4", "weight", "conv4.weight is not finite in column 1"),
        ("fc7", "maps", "what fc7 gives is not finite in column 1"),
        ("conv2", "gradient", "the gradient of conv2.weight is not finite in column 1"),
    ],
)
def test_the_layer_that_is_not_finite_is_named_on_both(
    pair: Ranks, images: Path, tmp_path: Path, layer: str, what: str, named: str
) -> None:
    words = overrides(images, "epochs=4", "recipe.lr=0.0005", "checkpoint_every=1")
    one, other = pair.run(poisoned, words, str(tmp_path / "run"), layer, what)
    assert one == other
    assert one.startswith("step 3: the loss is ")
    assert named in one
    found = newest(tmp_path / "run")
    assert found is not None
    assert found.step == 2
