"""Reading what a GPU computes without waiting for the step that was launched last."""

import time
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from modelpar.distributed import Mesh
from modelpar.errors import PeerLostError
from modelpar.images.loader import Batch

POLL: Final = 20e-6  # s between looks at the device, while a step of a pair takes milliseconds


class Launched(NamedTuple):
    """A step that may still be running, and what its row in metrics.jsonl needs."""

    number: int  # counted from 1
    batch: Batch
    epoch: int
    rates: dict[str, float]
    counts: tuple[float, ...]  # of the meter


class Readback:
    """A queue of steps whose values are copied to the host when the device has computed them.

    ``in_flight``: how many of the newest steps need not be read yet.  On a CPU each step is read
    at once.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.in_flight = 1 if mesh.device.type == "cuda" else 0
        self.queue: deque[tuple[Launched, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, values: Tensor, launched: Launched) -> None:
        """Start to copy ``values`` (K,), which the device may not have computed yet."""
        copied = None
        values = values.to("cpu", non_blocking=True)  # into pinned memory
        if self.mesh.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self.queue.append((launched, values, copied))

    def take(self, in_flight: int = 0) -> Iterator[tuple[Launched, list[float]]]:
        """Yield the steps but for the newest ``in_flight``, oldest first, with their values.

        Raises PeerLostError if one has not ended after the time limit of a collective: NCCL does
        not watch exchanges in a CUDA graph.
        """
        while len(self.queue) > in_flight:
            launched, values, copied = self.queue.popleft()
            if copied is not None:
                self._wait(launched.number, copied)
            yield launched, values.tolist()

    def _wait(self, number: int, copied: torch.cuda.Event) -> None:
        deadline = time.monotonic() + self.mesh.timeout
        while not copied.query():
            if self.mesh.world_size > 1 and time.monotonic() > deadline:
                raise PeerLostError(
                    f"step {number}: another rank does not respond ({self.mesh.timeout:g} s)"
                )
            time.sleep(POLL)
