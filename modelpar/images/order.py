"""The order of samples: a pure function of seed, epoch and position, so a run can resume in it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from modelpar.errors import SettingsError
from modelpar.seeding import generator


class BatchOrder:
    """The sample numbers of each batch of one replica.

    Global batch k holds ``batch_size * replicas`` consecutive positions of the epoch's order,
    and replica r takes the r-th ``batch_size`` of them.  Raises SettingsError if the data has less
    than one global batch.

    Differs: an incomplete last batch is dropped.  The code kept it (data.cu).
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
        self.num_samples, self.batch_size = num_samples, batch_size
        self.seed, self.shuffle = seed, shuffle
        self.replica, self.replicas = replica, replicas
        if len(self) < 1:
            raise SettingsError(
                f"batch_size={batch_size}: one step needs {batch_size * replicas} images "
                f"(batch_size * replicas), but the data has only {num_samples}; use a "
                "smaller batch_size"
            )

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return self.num_samples // (self.batch_size * self.replicas)

    def positions(self, batch: int) -> slice:
        """Return the positions in the epoch's order that ``batch`` of this replica holds."""
        first = (batch * self.replicas + self.replica) * self.batch_size
        return slice(first, first + self.batch_size)

    def samples(self, epoch: int) -> Tensor:
        """Return the order of the samples in ``epoch``: a permutation of 0..N-1.

        ``shuffle``: ``once`` uses the same permutation in each epoch, ``every_epoch`` a new one,
        and ``never`` keeps the order of the data set.

        Differs: the released code shuffled its files once, when it wrote them, and then always
        read them in that order; here the seed determines the order of ``once``.
        """
        if self.shuffle == "never":
            return torch.arange(self.num_samples)
        source = generator(self.seed, "order", epoch if self.shuffle == "every_epoch" else 0)
        return torch.randperm(self.num_samples, generator=source)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Yield the sample numbers of each batch of ``epoch`` from batch ``start``."""
        samples = self.samples(epoch)
        for batch in range(start, len(self)):
            yield samples[self.positions(batch)]
