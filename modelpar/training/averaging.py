"""The average of several nets: its errors beside those of each net, and the weights of the nets.

Table 2 of the paper: the mean of five similar nets, and of seven of which two had been trained on
more images.  ``avg-valid.py`` of the released code searches the weights on validation images.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from modelpar.distributed import Mesh, all_reduce_sum
from modelpar.images.augment import Augmentation
from modelpar.images.loader import TestLoader
from modelpar.images.samples import ImageSet
from modelpar.seeding import generator
from modelpar.training.engine import Net, log_probabilities
from modelpar.training.metrics import TOP, ErrorCount, Errors, rank_of_label

# The numbers of ``find_coeffs`` in avg-valid.py: each coefficient is one of 0, 0.05, ..., 1.
STEPS: Final = 20
START: Final = 0.5
PASSES: Final = 5


@dataclass(frozen=True)
class Member:
    """One net of an average, with the images that it sees and how it sees them."""

    net: Net
    images: ImageSet
    augmentation: Augmentation


@dataclass(frozen=True)
class Pass:
    """How several nets see the same test images."""

    members: Sequence[Member]
    mesh: Mesh
    batch_size: int
    views: int
    workers: int

    def answers(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield log-probabilities (nets, N, classes) and labels (N,) of the test images ``rows``.

        Images of one size are read once for all nets.  A collective of the whole mesh.
        """
        mesh, sets = self.mesh, {one.images.fingerprint: one.images for one in self.members}
        how: Any = {"rows": rows, "workers": self.workers}
        loaders = [TestLoader(one.test, self.batch_size, mesh, **how) for one in sets.values()]
        for batches in zip(*loaders, strict=True):
            stored = {key: batch[0] for key, batch in zip(sets, batches, strict=True)}
            each = [
                log_probabilities(
                    one.net, stored[one.images.fingerprint], one.augmentation, self.views
                )
                for one in self.members
            ]
            yield torch.stack(each), batches[0][1]

    def errors(self, rows: Sequence[int], weights: Sequence[float]) -> tuple[list[Errors], Errors]:
        """Return the errors of each net, and of their mean probabilities with these ``weights``.

        A collective of the whole mesh.
        """
        mesh, groups = self.mesh, self.members[0].images.groups
        chosen = [groups[row] for row in rows]
        counts = [ErrorCount(chosen, mesh.replica, mesh.replicas) for _ in (*self.members, "mean")]
        for each, labels in self.answers(rows):
            logs = torch.tensor(weights, dtype=each.dtype, device=each.device).log()
            mean = (each + logs[:, None, None]).logsumexp(0)
            for count, answers in zip(counts, (*each, mean), strict=True):
                count.add(answers, labels)
        *members, average = [count.result(mesh.replica_group, mesh.device) for count in counts]
        return members, average

    def search(self, rows: Sequence[int]) -> list[float]:
        """Return the weights that are best on the images ``rows``.

        A collective of the whole mesh.
        """
        parts = list(self.answers(rows))
        answers = torch.cat([each for each, _ in parts], 1).exp()
        return search(answers, torch.cat([labels for _, labels in parts]), self.mesh)


def search(probabilities: Tensor, labels: Tensor, mesh: Mesh) -> list[float]:
    """Return weights, with sum 1, for ``probabilities`` (nets, N, classes) of labels (N,).

    One coefficient after the other takes the value with the fewest errors, until nothing changes.

    Differs: avg-valid.py counts top-5 errors only.  Here top-1 errors decide between equal counts,
    since with few classes most top-5 errors are zero.  A collective of the replicas.
    """

    def wrong(coefficients: Sequence[float]) -> list[float]:
        weights = torch.tensor(coefficients).to(probabilities)
        place = rank_of_label(torch.tensordot(weights, probabilities, 1), labels)
        counts = torch.stack([(place >= TOP).sum(), (place > 0).sum()])
        return all_reduce_sum(counts.double(), mesh.replica_group).tolist()

    found = [START] * len(probabilities)
    fewest = wrong(found)
    for _ in range(PASSES):
        before = fewest
        for net in range(len(found)):
            for step in range(STEPS + 1):
                trial = [*found[:net], step / STEPS, *found[net + 1 :]]
                if any(trial) and (count := wrong(trial)) < fewest:
                    found, fewest = trial, count
        if fewest == before:
            break
    return [one / math.fsum(found) for one in found]


def split(groups: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Return the numbers of at least ``count`` test images to search on, and of the others.

    Whole groups are drawn at random, always the same, so the two parts are independent.
    """
    sizes = Counter(groups)
    numbers = sorted(sizes)
    searched, taken = set[int](), 0
    for place in torch.randperm(len(numbers), generator=generator(0, "search")).tolist():
        if taken >= count:
            break
        searched.add(numbers[place])
        taken += sizes[numbers[place]]
    parts: tuple[list[int], list[int]] = ([], [])
    for row, group in enumerate(groups):
        parts[group not in searched].append(row)
    return parts
