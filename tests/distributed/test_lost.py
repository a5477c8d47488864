"""A process that is killed or stands still: the others say so, in time and in one line."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, PeerLostError
from modelpar.groups import ModelSettings
from modelpar.images.loader import Batch
from modelpar.net.plan import Recipe, plan_for
from modelpar.settings import TrainSettings
from modelpar.training.engine import Learner
from modelpar.training.saving import Checkpointer

TIMEOUT = 4.0  # s: comm.timeout here


@pytest.fixture
def replicas() -> Iterator[Ranks]:
    """Two processes that hold the whole net each, to be broken."""
    ranks = Ranks(2, columns=1, timeout=TIMEOUT)
    yield ranks
    for process in ranks.processes:
        process.kill()


def first(ranks: Ranks, function: Callable[..., Any], *arguments: object) -> Any:
    """Run ``function`` on all; return what rank 0 says, whatever has become of the others."""
    for pipe in ranks.pipes:
        pipe.send((function, arguments))
    assert ranks.pipes[0].poll(60)
    fine, said = ranks.pipes[0].recv()
    assert fine, said
    return said


# -- replicas -------------------------------------------------------------------------------------


def left(mesh: Mesh, steps: int) -> str:
    """Learn together; after so many steps, 0 being before the net is built, rank 1 is killed."""
    batch = Batch(torch.ones(3, 3, 8, 8), torch.zeros(3, dtype=torch.int64), 0.0)
    plan = plan_for(Recipe.named("code2012"), ModelSettings(net="four_layer"), 2, 8)

    def perhaps_die(step: int) -> None:
        if mesh.rank == 1 and step == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        perhaps_die(0)
        learner = Learner(plan, TrainSettings(batch_size=3, epochs=1, compile=False), mesh)
        for step in range(1, 3):
            learner.gradients(batch, step)
            perhaps_die(step)
    except PeerLostError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("steps", "operation"), [(0, "data parallel"), (1, "gradients")])
def test_a_replica_that_is_killed_is_lost(replicas: Ranks, steps: int, operation: str) -> None:
    said = first(replicas, left, steps)
    assert said.startswith(f"{operation}: another rank has exited or does not respond (")
    assert "\n" not in said


@pytest.fixture
def columns() -> Iterator[Ranks]:
    """A pair to be broken."""
    ranks = Ranks(2, timeout=TIMEOUT)
    yield ranks
    for process in ranks.processes:
        process.kill()


# -- saves ----------------------------------------------------------------------------------------


def saved(mesh: Mesh, folder: str, step: int, how: str) -> tuple[str, float]:
    """Save and wait for it; return the outcome, and how long it took in s."""
    saver, write = Checkpointer(Path(folder), mesh), Checkpointer._write
    tensors = {"fc": torch.ones(2)}
    breaks = mesh.rank == mesh.world_size - 1

    def slow(self: Checkpointer, *arguments: Any) -> None:
        time.sleep(1.5 * TIMEOUT if breaks and how == "slow" else 0)
        if breaks and how == "full":
            raise OSError(28, "No space left on device")
        write(self, *arguments)

    Checkpointer._write = slow  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        saver.start({"weights": tensors, "velocities": tensors}, {}, {"step": step})
        if breaks and how == "hung":
            os.kill(os.getpid(), signal.SIGSTOP)
        outcome = str(saver.finish())
    except (PeerLostError, CheckpointError) as error:
        outcome = str(error)
    finally:
        Checkpointer._write = write  # type: ignore[method-assign]
    return outcome, time.monotonic() - began


@pytest.mark.slow
def test_hung_rank_times_out_during_save_but_slow_disk_does_not(
    columns: Ranks, tmp_path: Path
) -> None:
    (outcome, took), _ = columns.run(saved, str(tmp_path), 1, "slow")
    assert outcome.endswith("step-00000001")
    assert took > TIMEOUT
    (one, _), (other, _) = columns.run(saved, str(tmp_path), 2, "full")
    assert one == other
    assert "step-00000002: not saved, [Errno 28] No space left on device" in one
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step-00000001"]
    outcome, took = first(columns, saved, str(tmp_path), 3, "hung")
    assert outcome.startswith("all-gather: another rank has exited or does not respond (")
    assert took < 2 * TIMEOUT
