"""The contenders: one training step of the same net and batch by several means."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from typing import Final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from modelpar.distributed import Mesh
from modelpar.images.loader import Batch
from modelpar.net import paper
from modelpar.net.alexnet import AlexNet
from modelpar.net.paper import COLUMNS, LAYERS
from modelpar.net.plan import Plan, Recipe, plan_for
from modelpar.seeding import generator
from modelpar.settings import BenchmarkSettings, ModelSettings, TrainSettings
from modelpar.training.engine import Learner, compile_parts

CONTENDERS: Final = {
    "plain": "one process, torch's own layers, optimizer and allocator",
    "layers": "one process, our layers",
    "ddp": "data parallel: DistributedDataParallel, our layers",
    "tensor_parallel": "torch's tensor parallelism for fc6 and fc7, our layers",
    "in_turn": "the two columns, crossing.overlap=false crossing.chunks=1",
    "pair": "the two columns",
}
SINGLE: Final = ("plain", "layers")  # the others have two processes


@dataclass(frozen=True)
class Contender:
    """One way to take the step, at one precision; ``batch_size`` is of all its processes."""

    name: str
    precision: str
    batch_size: int
    settings: BenchmarkSettings

    @property
    def processes(self) -> int:
        """The number of processes."""
        return 1 if self.name in SINGLE else 2


class Plain(nn.Module):
    """The whole net as a PyTorch user would write it, from torch's own layers.

    Input (N, 3, S, S), output (N, classes) logits.  The state dict is that of ``AlexNet``.
    Dropout is torch's, which scales in training.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        whole = AlexNet(plan, seed=0)
        for name in LAYERS:
            setattr(self, name, whole.get_submodule(name))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        plan, layer, relu, norm = self.plan, self.get_submodule, functional.relu, self._across
        pool = partial(functional.max_pool2d, kernel_size=3, stride=2, ceil_mode=True)
        drop = partial(functional.dropout, p=plan.dropout, training=self.training)
        x = layer("conv1")(functional.pad(images, plan.conv1_padding))
        linear = plan.recipe.norm1_input == "linear"
        x = relu(pool(norm(x))) if linear else pool(norm(relu(x)))
        x = norm(relu(layer("conv2")(x)))
        if plan.recipe.norms == "across_and_within":
            mean = functional.avg_pool2d(x * x, paper.WITHIN_SIZE, 1, paper.WITHIN_SIZE // 2)
            x = x * (paper.WITHIN_K + paper.WITHIN_ALPHA * mean) ** -paper.WITHIN_BETA
        x = relu(layer("conv3")(pool(x)))
        x = relu(layer("conv4")(x))
        x = pool(relu(layer("conv5")(x))).flatten(1)
        x = drop(relu(layer("fc6")(x)))
        x = drop(relu(layer("fc7")(x)))
        return layer("fc8")(x)

    def _across(self, x: Tensor) -> Tensor:
        norm = functional.local_response_norm
        beta, alpha, k = paper.NORM_BETA, self.plan.recipe.alpha, paper.NORM_K
        return torch.cat(
            [norm(c, paper.NORM_SIZE, alpha, beta, k) for c in x.chunk(COLUMNS, 1)], 1
        )


def plan_of(settings: BenchmarkSettings) -> Plan:
    """Return the net that all contenders train; raises SettingsError."""
    recipe = Recipe(**asdict(settings.recipe))
    return plan_for(recipe, ModelSettings(), settings.num_classes, settings.image_size)


def make(contender: Contender, mesh: Mesh) -> Callable[[], object]:
    """Return a function that takes a training step of this process.

    The images are noise with the scale of photographs minus their mean.
    """
    settings, plan = contender.settings, plan_of(contender.settings)
    source = generator(settings.seed, "benchmark")
    shape = (contender.batch_size, 3, plan.image_size, plan.image_size)
    images = torch.randn(shape, generator=source) * 64  # about the deviation of photographs
    labels = torch.randint(plan.num_classes, shape[:1], generator=source)
    if contender.name == "ddp":
        images, labels = (x.chunk(mesh.replicas)[mesh.replica].clone() for x in (images, labels))
    batch = Batch(images.to(mesh.device), labels.to(mesh.device), waited=0.0)
    if contender.name in {"plain", "tensor_parallel"}:
        net = Plain(plan) if contender.name == "plain" else _parallelized(plan, settings, mesh)
        return _torch_step(net.to(mesh.device), plan, batch, contender.precision)
    crossing = settings.crossing
    if contender.name == "in_turn":
        crossing = replace(crossing, overlap=False, chunks=1)
    trained = TrainSettings(
        crossing=crossing,
        epochs=1,
        batch_size=len(images),
        seed=settings.seed,
        precision=contender.precision,
        channels_last=settings.channels_last,
        compile=settings.compile,
    )
    learner = Learner(plan, trained, mesh)
    steps = count()
    return lambda: learner.step(batch, next(steps), learner.schedule.rates(0))


def _torch_step(net: nn.Module, plan: Plan, batch: Batch, precision: str) -> Callable[[], object]:
    """Return a step with torch's own optimizer and autocast."""
    wide = torch.float64 if precision == "float64" else torch.float32
    images, recipe = batch.images.to(wide), plan.recipe
    optimizer = torch.optim.SGD(
        net.to(wide).parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
    )

    def take() -> None:
        rounds = precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=rounds):
            logits = net(images)
        functional.cross_entropy(logits.to(wide), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return take


def _parallelized(plan: Plan, settings: BenchmarkSettings, mesh: Mesh) -> nn.Module:
    """Return the net as torch's tensor-parallel API splits it.

    The API can split fully connected layers.  Each process computes all convolutions, which the
    API does not know, and all of fc8, whose bias it would add twice.
    """
    net = AlexNet(plan, settings.seed).to(mesh.device)
    if settings.channels_last:
        net.to(memory_format=torch.channels_last)
    if settings.compile:
        compile_parts(mesh, [net.blocks])
    # fc6 leaves half of its units on each process, so ours would draw masks of the wrong size.
    net.blocks.dropouts["fc6"] = nn.Dropout(plan.dropout)
    devices = init_device_mesh(mesh.device.type, (mesh.world_size,))
    parallelize_module(net, devices, {"fc6": ColwiseParallel(), "fc7": RowwiseParallel()})
    return net


def gflop(plan: Plan, batch_size: int) -> float:
    """Return the GFLOP of the matrix products in one step of the whole net: 529 at 128 images.

    The forward pass counts three times: once itself, once for the gradient of the weights, once
    for the gradient of the inputs, which conv1 does not need.  (FlopCounterMode's own count of a
    backward pass is wrong for grouped convolutions.)
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = Plain(plan)
        net(torch.empty(batch_size, 3, plan.image_size, plan.image_size))
    first = sum(counter.get_flop_counts()["Plain.conv1"].values())
    return (3 * counter.get_total_flops() - first) / 1e9
