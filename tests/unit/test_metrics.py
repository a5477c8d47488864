"""Errors are exact counts."""

import math

import pytest
import torch

from modelpar.training.metrics import ErrorCount

CPU = torch.device("cpu")


def test_errors_are_those_of_a_full_sort() -> None:
    answers = torch.randn(200, 12).log_softmax(1)
    labels = torch.randint(0, 12, (200,))
    count = ErrorCount()
    for first in range(0, 200, 64):
        count.add(answers[first : first + 64], labels[first : first + 64])
    found = count.result(None, CPU)
    top = answers.argsort(1, descending=True)
    assert found.top1 == 100 * float((top[:, 0] != labels).double().mean())
    assert found.top5 == pytest.approx(
        100 * float((top[:, :5] != labels[:, None]).all(1).double().mean())
    )
    assert found.loss == pytest.approx(-float(answers.double().gather(1, labels[:, None]).mean()))
    assert found.samples == 200


def test_equal_scores_rank_in_class_order() -> None:
    count = ErrorCount()
    count.add(torch.zeros(7, 7).log_softmax(1), torch.arange(7))
    found = count.result(None, CPU)
    assert found.top1 == pytest.approx(100 * 6 / 7)
    assert found.top5 == pytest.approx(100 * 2 / 7)


def test_nan_counts_as_wrong() -> None:
    count = ErrorCount()
    count.add(torch.full((4, 10), math.nan), torch.zeros(4, dtype=torch.long))
    found = count.result(None, CPU)
    assert (found.top1, found.top5) == (100.0, 100.0)
