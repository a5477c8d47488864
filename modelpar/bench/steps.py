"""What is compared: one training step of the same net and batch, by each means there is."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from modelpar.distributed import Mesh
from modelpar.images.loader import Batch
from modelpar.net import paper
from modelpar.net.alexnet import AlexNet, Column
from modelpar.net.paper import COLUMNS, LAYERS
from modelpar.net.plan import Plan, Recipe, plan_for
from modelpar.seeding import generator
from modelpar.settings import BenchmarkSettings, CrossingSettings, ModelSettings, TrainSettings
from modelpar.training.engine import Learner, compile_parts


@dataclass(frozen=True)
class Contender:
    """One way to take the step: on how many processes, and what it is."""

    processes: int
    text: str


CONTENDERS: Final = {
    "plain": Contender(1, "one process, torch's own layers, optimizer and allocator"),
    "layers": Contender(1, "one process, our layers"),
    "ddp": Contender(2, "data parallel: DistributedDataParallel, our layers"),
    "tensor_parallel": Contender(2, "torch's tensor parallelism for fc6 and fc7, our layers"),
    "in_turn": Contender(2, "the two columns, crossing.overlap=false crossing.chunks=1"),
    "pair": Contender(2, "the two columns"),
}


class Trained(Protocol):
    """A net with all it takes to train it one step further."""

    @property
    def net(self) -> nn.Module:
        """The net, or this process's part of it."""
        ...

    def step(self) -> None:
        """Learn from one batch."""
        ...


