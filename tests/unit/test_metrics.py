"""Errors are exact counts."""

import math

import pytest
import torch

from modelpar.training.metrics import ErrorCount

CPU = torch.device("cpu")


def test_errors_are_those_of_a_full_sort() -> None:
    answers = torch.randn(200, 12).log_softmax(1)
    labels = torch.randint(0, 12, (200,))
    count = ErrorCount(range(200))
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
    share = found.top1 / 100
    assert found.standard_error == pytest.approx(100 * math.sqrt(share * (1 - share) / 199))


def test_standard_error_counts_images_of_one_group_as_dependent() -> None:
    wrong = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0, 0]).bool()
    groups = [5, 5, 5, 2, 2, 2, 9, 9, 7]  # in any order; the groups have 3, 3, 2 and 1 images
    answers = torch.stack([wrong.float(), 1 - wrong.float()], 1).log_softmax(1)
    whole = ErrorCount(groups)
    whole.add(answers, torch.ones(9, dtype=torch.long))
    found = whole.result(None, CPU)
    mean = 4 / 9
    sums = [3 - 3 * mean, 0 - 3 * mean, 1 - 2 * mean, 0 - mean]
    expected = 100 * math.sqrt(4 / 3 * sum(each**2 for each in sums)) / 9
    assert found.standard_error == pytest.approx(expected)
    parts = [ErrorCount(groups, replica, 2) for replica in range(2)]
    for replica, part in enumerate(parts):  # as two replicas count, in batches
        for first in range(replica, 9, 4):
            part.add(
                answers[first : first + 4 : 2],
                torch.ones(len(answers[first : first + 4 : 2])).long(),
            )
    assert torch.equal(parts[0].by_group + parts[1].by_group, whole.by_group)


def test_equal_scores_rank_in_class_order() -> None:
    count = ErrorCount(range(7))
    count.add(torch.zeros(7, 7).log_softmax(1), torch.arange(7))
    found = count.result(None, CPU)
    assert found.top1 == pytest.approx(100 * 6 / 7)
    assert found.top5 == pytest.approx(100 * 2 / 7)


def test_nan_counts_as_wrong() -> None:
    count = ErrorCount(range(4))
    count.add(torch.full((4, 10), math.nan), torch.zeros(4, dtype=torch.long))
    found = count.result(None, CPU)
    assert (found.top1, found.top5) == (100.0, 100.0)
