"""CUDA graphs: the kernels of a function, recorded once and launched by one call from then on.

At batch 128 a GPU finishes the kernels of a step faster than Python can launch them one by one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from modelpar.errors import one_line, say
from modelpar.net.exchange import Link

# Calls before the recording: they compile kernels, choose algorithms and connect the ranks.
EAGER_CALLS: Final = 3


class Graphed:
    """A function of tensors that is recorded as a CUDA graph after a few calls, then replayed.

    It must read and write the same memory at each call.  The inputs are copied to those of the
    recording, and its results are in memory that the next call overwrites.  ``link``: the
    connection that the function uses, whose counters a replay increases.  A function that cannot
    be recorded runs as it is, and the reason is printed.
    """

    def __init__(self, function: Callable[..., Any], link: Link | None = None) -> None:
        self.function, self.link = function, link
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.result: Any = None
        self.counts: list[Counter[tuple[str, str]]] = []  # what a replay adds to the link's

    def __call__(self, *inputs: Tensor) -> Any:
        """Return what the function returns."""
        self.calls += 1
        if self.calls == EAGER_CALLS + 1:
            self._record(inputs)
        if self.graph is None:
            return self.function(*inputs)
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given, non_blocking=True)
        self.graph.replay()
        for counter, count in zip(self._counters(), self.counts, strict=True):
            counter.update(count)
        return self.result

    def close(self) -> None:
        """Delete the graph: NCCL does not end while one holds its kernels.

        See https://github.com/pytorch/pytorch/issues/115388.
        """
        if self.graph is not None:
            self.graph.reset()
            self.graph = None

    def _record(self, inputs: Sequence[Tensor]) -> None:
        before = [counter.copy() for counter in self._counters()]
        graph = torch.cuda.CUDAGraph()
        self.inputs = [given.clone() for given in inputs]
        # The stream may not be the default one.  Other modes forbid what NCCL's threads do.
        how: Any = {"stream": torch.cuda.current_stream(), "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **how):
                self.result = self.function(*self.inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of the recording fails, too
            where = f"column {self.link.column}: " if self.link else ""
            say(f"{where}cuda_graph is not used and steps are slower ({one_line(cause)[:160]})")
            for counter, earlier in zip(self._counters(), before, strict=True):
                counter.subtract(counter - earlier)
            return
        self.graph = graph
        for counter, earlier in zip(self._counters(), before, strict=True):
            self.counts.append(counter - earlier)
            counter.subtract(self.counts[-1])  # nothing has been sent yet

    def _counters(self) -> list[Counter[tuple[str, str]]]:
        return [self.link.sent, self.link.swaps] if self.link is not None else []
