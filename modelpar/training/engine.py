"""The net on its devices, one training step and one evaluation, in one process or many."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import get_total_norm

from modelpar.device import CompileError
from modelpar.distributed import Mesh, comm_errors
from modelpar.errors import say
from modelpar.images.augment import Augmentation
from modelpar.images.loader import Batch
from modelpar.net.alexnet import AlexNet, Column
from modelpar.net.exchange import Link
from modelpar.net.four_layer import FourLayer, Torchvision, whole_net
from modelpar.net.layers import DropoutSeed
from modelpar.net.plan import Plan
from modelpar.settings import CrossingSettings, TrainSettings
from modelpar.training.metrics import ErrorCount, Errors
from modelpar.training.optimizer import MomentumDecay
from modelpar.training.schedule import Schedule

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
Net = AlexNet | Column | FourLayer | Torchvision


def build(
    plan: Plan,
    mesh: Mesh,
    precision: str,
    crossing: CrossingSettings,
    seed: int,
    *,
    channels_last: bool = True,
) -> Net:
    """Return this process's part of the net on its device: a column, or the whole net.

    Weights are float32, or float64 with that precision.  With bfloat16 the optimizer or the
    evaluation rounds them.
    """
    if mesh.pair is None:
        net: Net = whole_net(plan, seed)
    else:
        wire = DTYPES[crossing.dtype or precision]
        link = Link.between(
            mesh.pair, dtype=wire, overlap=crossing.overlap, chunks=crossing.chunks
        )
        net = Column(plan, link, seed)
    net.to(mesh.device, _wide(precision))
    if channels_last:
        net.to(memory_format=torch.channels_last)
    return net


def _wide(precision: str) -> torch.dtype:
    """Return the dtype of logits and loss, and of the weights that are updated."""
    return torch.float64 if precision == "float64" else torch.float32


class Part(Protocol):
    """Something that may be compiled: the blocks of a net, the optimizer."""

    def compile(self) -> None:
        """Compile; raises CompileError."""
        ...

    def run_eager(self) -> None:
        """Use nothing that is compiled."""
        ...


def compile_parts(mesh: Mesh, parts: Sequence[Part]) -> bool:
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
    problem = next(filter(None, mesh.gather_text(problem)), "")
    if problem:
        for part in parts:
            part.run_eager()
        if mesh.rank == 0:
            say(f"torch.compile is not used and steps are slower ({problem})")
    return not problem


# -- one step ------------------------------------------------------------------------------------


@dataclass
class Learner:
    """A net with all that trains it: optimizer, learning rates, mesh."""

    net: Net
    mesh: Mesh
    optimizer: MomentumDecay
    schedule: Schedule
    batch_size: int
    seed: int
    precision: str = "float32"
    compiled: bool = False

    @classmethod
    def create(
        cls, plan: Plan, settings: TrainSettings, mesh: Mesh, *, compiled: bool = False
    ) -> Self:
        """Build this process's part of the net, its optimizer and its learning rates.

        A collective of ``mesh.replica_group``, which compares the replicas' weights.
        """
        net = build(
            plan,
            mesh,
            settings.precision,
            settings.crossing,
            settings.seed,
            channels_last=settings.channels_last,
        )
        names = [name for name, _ in net.named_parameters()]  # of this column
        return cls(
            net,
            mesh,
            MomentumDecay(net, plan.recipe, DTYPES[settings.precision], plan.decays),
            Schedule(plan.recipe, settings.epochs or settings.data.epochs, names),
            settings.batch_size,
            settings.seed,
            settings.precision,
            compiled,
        )

    def __post_init__(self) -> None:
        if self.compiled:
            blocks = [self.net.blocks] if isinstance(self.net, (AlexNet, Column)) else []
            self.compiled = compile_parts(self.mesh, [*blocks, self.optimizer])
        self.replicated = self.mesh.data_parallel(self.net)
        self.last_logits = torch.empty(0)  # of the last step, (N, classes), with its dropout

    @property
    def link(self) -> Link | None:
        """The connection to the other column, None in a net of one process."""
        return self.net.link if isinstance(self.net, Column) else None

    def step(self, batch: Batch, step: int, rates: dict[str, float]) -> Tensor:
        """Train on one batch; return its mean loss over this replica, a scalar.

        ``step`` counts from 0 and fixes the dropout masks.  A collective of the whole mesh.
        """
        loss = self.gradients(batch, step)
        self.update(rates)
        return loss

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the net: the updated weights, and running means."""
        return self.net.state_dict() | self.optimizer.weights()

    def load(self, state: Mapping[str, Tensor], velocities: Mapping[str, Tensor]) -> None:
        """Restore what ``state`` returned, and the optimizer's velocities."""
        self.net.load_state_dict(state)
        self.optimizer.load(state, velocities)

    def gradients(self, batch: Batch, step: int) -> Tensor:
        """Do forward and backward; return the mean loss.  Weights do not change."""
        with comm_errors("gradients"):  # DistributedDataParallel averages them
            logits = self.logits(batch, step, self.replicated)
            loss = functional.cross_entropy(logits.to(_wide(self.precision)), batch.labels)
            self.last_logits = logits.detach()
            loss.backward()
        return loss.detach()

    def logits(self, batch: Batch, step: int, net: nn.Module | None = None) -> Tensor:
        """Return the logits (N, classes) in training mode, with the dropout masks of ``step``."""
        first = self.mesh.replica * self.batch_size
        rows = slice(first, first + self.batch_size)
        self.net.train()
        self.net.fix_dropout(
            DropoutSeed(self.seed, step, rows, self.mesh.replicas * self.batch_size)
        )
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


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether every number in ``tensors`` is finite.

    The norm takes one pass.  If it is not finite each element is checked, which is forty times
    slower, since squares overflow before the numbers do.
    """
    if bool(get_total_norm(tensors).isfinite()):
        return True
    return all(bool(one.isfinite().all()) for one in tensors)


# -- one evaluation ------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    net: Net,
    mesh: Mesh,
    batches: Iterable[tuple[Tensor, Tensor]],
    augmentation: Augmentation,
    *,
    views: int = 1,
    precision: str = "float32",
) -> Errors:
    """Return the exact errors over ``batches`` of stored images; each replica has its share.

    ``views`` 1: the central crop; 10: the mean probabilities of the ten views (section 4.1).
    A collective of the whole mesh.
    """
    net.eval()
    count = ErrorCount()
    wide = _wide(precision)

    def log_probabilities(images: Tensor) -> Tensor:
        return functional.log_softmax(net(images).to(wide), dim=1)

    for stored, labels in batches:
        if views == 1:
            scores = log_probabilities(augmentation.center_crop(stored))
        else:
            each = [log_probabilities(view) for view in augmentation.ten_crop(stored)]
            scores = torch.stack(each).logsumexp(0) - math.log(len(each))
        count.add(scores, labels)
    return count.result(mesh.replica_group, mesh.device)
