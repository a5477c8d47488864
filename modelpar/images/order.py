"""The order of samples: a pure function of seed, epoch and position, so that it can be resumed."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from modelpar.errors import SettingsError
from modelpar.seeding import generator


def sample_order(seed: int, epoch: int, num_samples: int, shuffle: str) -> Tensor:
    """Return the samples of ``epoch`` (from 0) in their order: a permutation of 0..N-1.

    Differs: the released code read its files in one fixed order, shuffled once when they were
    made; here the seed does that with ``shuffle="once"``.  ``every_epoch`` draws a new order for
    each epoch, ``never`` keeps that of the set.
    """
    if shuffle == "never":
        return torch.arange(num_samples)
    source = generator(seed, "order", epoch if shuffle == "every_epoch" else 0)
    return torch.randperm(num_samples, generator=source)


class BatchOrder(Sampler[list[int]]):
    """The batches of one replica in one epoch, from ``start`` on.

    Global batch k holds the positions k * batch_size * replicas onwards of the epoch's order, and
    replica r the r-th ``batch_size`` of them; a ragged last batch is dropped.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        *,
        replica: int = 0,
        replicas: int = 1,
        shuffle: str = "once",
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.replica = replica
        self.replicas = replicas
        self.shuffle = shuffle
        self.epoch = 0
        self.start = 0
        if len(self) < 1:
            raise SettingsError(
                f"batch_size={batch_size}: {batch_size * replicas} images a step, but the data "
                f"has only {num_samples}; give less"
            )

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return self.num_samples // (self.batch_size * self.replicas)

    def positions(self, batch: int) -> slice:
        """Return which positions of the epoch's order this replica's ``batch`` holds."""
        first = (batch * self.replicas + self.replica) * self.batch_size
        return slice(first, first + self.batch_size)

    def samples(self) -> Tensor:
        """Return the sample numbers of the whole epoch in their order."""
        return sample_order(self.seed, self.epoch, self.num_samples, self.shuffle)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the sample numbers of each batch from ``start`` to the epoch's end."""
        order = self.samples()
        for batch in range(self.start, len(self)):
            yield order[self.positions(batch)].tolist()
