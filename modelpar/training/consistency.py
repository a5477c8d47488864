"""The step message: 40 bytes that every rank sends to all others before each step.

The classic silent bug of model parallelism is that two ranks train on different batches: the loss
falls, and the net is wrong.  Each rank therefore sends a digest of its batch.  If ranks disagree,
the step is not launched and all ranks stop.  The message is sent between CPUs, so that a GPU
still works on an earlier step meanwhile.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from torch import Tensor

from modelpar.distributed import Mesh
from modelpar.errors import DataError, DivergedError
from modelpar.images.loader import PIXELS_EVERY, Batch
from modelpar.seeding import digest
from modelpar.shutdown import Request

WEIGHTS_EVERY: Final = 500  # steps between comparisons of the replicas' weights


class StepStatus(NamedTuple):
    """What all ranks have sent, the same on each of them."""

    stop: int  # the signal by which any rank was asked to stop, 0: none
    saves: tuple[int, ...]  # each rank's ``Checkpointer.status``


class StepCheck:
    """Exchanges the step message; every method is a collective of the world."""

    def __init__(self, mesh: Mesh, request: Request) -> None:
        self.mesh, self.request = mesh, request

    def step(
        self,
        step: int,
        batch: Batch,
        weights: Mapping[str, Tensor],
        saved: int = 0,
    ) -> StepStatus:
        """Exchange the message of step number ``step``, counted from 1, before it is launched.

        ``weights``: the present ones; ``saved``: the status of this rank's save.  Raises DataError
        if the columns of a replica have different batches, and DivergedError if replicas have
        different weights: the same error on every rank.
        """
        compares = self.mesh.replicas > 1 and step % WEIGHTS_EVERY == 0
        hashed = digest(weights.values()) if compares else 0
        own = (step, batch.digest, hashed, self.request.signal, saved)
        messages = self.mesh.gather_ints(own)
        columns = self.mesh.columns
        for first in range(0, len(messages), columns):
            pair = messages[first : first + columns]
            if len({message[:2] for message in pair}) > 1:
                raise DataError(
                    f"step {step}: the columns have different batches ({_describe(pair, 1)}); "
                    "check that all ranks read the same images, and continue from a checkpoint "
                    f"{PIXELS_EVERY} steps older"
                )
        for column in range(columns):
            replicas = messages[column::columns]
            if len({message[2] for message in replicas}) > 1:
                raise DivergedError(
                    f"step {step}: the replicas' weights of column {column} differ "
                    f"({_describe(replicas, 2)}); continue from the last checkpoint"
                )
        _, _, _, stops, saves = zip(*messages, strict=True)
        return StepStatus(max(stops), saves)

    def poll(self, saved: int = 0) -> StepStatus:
        """Exchange stop requests and the status of the save between steps."""
        stops, saves = zip(*self.mesh.gather_ints((self.request.signal, saved)), strict=True)
        return StepStatus(max(stops), saves)


def _describe(messages: list[tuple[int, ...]], field: int) -> str:
    return ", ".join(f"step {one[0]} digest {one[field] & 0xFFFFFFFF:08x}" for one in messages)
