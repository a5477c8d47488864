"""Exact top-1 and top-5 errors, counted over every sample once, and the rows that record them."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from modelpar.distributed import all_reduce_sum

METRICS: Final = "metrics.jsonl"  # in a run directory
TOP: Final = 5


def rank_of_label(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes rank before each of N labels, by ``scores`` (N, classes).

    Of equal scores the class with the lower number ranks first, as in a stable sort.  NaN ranks
    last.
    """
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=labels.device)
    ahead = ~(scores <= own) | ((scores == own) & (classes < labels[:, None]))
    return ahead.sum(1)


@dataclass(frozen=True)
class Errors:
    """An evaluation's outcome: errors in %, mean loss in nats, over ``samples`` images."""

    top1: float
    top5: float
    loss: float
    samples: int


class ErrorCount:
    """Counts right answers and sums losses, so that any split of the samples adds up exactly."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)  # right in 1, right in 5, samples, loss

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch: (N, classes) log-probabilities and N labels.

        An answer is right within k if fewer than k classes rank before the label; NaN is wrong.
        """
        place = rank_of_label(log_probabilities, labels)
        loss = functional.nll_loss(log_probabilities.double(), labels, reduction="sum")
        right = [int((place < 1).sum()), int((place < TOP).sum())]
        self.sums += torch.tensor([*right, len(labels), float(loss)], dtype=torch.float64)

    def result(self, group: ProcessGroup | None, device: torch.device) -> Errors:
        """Return the errors over all samples that ``group`` counted; None: this process alone.

        A collective of ``group``.
        """
        one, five, samples, loss = all_reduce_sum(self.sums.to(device), group).tolist()
        wrong1, wrong5 = samples - one, samples - five
        return Errors(100 * wrong1 / samples, 100 * wrong5 / samples, loss / samples, int(samples))


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; a damaged line is skipped."""
    path, rows = run_dir / METRICS, list[dict[str, Any]]()
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows.append({**row, "kind": row["kind"], "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            logging.getLogger(__name__).warning("%s: skipped a damaged line", path)
    return rows


def top1_errors(run_dir: Path) -> dict[int, float]:
    """Return the top-1 errors in % of a run's evaluations, by step."""
    return {row["step"]: row["top1"] for row in read_rows(run_dir) if row["kind"] == "test"}