class Plain(nn.Module):
    """The whole net as a user of torch writes it, of torch's layers alone.

    Input (N, 3, S, S), output (N, classes) logits; its state dict is ``AlexNet``'s.  Dropout is
    torch's, which scales in training.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        whole = AlexNet(plan, seed=0)
        for name in LAYERS:
            setattr(self, name, whole.get_submodule(name))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = self._layer("conv1", functional.pad(images, self.plan.conv1_padding))
        if self.plan.recipe.norm1_input == "linear":
            x = functional.relu(self._pool(self._across(x)))
        else:
            x = self._pool(self._across(functional.relu(x)))
        x = self._across(functional.relu(self._layer("conv2", x)))
        if self.plan.recipe.norms == "across_and_within":
            x = self._within(x)
        x = self._pool(x)
        x = functional.relu(self._layer("conv3", x))
        x = functional.relu(self._layer("conv4", x))
        x = self._pool(functional.relu(self._layer("conv5", x))).flatten(1)
        x = self._drop(functional.relu(self._layer("fc6", x)))
        x = self._drop(functional.relu(self._layer("fc7", x)))
        return self._layer("fc8", x)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x)

    def _across(self, x: Tensor) -> Tensor:
        alpha, size, beta = self.plan.recipe.alpha, paper.NORM_SIZE, paper.NORM_BETA
        columns = [
            functional.local_response_norm(column, size, alpha, beta, paper.NORM_K)
            for column in x.chunk(COLUMNS, dim=1)
        ]
        return torch.cat(columns, dim=1)

    def _within(self, x: Tensor) -> Tensor:
        mean = functional.avg_pool2d(x * x, paper.WITHIN_SIZE, 1, paper.WITHIN_SIZE // 2)
        return x * (paper.WITHIN_K + paper.WITHIN_ALPHA * mean) ** -paper.WITHIN_BETA

    def _pool(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(x, 3, 2, ceil_mode=True)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.plan.dropout, self.training)


class _TorchStep:
    """A step with torch's own optimizer and autocast."""

    def __init__(self, net: nn.Module, plan: Plan, batch: Batch, precision: str) -> None:
        self.wide = torch.float64 if precision == "float64" else torch.float32
        self.net, self.precision = net.to(self.wide), precision
        self.batch = replace(batch, images=batch.images.to(self.wide))
        recipe = plan.recipe
        self.optimizer = torch.optim.SGD(
            net.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )

    def step(self) -> None:
        """Learn from the batch."""
        rounded = self.precision == "bfloat16"
        device = self.batch.images.device.type
        with torch.autocast(device, torch.bfloat16) if rounded else nullcontext():
            logits = self.net(self.batch.images)
        functional.cross_entropy(logits.to(self.wide), self.batch.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class _OurStep:
    """A step as ``modelpar.train`` takes it."""

    def __init__(self, learner: Learner, batch: Batch) -> None:
        self.net, self.learner, self.batch = learner.net, learner, batch
        self.taken = 0

    def step(self) -> None:
        """Learn from the batch."""
        self.learner.step(self.batch, self.taken, self.learner.schedule.rates(0))
        self.taken += 1


def plan_of(settings: BenchmarkSettings) -> Plan:
    """Return the net that all contenders train; raises SettingsError."""
    recipe = Recipe(**asdict(settings.recipe))
    return plan_for(recipe, ModelSettings(), settings.num_classes, settings.image_size)


def batch_of(plan: Plan, images: int, seed: int, device: torch.device) -> Batch:
    """Return noise of the scale of images less their mean, (N, 3, S, S), and labels (N)."""
    source = generator(seed, "benchmark")
    side = plan.image_size
    pixels = torch.randn(images, 3, side, side, generator=source) * 64  # std of photographs, about
    labels = torch.randint(plan.num_classes, (images,), generator=source)
    return Batch(pixels.to(device), labels.to(device), waited=0.0)


def make(
    name: str, precision: str, batch_size: int, settings: BenchmarkSettings, mesh: Mesh, plan: Plan
) -> Trained:
    """Return the contender ``name`` on this process; ``batch_size`` counts over all of them."""
    batch = batch_of(plan, batch_size, settings.seed, mesh.device)
    if name == "plain":
        return _TorchStep(Plain(plan).to(mesh.device), plan, batch, precision)
    if name == "tensor_parallel":
        return _TorchStep(_parallelized(plan, settings, mesh), plan, batch, precision)
    if name == "ddp":
        batch_size //= mesh.replicas
        rows = slice(mesh.replica * batch_size, (mesh.replica + 1) * batch_size)
        batch = Batch(batch.images[rows].clone(), batch.labels[rows].clone(), waited=0.0)
    crossing = settings.crossing
    if name == "in_turn":
        crossing = CrossingSettings(crossing.dtype, overlap=False, chunks=1)
    trained = TrainSettings(
        crossing=crossing,
        epochs=1,
        batch_size=batch_size,
        seed=settings.seed,
        precision=precision,
        channels_last=settings.channels_last,
    )
    learner = Learner.create(plan, trained, mesh, compiled=settings.compile)
    return _OurStep(learner, batch)


def _parallelized(plan: Plan, settings: BenchmarkSettings, mesh: Mesh) -> AlexNet:
    """Return the net as torch's tensor-parallel API splits it.

    It can split the fully connected layers; of convolutions, which it does not know, and of
    fc8, whose bias would be added on both, each process computes all.
    """
    net = AlexNet(plan, settings.seed).to(mesh.device)
    if settings.channels_last:
        net.to(memory_format=torch.channels_last)
    if settings.compile:
        compile_parts(mesh, [net.blocks])
    # fc6 leaves each process half of its units: dropout sees those.
    net.blocks.drop6 = nn.Dropout(plan.dropout)  # pyright: ignore[reportAttributeAccessIssue]
    axis = init_device_mesh(mesh.device.type, (mesh.world_size,))
    parallelize_module(net, axis, {"fc6": ColwiseParallel(), "fc7": RowwiseParallel()})
    return net


def on_column(trained: Trained) -> Column | None:
    """Return the column that ``trained`` trains, if it is one."""
    return trained.net if isinstance(trained.net, Column) else None


def gflop(plan: Plan, batch_size: int) -> float:
    """Return the GFLOP of the products in one step of the whole net: 529 at 128 images.

    Forward, and as much for each gradient, of the weights and, but for conv1, of the inputs
    (torch's own count of a backward is wrong where a convolution has groups).
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = Plain(plan)
        net(torch.empty(batch_size, 3, plan.image_size, plan.image_size))
    first = sum(counter.get_flop_counts()["Plain.conv1"].values())
    return (3 * counter.get_total_flops() - first) / 1e9
