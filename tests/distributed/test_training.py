"""Whole trainings on real processes: equal inputs, exact resume over epochs, divergence."""

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
from modelpar.images.loader import TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.studies import runs
from modelpar.training import prepare, runner, trainer
from modelpar.training.checkpoint import newest, read_part
from modelpar.training.engine import Learner
from modelpar.training.metrics import read_rows
from modelpar.training.readback import Readback

QUIET = ["monitor.progress=false", "monitor.tensorboard=false"]


def overrides(images: Path, *more: str) -> list[str]:
    return [
        "data=imagefolder",
        f"data.root={images}",
        "model.image_size=64",
        "workers=0",
        "batch_size=8",
        "compile=false",
        *QUIET,
        *more,
    ]


def trained(mesh: Mesh, words: list[str], run_dir: str) -> None:
    settings = config.read("train", words)
    settings.replicas = mesh.replicas
    runner.train(settings, prepare.prepare(settings), mesh, Path(run_dir))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keep = ("kind", "step", "epoch", "loss", "lr", "top1")
    return [{key: row[key] for key in keep if key in row} for row in found]


@pytest.mark.parametrize("recipe", [pytest.param("paper", marks=pytest.mark.slow), "code2012"])
def test_resume_is_exact_within_epochs_and_at_their_ends(
    pair: Ranks, images: Path, tmp_path: Path, recipe: str
) -> None:
    """Stopped within an epoch, at its last step, and at its first; evaluated in between."""
    words = overrides(images, f"recipe={recipe}", "epochs=3", "recipe.lr=0.0005")
    pair.run(trained, words, str(tmp_path / "once"))
    for steps in (3, 5, 6, 14):
        pair.run(trained, [*words, f"steps={steps}"], str(tmp_path / "often"))
        stopped = newest(tmp_path / "often")
        assert stopped is not None
        assert (stopped.manifest["schedule"]["best"] is None) == (
            steps <= 5
        )  # before its evaluation
    pair.run(trained, words, str(tmp_path / "often"))
    once, often = newest(tmp_path / "once"), newest(tmp_path / "often")
    assert once is not None
    assert often is not None
    assert once.step == often.step == 15
    assert once.manifest["schedule"] == often.manifest["schedule"]
    for kind in ("weights", "velocities"):
        one, other = (read_part(each, kind, None) for each in (once, often))
        assert all(torch.equal(one[key], other[key]) for key in one), kind
    straight, resumed = rows(tmp_path / "once"), rows(tmp_path / "often")
    assert [row["step"] for row in straight if row["kind"] == "test"] == [5, 10, 15]
    extra = [row for row in resumed if row["kind"] == "test" and row["step"] in {3, 6, 14}]
    assert len(extra) == 3  # evaluated because the run ended there
    assert [row for row in resumed if row not in extra] == straight


@pytest.mark.slow
def test_checkpoint_of_a_pair_continues_in_one_process_and_back(
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


def test_the_last_step_has_a_row_however_few_are_asked_for(images: Path, tmp_path: Path) -> None:
    words = overrides(images, "columns=1", "log_every=20", "epochs=2", "recipe.lr=0.0005")
    trained(Mesh(torch.device("cpu")), words, str(tmp_path))
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "train"] == [1, 10]
    assert runs.read(tmp_path).finished


