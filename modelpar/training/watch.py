"""What the processes tell each other once a step, in one message of 40 bytes.

The classical silent bug of model parallelism is two ranks that train on different batches: the
loss falls, and the net is wrong.  Each column sends a digest of its batch while the step runs.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from modelpar.errors import DataError, DivergedError
from modelpar.images.loader import PIXELS_EVERY
from modelpar.mesh import digest, tell

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from modelpar.images.loader import Batch
    from modelpar.mesh import Mesh
    from modelpar.stop import Request

WEIGHTS_EVERY: Final = 500  # steps, between replicas


class Watch:
    """One process's end of the control message: ``begin`` before a step, ``end`` after it."""

    def __init__(self, mesh: Mesh, request: Request) -> None:
        self.mesh = mesh
        self.request = request
        self.step = 0
        self.wait: Callable[[], list[tuple[int, ...]]] | None = None

    def begin(
        self, step: int, batch: Batch, weights: Mapping[str, Tensor], *, failed: bool = False
    ) -> None:
        """Start telling all of step number ``step``; ``weights`` are those before it.

        ``failed``: a save did not succeed, which all shall notice at the same step.
        """
        self.step = step
        hashes_weights = self.mesh.replicas > 1 and step % WEIGHTS_EVERY == 0
        self.wait = tell(
            (
                step,
                self.request.signal,
                int(failed),
                batch.digest,
                digest(weights.values()) if hashes_weights else 0,
            ),
            self.mesh,
        )

    def end(self) -> tuple[int, bool]:
        """Return the signal that asked any process to stop, 0 for none; whether any save failed.

        Raises DataError where the columns of a replica had different batches, DivergedError where
        replicas have different weights: the same on every process.
        """
        if self.wait is None:
            return 0, False
        told, self.wait = self.wait(), None
        columns = self.mesh.columns
        for first in range(0, len(told), columns):
            seen = {(step, batch) for step, _, _, batch, _ in told[first : first + columns]}
            if len(seen) > 1:
                message = (
                    f"step {self.step}: the columns were given different batches "
                    f"({_list(told[first : first + columns], 3)}); see that all ranks read the "
                    f"same images, and go on from a checkpoint {PIXELS_EVERY} steps older"
                )
                raise DataError(message)
        for column in range(columns):
            if len({weights for *_, weights in told[column::columns]}) > 1:
                message = (
                    f"step {self.step}: the replicas' weights of column {column} differ "
                    f"({_list(told[column::columns], 4)}); go on from the last checkpoint"
                )
                raise DivergedError(message)
        return max(one[1] for one in told), any(one[2] for one in told)

    def asked(self) -> int:
        """Return the signal that asked any process to stop, now; a collective of the world."""
        return max(asked for (asked,) in tell((self.request.signal,), self.mesh)())


def _list(told: list[tuple[int, ...]], which: int) -> str:
    return ", ".join(f"step {one[0]} digest {one[which] & 0xFFFFFFFF:08x}" for one in told)


def signal_name(number: int) -> str:
    """Return SIGTERM for 15."""
    return signal.Signals(number).name
