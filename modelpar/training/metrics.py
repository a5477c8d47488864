"""Exact top-1 and top-5 errors, counted over every sample once, and the rows that record them."""

import json
import logging
from collections.abc import Sequence
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
    """An evaluation's outcome: errors in %, mean loss in nats, over ``samples`` images.

    ``standard_error`` is that of ``top1`` in %, for the choice of the test images.
    """

    top1: float
    top5: float
    loss: float
    samples: int
    standard_error: float

    @property
    def text(self) -> str:
        """The errors in words, with enough digits to compare two evaluations."""
        return (
            f"top-1 error {self.top1:.4f} % (standard error {self.standard_error:.2f} %), "
            f"top-5 error {self.top5:.4f} %, loss {self.loss:.6f}"
        )


def standard_error(wrong: Tensor, sizes: Tensor) -> float:
    """Return the standard error in % of an error over groups of images, each with its own errors.

    ``wrong`` and ``sizes`` (G,): wrong answers and images of each group.  Groups are independent
    and the images of one are not: the clustered standard error of arXiv 2411.00640, section 2.2,
    times sqrt(G / (G - 1)) as the mean is estimated.  With one image in each group that is the
    binomial standard error sqrt(p (1 - p) / (N - 1)).
    """
    samples, groups = sizes.sum(), int((sizes > 0).sum())
    residuals = wrong - sizes * (wrong.sum() / samples)
    variance = residuals.square().sum() * groups / max(groups - 1, 1)
    return float(100 * variance.sqrt() / samples)


class ErrorCount:
    """Counts right answers and sums losses, so that any split of the samples adds up exactly.

    ``groups``: for each sample of all replicas its number of a group; a replica adds the samples
    ``replica``, ``replica + replicas`` and so on, in this order.
    """

    def __init__(self, groups: Sequence[int], replica: int = 0, replicas: int = 1) -> None:
        self.groups = torch.tensor(groups[replica::replicas])
        self.sums = torch.zeros(3, dtype=torch.float64)  # right in 1, right in 5, loss
        self.by_group = torch.zeros(max(groups) + 1, 2, dtype=torch.float64)  # wrong, samples

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch: (N, classes) log-probabilities and N labels.

        An answer is right within k if fewer than k classes rank before the label; NaN is wrong.
        """
        place = rank_of_label(log_probabilities, labels).cpu()
        loss = functional.nll_loss(log_probabilities.double(), labels, reduction="sum")
        right = [int((place < 1).sum()), int((place < TOP).sum())]
        self.sums += torch.tensor([*right, float(loss)], dtype=torch.float64)
        groups, self.groups = self.groups.tensor_split([len(labels)])
        wrong = torch.stack([place > 0, torch.ones_like(place)], 1)
        self.by_group.index_add_(0, groups, wrong.double())

    def result(self, group: ProcessGroup | None, device: torch.device) -> Errors:
        """Return the errors over all samples that ``group`` counted; None: this process alone.

        A collective of ``group``.
        """
        counted = torch.cat([self.sums, self.by_group.flatten()])
        counted = all_reduce_sum(counted.to(device), group).cpu()
        (one, five, loss), by_group = counted[:3].tolist(), counted[3:].view(-1, 2)
        samples = int(by_group[:, 1].sum())
        top1, top5 = (100 * (samples - right) / samples for right in (one, five))
        return Errors(top1, top5, loss / samples, samples, standard_error(*by_group.T))


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; a damaged line is skipped."""
    path, rows = run_dir / METRICS, list[dict[str, Any]]()
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows.append({**row, "kind": row["kind"], "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            logging.getLogger(__name__).warning("%s: skipped a damaged line", path)
    return rows


def evaluations(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of a run's evaluations by step; of several at one step the last."""
    return {row["step"]: row for row in read_rows(run_dir) if row["kind"] == "test"}