def test_every_run_ends_with_an_evaluation(images: Path, tmp_path: Path) -> None:
    alone, run_dir = Mesh(torch.device("cpu")), tmp_path / "run"
    words = overrides(images, "columns=1", "checkpoint_every=3", "recipe.lr=0.0005")
    trained(alone, [*words, "steps=5"], str(run_dir))
    shutil.rmtree(
        run_dir / "checkpoints" / "step-00000005"
    )  # as if killed before it was published
    found = []
    for _ in range(2):  # ends where none was due; then it is finished
        trained(alone, [*words, "steps=3"], str(run_dir))
        assert [(row["kind"], row["step"]) for row in rows(run_dir)] == [
            *(("train", step) for step in (1, 2, 3)),
            ("test", 3),
        ]
        saved = newest(run_dir)
        assert saved is not None
        assert saved.step == 3
        found.append((run_dir / "metrics.jsonl").read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize("lost", [True, False])
def test_run_resumed_at_its_last_step_has_one_evaluation(
    images: Path, tmp_path: Path, *, lost: bool
) -> None:
    """Killed after its last checkpoint: before its evaluation was recorded, or after."""
    alone, run_dir = Mesh(torch.device("cpu")), tmp_path / "run"
    words = overrides(images, "columns=1", "recipe.lr=0.0005", "steps=2")
    trained(alone, words, str(run_dir))
    once = rows(run_dir)
    if lost:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run_dir / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    trained(alone, words, str(run_dir))
    assert rows(run_dir) == once
    assert names_in(run_dir / "checkpoints") == ["step-00000002"]


@pytest.mark.slow
def test_longer_run_repeats_the_evaluation_with_one_view(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, run_dir = Mesh(torch.device("cpu")), tmp_path / "run"
    words = overrides(images, "columns=1", "recipe.lr=0.0005", "views=10")
    trained(alone, [*words, "epochs=1"], str(run_dir))
    trained(alone, [*words, "epochs=2"], str(run_dir))
    tests = [row for row in read_rows(run_dir) if row["kind"] == "test"]
    assert [(row["step"], row["views"]) for row in tests] == [(5, 1), (10, 10)]
    assert "modelpar: each epoch decodes and scales the images again" in capsys.readouterr().out


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digests(mesh: Mesh, words: list[str]) -> list[str]:
    settings = config.read("train", words)
    found = prepare.prepare(settings)
    augmentation = Augmentation(found.statistics, 64, scaled=True, device="cpu")
    order = BatchOrder(len(found.images.train), 4, 0, replica=mesh.replica, replicas=mesh.replicas)
    loader = TrainLoader(found.images.train, order, augmentation, mesh, crops="per_32")
    return [
        hashlib.sha256(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest()
        for batch in loader.epoch(1, 0, 0.1)
    ]


def test_columns_have_equal_batches_and_replicas_do_not(two_pairs: Ranks, images: Path) -> None:
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


def test_nan_loss_stops_all_ranks_and_is_not_saved(
    pair: Ranks, images: Path, tmp_path: Path
) -> None:
    words = overrides(images, "epochs=4", "recipe.lr=1e30", "checkpoint_every=1")
    said = pair.run(diverged, words, str(tmp_path / "run"))
    assert said[0] == said[1]
    assert "loss is nan" in said[0]
    found = newest(tmp_path / "run")
    assert found is not None  # the first step's loss is finite, and with it what it saves
    weights = read_part(found, "weights", None)
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_bfloat16_trains_like_float32(pair: Ranks, images: Path, tmp_path: Path) -> None:
    words = overrides(images, "epochs=2", "precision=bfloat16", "recipe.lr=0.0005")
    pair.run(trained, words, str(tmp_path / "half"))
    pair.run(trained, [*words, "precision=float32"], str(tmp_path / "full"))
    half, full = (rows(tmp_path / name) for name in ("half", "full"))
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in full], rel=0.1)
    found = newest(tmp_path / "half")
    assert found is not None
    assert read_part(found, "weights", None)["fc6.weight"].dtype == torch.float32


def poisoned(
    mesh: Mesh, words: list[str], run_dir: str, layer: str, what: str, in_flight: int = 0
) -> tuple[str, int, dict[str, dict[str, torch.Tensor]]]:
    """Train; from the third step on rank 1 has a value that is not finite in ``layer``.

    Each step is read when ``in_flight`` later ones are launched, as on a GPU.  Returns the error,
    how many passes were done until then, and the state.
    """
    real, learners = Learner.backward, list[Learner]()

    def backward(self: Learner, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        learners.append(self)
        bad = len(learners) >= 3 and mesh.rank == 1
        weight = self.net.get_submodule(layer).weight
        with torch.no_grad():
            if bad and what == "weight":
                weight[0] = float("inf")
            if bad and what == "maps":
                weight[0] = 3e38  # the weight is finite, its output is not
        found = real(self, *inputs)
        if bad and what == "gradient":
            assert weight.grad is not None
            weight.grad[0] = float("nan")
        return found

    def delayed(mesh: Mesh) -> Readback:
        readback = Readback(mesh)
        readback.in_flight = in_flight
        return readback

    Learner.backward = backward  # type: ignore[method-assign]
    trainer.Readback = delayed  # type: ignore[misc, assignment]
    try:
        error = diverged(mesh, words, run_dir)
    finally:
        Learner.backward, trainer.Readback = real, Readback  # type: ignore[method-assign, misc]
    return error, len(learners), learners[0].state()


@pytest.mark.parametrize(
    ("layer", "what", "named"),
    [
        ("conv4", "weight", "first non-finite value: conv4.weight in column 1"),
        ("fc7", "maps", "first non-finite value: output of fc7 in column 1"),
        ("conv2", "gradient", "first non-finite value: gradient of conv2.weight in column 1"),
    ],
)
def test_layer_with_a_nonfinite_value_is_named_on_both_ranks(
    pair: Ranks, images: Path, tmp_path: Path, layer: str, what: str, named: str
) -> None:
    words = overrides(images, "epochs=4", "recipe.lr=0.0005", "checkpoint_every=1")
    (one, *_), (other, *_) = pair.run(poisoned, words, str(tmp_path / "run"), layer, what)
    assert one == other
    assert one.startswith("step 3: loss is ")
    assert named in one
    found = newest(tmp_path / "run")
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("in_flight", [0, 2])
def test_bad_step_that_is_noticed_later_changes_no_weight(
    pair: Ranks, images: Path, tmp_path: Path, in_flight: int
) -> None:
    words = overrides(images, "epochs=4", "recipe.lr=0.0005", "checkpoint_every=0")
    pair.run(trained, [*words, "steps=2"], str(tmp_path / "two"))
    ends = pair.run(poisoned, words, str(tmp_path / "run"), "conv2", "gradient", in_flight)
    before = newest(tmp_path / "two")
    assert before is not None
    for column, (error, passes, state) in enumerate(ends):
        assert error.startswith("step 3: loss is ")
        assert "first non-finite value: gradient of conv2.weight in column 1" in error
        assert passes == 3 + in_flight + 1  # the last is the search for the layer
        for kind, tensors in state.items():
            saved = read_part(before, kind, column)
            for key, value in tensors.items():
                assert torch.equal(value, saved[key]), key
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
