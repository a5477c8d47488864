"""What the processes tell each other once a step, in one message of 48 bytes.

The classical silent bug of model parallelism is two ranks that train on different batches: the
loss falls, and the net is wrong.  Each column sends a digest of its batch, and whether its
gradients are finite, before the step's update: what they do not agree on changes no weight.
"""

import signal
from collections.abc import Mapping
from typing import Final, NamedTuple

from torch import Tensor

from modelpar.distributed import Mesh
from modelpar.errors import DataError, DivergedError
from modelpar.images.loader import PIXELS_EVERY, Batch
from modelpar.seeding import digest
from modelpar.shutdown import Request

WEIGHTS_EVERY: Final = 500  # steps, between replicas


class StepStatus(NamedTuple):
    """What the processes have told each other, the same on all of them."""

    asked: int  # the signal that asked one to stop, 0 for none
    failed: bool  # a save did not succeed
    finite: bool  # loss and gradients of all are finite


class StepCheck:
    """One process's end of the control message."""

    def __init__(self, mesh: Mesh, request: Request) -> None:
        self.mesh = mesh
        self.request = request

    def agree(
        self,
        step: int,
        batch: Batch,
        weights: Mapping[str, Tensor],
        *,
        finite: bool = True,
        failed: bool = False,
    ) -> StepStatus:
        """Tell all of step number ``step``, counted from 1, and return what all have told.

        ``weights`` are those before its update.  Raises DataError where the columns of a replica
        had different batches, DivergedError where replicas have different weights: the same on
        every process.  A collective of the world.
        """
        hashes_weights = self.mesh.replicas > 1 and step % WEIGHTS_EVERY == 0
        hashed = digest(weights.values()) if hashes_weights else 0
        flags = (self.request.signal, int(failed), int(not finite))
        told = self.mesh.gather_ints((step, batch.digest, hashed, *flags))
        columns = self.mesh.columns
        for first in range(0, len(told), columns):
            pair = told[first : first + columns]
            if len({one[:2] for one in pair}) > 1:
                raise DataError(
                    f"step {step}: the columns were given different batches ({_list(pair, 1)}); "
                    "see that all ranks read the same images, and go on from a checkpoint "
                    f"{PIXELS_EVERY} steps older"
                )
        for column in range(columns):
            same = told[column::columns]
            if len({one[2] for one in same}) > 1:
                raise DivergedError(
                    f"step {step}: the replicas' weights of column {column} differ "
                    f"({_list(same, 2)}); go on from the last checkpoint"
                )
        asked, failures, infinite = (max(one[place] for one in told) for place in (3, 4, 5))
        return StepStatus(asked, bool(failures), not infinite)

    def asked(self) -> int:
        """Return the signal that asked any process to stop, now; a collective of the world."""
        return max(asked for (asked,) in self.mesh.gather_ints((self.request.signal,)))


def _list(told: list[tuple[int, ...]], which: int) -> str:
    return ", ".join(f"step {one[0]} digest {one[which] & 0xFFFFFFFF:08x}" for one in told)


def signal_name(number: int) -> str:
    """Return SIGTERM for 15."""
    return signal.Signals(number).name
