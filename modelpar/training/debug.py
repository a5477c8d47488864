"""What the settings of ``debug`` add to a training: one batch again and again, and a trace."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Final

from modelpar.groups import DebugSettings
from modelpar.images.loader import Batch, TrainLoader
from modelpar.tracing import traced
from modelpar.training.graph import EAGER_CALLS

NEAR_ZERO: Final = 0.05  # nats: a mean probability of 95 % for the right classes
UNTRACED: Final = EAGER_CALLS + 1  # steps before a trace begins: the last is recorded on a GPU


class Debugging:
    """The state of a training that is debugged; without such settings it changes nothing."""

    def __init__(self, settings: DebugSettings, run_dir: Path, rank: int) -> None:
        self.settings = settings
        self.path = run_dir / "trace" / f"rank{rank}.pt.trace.json.gz"  # TensorBoard's name
        self.trace = ExitStack()
        self.steps, self.loss = 0, math.inf  # of this start
        self.batch: Batch | None = None

    def batches(
        self, loader: TrainLoader, epoch: int, first: int, noise: float
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch from its step ``first`` on.

        With ``one_batch`` each is the first batch of the run.
        """
        batches: Iterable[Batch] = loader.epoch(epoch, first, noise)
        if self.settings.one_batch:
            batches = repeat(self.batch or self._first(loader), len(loader.order) - first)
        for batch in batches:
            if self.settings.trace and self.steps == UNTRACED:
                self.trace.enter_context(traced(self.path))
            elif self.steps == UNTRACED + self.settings.trace:
                self.trace.close()
            self.steps += 1
            yield batch

    def _first(self, loader: TrainLoader) -> Batch:
        batch = next(iter(loader.epoch(0, 0, 0.0)))
        images, labels = batch.images.clone(), batch.labels.clone()
        self.batch = replace(batch, images=images, labels=labels, waited=0.0)
        return self.batch

    def learned(self, loss: float) -> bool:
        """Note the loss of a step, equal on all ranks; return whether the training should end."""
        self.loss = loss
        return self.settings.one_batch and loss < NEAR_ZERO

    def end(self, step: int) -> dict[str, str]:
        """End the trace; return rows that say what was found."""
        self.trace.close()
        rows: dict[str, str] = {}
        if self.settings.one_batch:
            reached = self.loss < NEAR_ZERO
            found = "learns one batch" if reached else "does not learn one batch"
            sign = "<" if reached else ">"
            loss = f"loss {self.loss:.4f} {sign} {NEAR_ZERO} at step {step}"
            rows["overfit"] = f"the net {found}: {loss}"
        if self.settings.trace:
            rows["trace"] = f"{self.path.parent}, for https://ui.perfetto.dev or TensorBoard"
        return rows
