"""The step message: all ranks learn of different batches, unequal replicas and stop requests."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from modelpar import config, shutdown
from modelpar.distributed import Mesh
from modelpar.errors import DivergedError, RunError
from modelpar.images.augment import Augmentation
from modelpar.images.loader import Batch, TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.images.samples import Images
from modelpar.training import consistency, prepare, runner
from modelpar.training.checkpoint import newest, read_part
from modelpar.training.consistency import StepCheck
from modelpar.training.metrics import evaluations, read_rows
from modelpar.training.saving import DONE, FAILED, PENDING

QUIET = ["monitor.progress=false", "monitor.tensorboard=false"]


def batch(digest: int = 7) -> Batch:
    return Batch(torch.zeros(2, 3, 4, 4), torch.tensor([3, 4]), 0.0, digest)


def exchanged(mesh: Mesh, wrong: int) -> str:
    """Exchange one message in which rank ``wrong`` has another batch; return what that raises."""
    own = StepCheck(mesh, shutdown.Request())
    try:
        own.step(5, batch(8 if mesh.rank == wrong else 7), {})
    except RunError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("rank", [0, 1])
def test_different_batches_stop_both_ranks(pair: Ranks, rank: int) -> None:
    one, other = pair.run(exchanged, rank)
    assert one == other
    assert one.startswith("DataError: step 5: the columns have different batches (")
    assert "digest 00000007" in one
    assert "digest 00000008" in one


def test_equal_batches_and_replicas_with_other_batches_continue(
    pair: Ranks, two_pairs: Ranks
) -> None:
    assert pair.run(exchanged, -1) == ["", ""]
    assert two_pairs.run(replicas, 0.0, -1) == [(0, "")] * 4


def read(mesh: Mesh, words: list[str], change: str) -> list[int]:
    """Return the digests of an epoch's batches; rank 1's set differs by ``change``."""
    settings = config.read("train", words)
    found = prepare.prepare(settings)
    images: Any = found.images.train

    class Changed(Images):
        side, needs_decoding = images.side, False
        labels = images.labels ^ (mesh.rank == 1 and change == "label")

        def image(self, index: int) -> torch.Tensor:
            pixels = images.image(index)
            pixels[0, 0, 0] ^= mesh.rank == 1 and change == "pixel"
            return pixels

    seed = 1 if mesh.rank == 1 and change == "order" else 0
    order = BatchOrder(len(images), 8, seed)
    augmentation = Augmentation(found.statistics, 64, scaled=True, device=mesh.device)
    loader = TrainLoader(Changed(), order, augmentation, mesh, crops="per_image")
    return [one.digest for one in loader.epoch(0, 0, 0.1)]


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        ("", [True] * 5),
        ("order", [False] * 5),
        ("label", [False] * 5),
        ("pixel", [False] + [True] * 4),  # compared in one of a hundred batches
    ],
)
def test_digest_covers_order_labels_and_pixels(
    pair: Ranks, images: Path, change: str, equal: list[bool]
) -> None:
    one, other = pair.run(read, words_of(images), change)
    assert [mine == theirs for mine, theirs in zip(one, other, strict=True)] == equal
    assert len(set(one)) == 5


def words_of(images: Path, *more: str) -> list[str]:
    small = ["model.image_size=64", "workers=0", "batch_size=8", "compile=false"]
    return ["data=imagefolder", f"data.root={images}", *small, *QUIET, *more]


def replicas(mesh: Mesh, change: float, rank: int) -> tuple[int, str]:
    """Exchange a message of replicas with their own batches; ``rank`` has other weights."""
    request = shutdown.Request()
    own = StepCheck(mesh, request)
    weights = {"fc8.weight": torch.ones(3) * mesh.column + change * (mesh.rank == rank)}
    try:
        return own.step(consistency.WEIGHTS_EVERY, batch(mesh.replica), weights).stop, ""
    except DivergedError as error:
        return 0, str(error)


def test_different_replicas_stop_all_ranks(two_pairs: Ranks) -> None:
    ends = two_pairs.run(replicas, 1e-7, 3)
    assert len(set(ends)) == 1
    assert "the replicas' weights of column 1 differ" in ends[0][1]


def requested(mesh: Mesh, rank: int) -> tuple[int, int]:
    with shutdown.signals_noted() as request:
        if mesh.rank == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        own = StepCheck(mesh, request)
        return own.step(1, batch(), {}).stop, own.poll().stop


def test_stop_request_on_one_rank_reaches_all(pair: Ranks, two_pairs: Ranks) -> None:
    assert pair.run(requested, 1) == [(signal.SIGUSR1, signal.SIGUSR1)] * 2
    assert two_pairs.run(requested, 2) == [(signal.SIGUSR1, signal.SIGUSR1)] * 4
    assert pair.run(requested, -1) == [(0, 0)] * 2


def test_single_process_exchanges_nothing() -> None:
    own = StepCheck(Mesh(torch.device("cpu")), shutdown.Request())
    assert own.step(1, batch(), {}) == (0, (PENDING,))
    assert own.step(1, batch(), {}, FAILED) == (0, (FAILED,))
    assert own.poll(DONE) == (0, (DONE,))


def saves(mesh: Mesh, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    own = StepCheck(mesh, shutdown.Request())
    saved = FAILED if mesh.rank == rank else DONE
    return own.step(1, batch(), {}, saved).saves, own.poll(saved).saves


def test_status_of_a_save_reaches_all_ranks(pair: Ranks) -> None:
    assert pair.run(saves, 1) == [((DONE, FAILED), (DONE, FAILED))] * 2
    assert pair.run(saves, 2) == [((DONE, DONE), (DONE, DONE))] * 2


def test_batch_of_another_step_counts_as_different(pair: Ranks) -> None:
    with pytest.raises(AssertionError, match="DataError"):
        pair.run(out_of_step)


def out_of_step(mesh: Mesh) -> None:
    own = StepCheck(mesh, shutdown.Request())
    own.step(1 + mesh.rank, batch(), {})


def interrupted(mesh: Mesh, words: list[str], run_dir: str, step: int, where: str) -> str:
    """Train; rank 1 is asked to stop in ``step``, or in the evaluation after it."""
    settings = config.read("train", words)
    real_step, real_poll, at = StepCheck.step, StepCheck.poll, [0]

    def ask(here: str) -> None:
        if mesh.rank == 1 and (here, at[0]) == (where, step + 1):
            os.kill(os.getpid(), signal.SIGTERM)

    def in_step(self: StepCheck, number: int, *arguments: Any, **more: Any) -> Any:
        at[0] = number
        ask("step")
        return real_step(self, number, *arguments, **more)

    def in_evaluation(self: StepCheck, saved: int = 0) -> Any:
        ask("evaluation")
        return real_poll(self, saved)

    StepCheck.step, StepCheck.poll = in_step, in_evaluation  # type: ignore[method-assign]
    try:
        runner.train(settings, prepare.prepare(settings), mesh, Path(run_dir))
    except RunError as error:
        return f"{error.status}: {error}"
    finally:
        StepCheck.step, StepCheck.poll = real_step, real_poll  # type: ignore[method-assign]
    return "not stopped"


@pytest.mark.parametrize(
    ("step", "where", "saved"),
    [
        (2, "step", 3),
        pytest.param(4, "step", 5, marks=pytest.mark.slow),
        pytest.param(4, "evaluation", 5, marks=pytest.mark.slow),
        pytest.param(9, "evaluation", 10, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_equals_never_stopped(
    pair: Ranks, images: Path, tmp_path: Path, step: int, where: str, saved: int
) -> None:
    """Within an epoch, at its last step, in its evaluation, and in the run's last evaluation."""
    # the paper's schedule follows the evaluations
    words = words_of(images, "epochs=2", "recipe=paper", "recipe.lr=0.0005")
    run, once = tmp_path / "run", tmp_path / "once"
    ends = pair.run(interrupted, words, str(run), step, where)
    assert ends[0] == ends[1]
    assert ends[0].startswith(f"75: {run}: asked to stop (SIGTERM), saved at step {saved} of 10;")
    stopped = newest(run)
    assert stopped is not None
    assert stopped.step == saved
    for folder in (run, once):
        assert pair.run(interrupted, words, str(folder), -1, "step") == ["not stopped"] * 2
    one, other = newest(run), newest(once)
    assert one is not None
    assert other is not None
    assert one.manifest["schedule"] == other.manifest["schedule"]
    found, wanted = ([row["top1"] for row in evaluations(at).values()] for at in (run, once))
    assert found == wanted
    for key, value in read_part(one, "weights", None).items():
        assert torch.equal(value, read_part(other, "weights", None)[key]), key
    tests = [row["step"] for row in read_rows(run) if row["kind"] == "test"]
    assert tests == [5, 10]
