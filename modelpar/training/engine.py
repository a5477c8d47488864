"""The net on its devices, one training step and one evaluation, in one process or many."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import get_total_norm

from modelpar.device import CompileError
from modelpar.distributed import Mesh, comm_errors
from modelpar.errors import say
from modelpar.images.augment import Augmentation
from modelpar.images.loader import Batch
from modelpar.net.alexnet import AlexNet, Blocks, Column
from modelpar.net.exchange import Link
from modelpar.net.four_layer import FourLayer, Torchvision, whole_net
from modelpar.net.layers import DropoutSeed, fix_dropout
from modelpar.net.plan import Plan
from modelpar.settings import RankSettings, TrainSettings
from modelpar.training.metrics import ErrorCount, Errors
from modelpar.training.optimizer import MomentumDecay
from modelpar.training.schedule import Schedule

Net = AlexNet | Column | FourLayer | Torchvision


def build(plan: Plan, mesh: Mesh, settings: RankSettings, seed: int) -> Net:
    """Return this process's part of the net on its device: a column, or the whole net.

    Weights are float32, or float64 with that precision.  With bfloat16 the optimizer or the
    evaluation rounds them.
    """
    crossing = settings.crossing
    if mesh.pair is None:
        net: Net = whole_net(plan, seed)
    else:
        wire = getattr(torch, crossing.dtype or settings.precision)
        link = Link.between(
            mesh.pair, dtype=wire, overlap=crossing.overlap, chunks=crossing.chunks
        )
        net = Column(plan, link, seed)
    dtype = getattr(torch, settings.precision)
    net.to(mesh.device, torch.promote_types(dtype, torch.float32))
    if settings.channels_last:
        net.to(memory_format=torch.channels_last)
    return net


def compile_parts(mesh: Mesh, parts: Sequence[Blocks | MomentumDecay]) -> bool:
    """Compile ``parts``, or none if that fails or gives other results on any rank.

    Returns whether they are compiled; if not, rank 0 prints the reason.  A collective of the
    world: replicas must round alike.
    """
    problem = ""
    try:
        for part in parts:
            part.compile()
    except CompileError as error:
        problem = str(error)
    problem = next(filter(None, mesh.gather_objects(problem)), "")
    if problem:
        for part in parts:
            part.run_eager()
        if mesh.rank == 0:
            say(f"torch.compile is not used and steps are slower ({problem})")
    return not problem


class Learner:
    """This process's part of the net with all that trains it: optimizer and learning rates.

    A collective of the world, which compares the replicas' weights.
    """

    def __init__(self, plan: Plan, settings: TrainSettings, mesh: Mesh) -> None:
        self.mesh, self.batch_size, self.seed = mesh, settings.batch_size, settings.seed
        self.net = build(plan, mesh, settings, settings.seed)
        self.link = self.net.link if isinstance(self.net, Column) else None  # to the other column
        names = [name for name, _ in self.net.named_parameters()]  # of this column
        self.schedule = Schedule(plan.recipe, settings.epochs or settings.data.epochs, names)
        dtype = getattr(torch, settings.precision)
        self.optimizer = MomentumDecay(self.net, plan.recipe, dtype, plan.decays)
        blocks = [self.net.blocks] if isinstance(self.net, (AlexNet, Column)) else []
        self.compiled = settings.compile and compile_parts(mesh, [*blocks, self.optimizer])
        self.replicated = mesh.data_parallel(self.net)
        self.last_logits = torch.empty(0)  # of the last step, (N, classes), with its dropout

    def step(self, batch: Batch, step: int, rates: dict[str, float]) -> Tensor:
        """Train on one batch; return its mean loss over this replica, a scalar.

        ``step`` counts from 0 and fixes the dropout masks.  A collective of the whole mesh.
        """
        loss = self.gradients(batch, step)
        self.update(rates)
        return loss

    def gradients(self, batch: Batch, step: int) -> Tensor:
        """Do forward and backward; return the mean loss.  Weights do not change."""
        with comm_errors("gradients"):  # DistributedDataParallel averages them
            logits = self.logits(batch, step, self.replicated)
            loss = functional.cross_entropy(_wide(logits), batch.labels)
            self.last_logits = logits.detach()
            loss.backward()
        return loss.detach()

    def logits(self, batch: Batch, step: int, net: nn.Module | None = None) -> Tensor:
        """Return the logits (N, classes) in training mode, with the dropout masks of ``step``."""
        first, images = self.mesh.replica * self.batch_size, self.mesh.replicas * self.batch_size
        rows = slice(first, first + self.batch_size)  # of this replica
        self.net.train()
        fix_dropout(self.net, DropoutSeed(self.seed, step, rows, images))
        return (net or self.net)(batch.images)

    def finite(self, loss: Tensor) -> bool:
        """Return whether ``loss`` and every gradient of this process are finite."""
        grads = [weight.grad for weight in self.net.parameters() if weight.grad is not None]
        return all_finite(grads) and bool(loss.isfinite().item())

    def update(self, rates: dict[str, float]) -> None:
        """Update the weights by their gradients and these learning rates."""
        self.optimizer.set_rates(rates)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds: the net's updated weights and means, and velocities."""
        weights = self.net.state_dict() | self.optimizer.weights()
        return {"weights": weights, "velocities": self.optimizer.velocities()}

    def load(self, weights: Mapping[str, Tensor], velocities: Mapping[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        self.net.load_state_dict(weights)
        self.optimizer.load(weights, velocities)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether every number in ``tensors`` is finite.

    The norm takes one pass.  If it is not finite each element is checked, which is forty times
    slower, since squares overflow before the numbers do.
    """
    if bool(get_total_norm(tensors).isfinite()):
        return True
    return all(bool(one.isfinite().all()) for one in tensors)


def _wide(logits: Tensor) -> Tensor:
    """Return the logits in the precision of the loss: float64 as they are, else float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def evaluate(
    net: Net,
    mesh: Mesh,
    batches: Iterable[tuple[Tensor, Tensor]],
    augmentation: Augmentation,
    views: int = 1,
) -> Errors:
    """Return the exact errors over ``batches`` of stored images; each replica has its share.

    ``views`` 1: the central crop; 10: the mean probabilities of the ten views (section 4.1).
    A collective of the whole mesh.
    """
    net.eval()
    count = ErrorCount()
    for stored, labels in batches:
        crops = [augmentation.center_crop(stored)] if views == 1 else augmentation.ten_crop(stored)
        each = [functional.log_softmax(_wide(net(images)), dim=1) for images in crops]
        count.add(torch.stack(each).logsumexp(0) - math.log(len(each)), labels)
    return count.result(mesh.replica_group, mesh.device)
