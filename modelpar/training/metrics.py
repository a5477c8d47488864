"""Exact top-1 and top-5 error: integer counts over every sample once."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from modelpar.distributed import all_reduce_sum

TOP: Final = 5


def rank_of_label(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes stand before each of N labels, by ``scores`` (N, classes).

    Of equals the one with the lower number comes first, as if all were sorted.  One that is not a
    number comes last.
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
        self.counts = torch.zeros(3, dtype=torch.int64)  # right in 1, right in 5, samples
        self.loss = torch.zeros(1, dtype=torch.float64)

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch: (N, classes) log-probabilities and N labels.

        An answer is right within k if fewer than k classes are more probable, see ``places``; one
        that is not a number is wrong.
        """
        place = rank_of_label(log_probabilities, labels)
        right = [int((place < 1).sum()), int((place < TOP).sum()), len(labels)]
        self.counts += torch.tensor(right, dtype=torch.int64)
        self.loss += functional.nll_loss(log_probabilities.double(), labels, reduction="sum").cpu()

    def result(self, group: ProcessGroup | None, device: torch.device) -> Errors:
        """Return the errors over all that ``group`` counted; a collective of it (None: own)."""
        one, five, samples = all_reduce_sum(self.counts.to(device), group).tolist()
        loss = all_reduce_sum(self.loss.to(device), group).item()
        return Errors(
            top1=100 * (samples - one) / samples,
            top5=100 * (samples - five) / samples,
            loss=loss / samples,
            samples=samples,
        )
