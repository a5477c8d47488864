"""What a run shows of its net: activations, gradients, wrong predictions, neighbouring images.

Both columns of the first replica take part, since each holds half of it.  They exchange this data
at evaluations only, and even after TensorBoard has failed on rank 0, since it is a collective.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from modelpar.analysis.activations import ActivationStats, Activity
from modelpar.analysis.histograms import SAMPLE, Histogram, gathered, sample
from modelpar.analysis.neighbours import evenly_spaced, features
from modelpar.distributed import Mesh, all_reduce_sum
from modelpar.images.augment import Augmentation
from modelpar.images.loader import TestLoader
from modelpar.images.samples import Images
from modelpar.net import paper
from modelpar.net.plan import Plan
from modelpar.net.weights import split
from modelpar.training.engine import Net

STATS_IMAGES: Final = 64  # test images whose activations are summarized
EMBEDDED: Final = 200  # test images; the projector's own analysis is exact up to 200 dimensions
MOST_CLASSES: Final = paper.NUM_CLASSES  # whose answers are counted: 8 MB


@dataclass(frozen=True)
class Embedding:
    """Stored test images (N, 3, T, T), their labels, and the scalar products of their units.

    ``products`` (N, N) are of the units of the last hidden layer, fc7, of both columns.
    """

    images: Tensor
    labels: list[int]
    products: Tensor


@dataclass(frozen=True)
class Seen:
    """What is shown beside the errors of an evaluation; the last two only at the end of a run."""

    activity: list[Activity]
    histograms: list[Histogram]
    confusion: Tensor | None = None
    embedding: Embedding | None = None


class Watch:
    """Collects what ``Seen`` holds of a net; ``on``: whether the run shows it.

    ``test``: the test images, as they are stored, of which ``batch_size`` fit into memory.
    """

    def __init__(
        self,
        net: Net,
        plan: Plan,
        mesh: Mesh,
        test: Images,
        augmentation: Augmentation,
        batch_size: int,
        *,
        on: bool,
    ) -> None:
        self.net, self.plan, self.mesh = net, plan, mesh
        self.test, self.augmentation, self.batch_size = test, augmentation, batch_size
        self.on = on
        self.first = on and mesh.replica == 0
        self.gradients: dict[str, list[Tensor]] = {}  # by weight, of each column here
        self.confusion: Tensor | None = None

    def see_gradients(self) -> None:
        """Copy a few of the weights' gradients, which are of the step before an evaluation."""
        state = {
            name: weight.grad
            for name, weight in self.net.named_parameters()
            if name.endswith(".weight") and weight.grad is not None
        }
        whole = self.mesh.pair is None and self.plan.columns > 1
        columns = split(state) if whole else [state]
        self.gradients = {
            name.removesuffix(".weight"): [sample(each[name]) for each in columns]
            for name in state
        }

    def counts(self) -> Tensor | None:
        """Return zeros, to which the evaluation at the end of the run adds its answers."""
        classes = self.plan.num_classes
        if self.on and classes <= MOST_CLASSES:
            self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        return self.confusion

    def result(self, *, ends: bool) -> Seen:
        """Return what to show after an evaluation, which has put the net in evaluation mode.

        The columns send each other half a kilobyte for each layer.  ``ends``: it ends the run.  A
        collective of the mesh.
        """
        activity: list[Activity] = []
        histograms: list[Histogram] = []
        confusion = self.confusion
        if self.first:
            batches = self._some(STATS_IMAGES)
            kept = SAMPLE // len(batches)
            with ActivationStats(self.net, self.plan.columns, self.mesh, kept) as stats:
                for batch, _ in batches:
                    features(self.net, self.augmentation.center_crop(batch))
            activity = stats.result()
            samples = {f"units_histogram/{name}": some for name, some in stats.samples.items()}
            samples |= {f"weights_gradient/{name}": some for name, some in self.gradients.items()}
            histograms = gathered(samples, self.plan.columns, self.mesh)
        if confusion is not None:
            confusion = all_reduce_sum(
                confusion.to(self.mesh.device), self.mesh.replica_group
            ).cpu()
        embedding = self._embedding() if ends and self.first else None
        self.gradients, self.confusion = {}, None
        return Seen(activity, histograms, confusion, embedding)

    def _some(self, count: int) -> TestLoader:
        rows = evenly_spaced(len(self.test), count)
        return TestLoader(self.test, self.batch_size, self.mesh, rows=rows)

    def _embedding(self) -> Embedding:
        """Return the projector's images.

        Each column has half of the units, and the scalar products are the sum of both columns'.
        They give all distances, with a fifth of the bytes of the units.  A collective of the
        pair.
        """
        stored: list[Tensor] = []
        labels: list[int] = []
        units: list[Tensor] = []
        for batch, some in self._some(EMBEDDED):
            units.append(features(self.net, self.augmentation.center_crop(batch))[1].double())
            stored.append(batch.cpu())
            labels += some.tolist()
        wide = torch.cat(units)
        products = all_reduce_sum(wide @ wide.T, self.mesh.pair).cpu()
        return Embedding(torch.cat(stored), labels, products)


def points(products: Tensor) -> Tensor:
    """Return points (N, D) with the distances of vectors of these scalar products (N, N).

    D is at most N - 1.  The axes are those of a principal component analysis, widest first.
    """
    centred = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()
    values, vectors = torch.linalg.eigh(centred)
    kept = values > 1e-9 * values[-1].clamp(min=1e-30)
    return (vectors[:, kept] * values[kept].sqrt()).flip(1).float()
