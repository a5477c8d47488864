"""The net on its devices, one training step and one evaluation, in one process or many."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from modelpar.device import CompileError
from modelpar.distributed import Mesh, all_reduce_sum, comm_errors, unaveraged
from modelpar.errors import say
from modelpar.images.augment import Augmentation
from modelpar.images.loader import Batch
from modelpar.net.alexnet import AlexNet, Column
from modelpar.net.exchange import Link
from modelpar.net.four_layer import FourLayer, Torchvision, whole_net
from modelpar.net.layers import DropoutSeed, fix_dropout, select_masks
from modelpar.net.plan import Plan
from modelpar.settings import RankSettings, TrainSettings
from modelpar.training.graph import Graphed
from modelpar.training.metrics import ErrorCount, Errors
from modelpar.training.optimizer import MomentumDecay
from modelpar.training.schedule import Schedule, run_length

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
        # On an H100 a column took 2.3 ms for 128 images in two chunks, 1.8 ms in one.
        chunks = crossing.chunks or (1 if mesh.device.type == "cuda" else 2)
        link = Link.between(mesh.pair, dtype=wire, overlap=crossing.overlap, chunks=chunks)
        net = Column(plan, link, seed)
    dtype = getattr(torch, settings.precision)
    net.to(mesh.device, torch.promote_types(dtype, torch.float32))
    if settings.channels_last:
        net.to(memory_format=torch.channels_last)
    return net


def compile_parts(
    mesh: Mesh, parts: Sequence[AlexNet | Column | MomentumDecay | Augmentation]
) -> bool:
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

    A collective of the world.
    """

    def __init__(self, plan: Plan, settings: TrainSettings, mesh: Mesh) -> None:
        self.mesh, self.batch_size, self.seed = mesh, settings.batch_size, settings.seed
        self.recipe, self.parts = plan.recipe, settings.accumulate
        self.net = build(plan, mesh, settings, settings.seed)
        self.link = self.net.link if isinstance(self.net, Column) else None  # to the other column
        names = [name for name, _ in self.net.named_parameters()]  # of this column
        self.schedule = Schedule(plan.recipe, run_length(settings), names)
        dtype = getattr(torch, settings.precision)
        self.optimizer = MomentumDecay(self.net, plan.recipe, dtype, plan.decays)
        nets = [self.net] if isinstance(self.net, (AlexNet, Column)) else []
        self.compiled = settings.compile and compile_parts(mesh, [*nets, self.optimizer])
        self.replicated = mesh.data_parallel(self.net)
        self.last_logits = torch.empty(0)  # of the last step, (N, classes), with its dropout
        self.good = torch.ones((), dtype=torch.int32, device=mesh.device)  # see ``step``
        self.run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._step
        # The steps of replicas cannot be recorded, because of DistributedDataParallel's hooks.
        # Exchanges in a graph were not tested on two GPUs, so ``auto`` does not record a pair.
        # Nor were these rules, see ``checks``.
        untested = self.parts > 1 or self.recipe.clip or self.recipe.ema
        fused = self.compiled and any(net.blocks.fused for net in nets) and not untested
        graphs = {"on": True, "auto": mesh.pair is None, "off": False}[settings.cuda_graph]
        if fused and mesh.replicas == 1 and graphs:
            self.run = Graphed(self._step, self.link)
            mesh.closing.callback(self.run.close)

    def step(
        self,
        batch: Batch,
        step: int,
        rates: dict[str, float],
        see: Callable[[], None] | None = None,
    ) -> Tensor:
        """Train on one batch; return its mean loss over this replica, a scalar.

        ``step`` counts from 0 and fixes the dropout masks; ``rates`` are by parameter.  Where the
        loss or a gradient of any rank is not finite, ``good`` becomes 0 on all ranks, and neither
        this step nor a later one changes a weight.  On a GPU the host does not wait, and the next
        step may overwrite the loss.  ``see`` is called while the net has the step's gradients.  A
        collective of the whole mesh.
        """
        self._draw_masks(step)
        self.optimizer.set_rates(rates)
        with comm_errors("gradients"):  # DistributedDataParallel averages them
            loss, self.last_logits = self.run(batch.images, batch.labels)
        if see:
            see()
        if not isinstance(self.run, Graphed) or self.run.graph is None:
            self.optimizer.zero_grad(set_to_none=True)  # a recorded backward keeps its gradients
        return loss

    def gradients(self, batch: Batch, step: int) -> Tensor:
        """Do forward and backward; return the mean loss.  Weights do not change."""
        self._draw_masks(step)
        with comm_errors("gradients"):
            loss, self.last_logits = self.backward(batch.images, batch.labels)
        return loss

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = self.backward(images, labels)
        self._check_finite(loss)
        if self.recipe.clip:
            self._clip()
        self.optimizer.step(self.good)
        return loss, logits

    def backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Do forward and backward of images (N, 3, S, S) and labels (N,), in ``parts`` parts.

        The gradients are those of the mean over the batch.  Returns this mean loss, a scalar, and
        the logits (N, classes).  A collective of the mesh.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.parts == 1:
            return self._backward(images, labels)
        size, first = len(images) // self.parts, self.mesh.replica * len(images)
        losses, logits = list[Tensor](), list[Tensor]()
        for at in range(0, len(images), size):
            part = slice(at, at + size)
            select_masks(self.net, slice(first + at, first + at + size))
            with unaveraged(self.replicated) if part.stop < len(images) else nullcontext():
                loss, scores = self._backward(images[part], labels[part])
            losses.append(loss)
            logits.append(scores)
        for gradient in self._gradients():
            gradient.div_(self.parts)
        return torch.stack(losses).mean(), torch.cat(logits)

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradients of a batch, or of one part of it, to those of the weights."""
        logits = self.replicated(images)
        smoothing = self.recipe.label_smoothing
        loss = functional.cross_entropy(_wide(logits), labels, label_smoothing=smoothing)
        loss.backward()
        return loss.detach(), logits.detach()

    @torch.no_grad()
    def _check_finite(self, loss: Tensor) -> None:
        """Set ``good`` to 0 if the loss or a gradient of any rank is not finite."""
        gradients = self._gradients()
        if loss.is_cuda:  # the largest absolute value is finite if all values are
            finite = get_total_norm(gradients, torch.inf).isfinite() & loss.isfinite()
        else:
            finite = torch.tensor(all_finite([loss, *gradients]), device=loss.device)
        count = all_reduce_sum(self._sum_of_columns(finite.long()), self.mesh.replica_group)
        self.good.mul_(count == self.mesh.world_size)

    @torch.no_grad()
    def _clip(self) -> None:
        """Scale the gradients to a norm of at most ``recipe.clip``, as torch does.

        The norm is that of both columns; replicas have the same.  Where it overflows ``good``
        becomes 0.
        """
        own = get_total_norm(self._gradients())
        norm = self._sum_of_columns(own.double().square()).sqrt()
        self.good.mul_(norm.isfinite())
        # In the dtype of the gradients, in which torch's own clipping has it.
        clip_grads_with_norm_(self.net.parameters(), self.recipe.clip, norm.to(own.dtype))

    def _gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.net.parameters() if weight.grad is not None]

    def _sum_of_columns(self, value: Tensor) -> Tensor:
        """Return the sum of a number of 8 bytes over the columns.  A collective of the pair."""
        if self.link is None:
            return value
        received, wait = self.link.transport(value)
        wait()
        return value + received

    def _draw_masks(self, step: int) -> None:
        first, images = self.mesh.replica * self.batch_size, self.mesh.replicas * self.batch_size
        rows = slice(first, first + self.batch_size)  # of this replica
        if not self.net.training:
            self.net.train()
        fix_dropout(self.net, DropoutSeed(self.seed, step, rows, images))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds: the net's updated weights and means, velocities, ema."""
        weights, averages = (
            self.net.state_dict() | self.optimizer.weights(),
            self.optimizer.averages,
        )
        state = {"weights": weights, "velocities": self.optimizer.velocities()}
        return {**state, "ema": dict(averages)} if averages else state

    def load(
        self,
        weights: Mapping[str, Tensor],
        velocities: Mapping[str, Tensor],
        ema: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Restore what ``state`` returned; without ``ema`` the averages begin at the weights."""
        self.net.load_state_dict(weights)
        self.optimizer.load(weights, velocities, ema)

    def averaged(self) -> "Averaged":
        """Return a net that computes with the moving averages of the weights (``recipe.ema``)."""
        return Averaged(self.net, self.optimizer.averages)


class Averaged(nn.Module):
    """A net with other weights, which are rounded to its dtype; its own do not change."""

    def __init__(self, net: Net, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.net = net
        # Some layers ask for a Parameter; a dict does not make them this module's.
        self.held: dict[str, Tensor] = {
            name: nn.Parameter(weights[name].to(weight.dtype), requires_grad=False)
            for name, weight in net.named_parameters()
        }

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of ``images`` (N, 3, S, S)."""
        return functional_call(self.net, self.held, (images,))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether every number in ``tensors`` is finite."""
    return all(bool(end.isfinite()) for one in tensors for end in one.aminmax())


def _wide(logits: Tensor) -> Tensor:
    """Return the logits in the precision of the loss: float64 as they are, else float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def log_probabilities(
    net: nn.Module, stored: Tensor, augmentation: Augmentation, views: int
) -> Tensor:
    """Return the log-probabilities (N, classes) of stored images (N, 3, T, T).

    ``views`` 1: of the central crop; 10 and 9: of the mean probabilities of the ten views
    (section 4.1) or of the nine that the code had for CIFAR.  A collective of the pair.
    """
    net.eval()
    several = {9: augmentation.nine_crop, 10: augmentation.ten_crop}
    crops = [augmentation.center_crop(stored)] if views == 1 else several[views](stored)
    each = [functional.log_softmax(_wide(net(images)), dim=1) for images in crops]
    return torch.stack(each).logsumexp(0) - math.log(len(each))


def evaluate(
    net: nn.Module,
    mesh: Mesh,
    batches: Iterable[tuple[Tensor, Tensor]],
    augmentation: Augmentation,
    groups: Sequence[int],
    views: int = 1,
    *,
    confusion: Tensor | None = None,
) -> Errors:
    """Return the exact errors over ``batches`` of stored images; each replica has its share.

    ``groups`` are those of all test images, see ``ImageSet``.  Adds this replica's predictions to
    ``confusion`` (C, C): rows are true classes, columns predicted ones.  A collective of the whole
    mesh.
    """
    count = ErrorCount(groups, mesh.replica, mesh.replicas)
    for stored, labels in batches:
        scores = log_probabilities(net, stored, augmentation, views)
        count.add(scores, labels)
        if confusion is not None:
            cells = (labels.cpu(), scores.argmax(1).cpu())
            confusion.index_put_(cells, torch.ones_like(cells[0]), accumulate=True)
    return count.result(mesh.replica_group, mesh.device)
