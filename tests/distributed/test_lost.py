"""A process that is killed or stands still: the others say so, in time and in one line."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
import torch
from ranks import Ranks
from torch import nn

from modelpar.errors import PeerLostError
from modelpar.images.loader import Batch
from modelpar.training.engine import Learner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelpar.mesh import Mesh

TIMEOUT = 4.0  # s: comm.timeout here


@pytest.fixture
def replicas() -> Iterator[Ranks]:
    """Two processes that hold the whole net each, to be broken."""
    ranks = Ranks(2, columns=1, timeout=TIMEOUT)
    yield ranks
    for process in ranks.processes:
        process.kill()


def first(ranks: Ranks, function: Callable[..., str], *arguments: object) -> str:
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
