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
from torch import nn

from modelpar.distributed import Mesh
from modelpar.errors import PeerLostError
from modelpar.images.loader import Batch
from modelpar.training import checkpoint
from modelpar.training.engine import Learner
from modelpar.training.saver import Checkpointer, Retention

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


class Tiny(nn.Module):
    """A net without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def fix_dropout(self, draw: object) -> None:
        del draw

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images)


def left(mesh: Mesh, steps: int) -> str:
    """Learn together; after so many steps, 0 being before the net is built, rank 1 is killed."""
    batch = Batch(torch.ones(3, 4), torch.zeros(3, dtype=torch.int64), 0.0)

    def perhaps_die(step: int) -> None:
        if mesh.rank == 1 and step == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        perhaps_die(0)
        learner = Learner(Tiny(), mesh, None, None, 3, seed=0)  # type: ignore[arg-type]
        for step in range(1, 3):
            learner.gradients(batch, step)
            perhaps_die(step)
    except PeerLostError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("steps", "operation"), [(0, "replicate"), (1, "gradients")])
def test_a_replica_that_is_killed_is_lost(replicas: Ranks, steps: int, operation: str) -> None:
    said = first(replicas, left, steps)
    assert said.startswith(f"{operation}: the other process is gone or silent (")
    assert "\n" not in said


# -- saves ----------------------------------------------------------------------------------------


def saved(mesh: Mesh, folder: str, step: int, how: str) -> tuple[str, float]:
    """Save, and wait for it; return what came of it, and how long it took in s."""
    saver, save = Checkpointer(Path(folder), mesh, Retention()), checkpoint.save
    parts = {"weights": {"fc": torch.ones(2)}, "velocities": {"fc": torch.ones(2)}}

    def slow(*arguments: Any) -> Path:
        if mesh.rank == 1 and how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1.5 * TIMEOUT if mesh.rank == 1 and how == "slow" else 0)
        return save(*arguments)

    checkpoint.save = slow
    began = time.monotonic()
    try:
        saver.start(parts, {}, {"step": step})  # type: ignore[arg-type]
        while mesh.rank == 0 and how == "taken" and saver.take() is None:
            time.sleep(0.01)  # it has none any more to wait for, others may
        said = str(saver.end())
    except PeerLostError as error:
        said = str(error)
    finally:
        checkpoint.save = save
    return said, time.monotonic() - began


def test_who_stands_still_in_a_save_is_lost_and_who_is_slow_is_not(
    replicas: Ranks, tmp_path: Path
) -> None:
    (said, took), _ = replicas.run(saved, str(tmp_path), 1, "slow")
    assert said.endswith("step-00000001")
    assert took > TIMEOUT
    (said, _), (other, _) = replicas.run(saved, str(tmp_path), 2, "taken")
    assert said == "None"
    assert other.endswith("step-00000002")
    said, took = first(replicas, saved, str(tmp_path), 3, "stopped")
    assert said.startswith("gather: the other process is gone or silent (")
    assert took < 2 * TIMEOUT
