"""The contenders: one training step of the same net and batch by several means."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

from modelpar.bench.contenders import CONTENDERS
from modelpar.distributed import Mesh
from modelpar.errors import SettingsError
from modelpar.groups import ModelSettings
from modelpar.images.loader import Batch
from modelpar.net import paper
from modelpar.net.alexnet import AlexNet
from modelpar.net.exchange import Link
from modelpar.net.layers import as_weight
from modelpar.net.paper import COLUMNS, LAYERS
from modelpar.net.plan import Plan, plan_for
from modelpar.schemas import BenchmarkSettings
from modelpar.seeding import generator
from modelpar.settings import TrainSettings
from modelpar.training.engine import Learner, compile_parts

Step = Callable[[], object]


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
        return CONTENDERS[self.name].processes

    @property
    def plan(self) -> Plan:
        """The net that the step trains; raises SettingsError."""
        settings = self.settings
        net = ModelSettings(net="torchvision" if self.name == "torchvision" else None)
        try:
            return plan_for(settings.recipe, net, settings.num_classes, settings.image_size)
        except SettingsError as error:  # the keys of a benchmark have no groups
            raise SettingsError(str(error).removeprefix("model.")) from None


class Plain(nn.Module):
    """The whole net as a PyTorch user would write it, from torch's own layers.

    Input (N, 3, S, S), output (N, classes) logits.  The state dict is that of ``AlexNet``.
    Dropout is torch's, which scales in training.  ``sliced``: response norms sum shifted slices,
    which torch.compile makes one kernel of; torch's own function pools over the maps.
    """

    def __init__(self, plan: Plan, *, sliced: bool = False) -> None:
        super().__init__()
        self.plan, self.sliced = plan, sliced
        whole = AlexNet(plan, seed=0)
        for name in LAYERS:
            setattr(self, name, whole.get_submodule(name))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        plan, layer, relu = self.plan, self.get_submodule, functional.relu
        pool = partial(functional.max_pool2d, kernel_size=3, stride=2, ceil_mode=True)
        drop = partial(functional.dropout, p=plan.dropout, training=self.training)
        x = functional.pad(images, plan.conv1_padding)
        for name, reads in plan.norm_inputs.items():
            x = layer(name)(x)
            x = x if reads == "linear" else relu(x)
            x = pool(x) if reads == "pooled" else x
            x = self._across(x)
            if name == "conv2" and plan.recipe.norms == "across_and_within":
                mean = functional.avg_pool2d(x * x, paper.WITHIN_SIZE, 1, paper.WITHIN_SIZE // 2)
                x = x * (paper.WITHIN_K + paper.WITHIN_ALPHA * mean) ** -paper.WITHIN_BETA
            x = x if reads == "pooled" else pool(x)
            x = relu(x) if reads == "linear" else x
        x = relu(layer("conv3")(x))
        x = relu(layer("conv4")(x))
        x = pool(relu(layer("conv5")(x))).flatten(1)
        x = drop(relu(layer("fc6")(x)))
        x = drop(relu(layer("fc7")(x)))
        return layer("fc8")(x)

    def _across(self, x: Tensor) -> Tensor:
        norm = _sliced_norm if self.sliced else functional.local_response_norm
        recipe, beta = self.plan.recipe, paper.NORM_BETA
        parts = x.chunk(1 if recipe.norms == "across_both" else COLUMNS, 1)
        return torch.cat(
            [norm(c, paper.NORM_SIZE, recipe.alpha, beta, recipe.norm_k) for c in parts], 1
        )


def _sliced_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Return what torch's ``local_response_norm`` does."""
    squares = functional.pad(x * x, (0, 0, 0, 0, size // 2, size // 2))
    total = sum(squares[:, first : first + x.shape[1]] for first in range(size))
    return x * (k + alpha / size * total) ** -beta


def make(contender: Contender, mesh: Mesh) -> tuple[Step, Step]:
    """Return functions that take the first training step of this process, and each other one.

    On a GPU cuDNN chooses its algorithms in the first step, by their speed, so no other process
    may use the GPU meanwhile.  Where torch.compile takes the whole net, the first step does not
    use it, so that all such nets can then be compiled at the same time.  The images are noise
    with the scale of photographs minus their mean.
    """
    settings, plan = contender.settings, contender.plan
    source = generator(settings.seed, "benchmark")
    shape = (contender.batch_size, 3, plan.image_size, plan.image_size)
    images = torch.randn(shape, generator=source) * 64  # about the deviation of photographs
    labels = torch.randint(plan.num_classes, shape[:1], generator=source)
    if contender.name == "ddp":
        images, labels = (x.chunk(mesh.replicas)[mesh.replica].clone() for x in (images, labels))
    batch = Batch(images.to(mesh.device), labels.to(mesh.device), waited=0.0)
    if contender.name == "tensor_parallel":
        return _torch_step(_parallelized(plan, settings, mesh), contender, batch)
    if contender.name == "torchvision":
        return _torch_step(torchvision.models.AlexNet(plan.num_classes), contender, batch)
    if contender.name.startswith("plain"):
        return _torch_step(Plain(plan, sliced=contender.name != "plain"), contender, batch)
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
        cuda_graph="on",
    )
    if contender.name == "column":  # this process takes the place of column 0
        alone = cast("Any", SimpleNamespace(rank=lambda: 0))
        mesh = replace(mesh, columns=COLUMNS, pair=alone)
    learner = Learner(plan, trained, mesh)
    if contender.name == "column":
        cast("Link", learner.link).transport = lambda sent: (sent.clone(), lambda: None)
    if mesh.device.type == "cuda":  # as the loader's kernel delivers them
        weight = learner.net.get_parameter("conv1.weight")
        batch = replace(batch, images=as_weight(batch.images, weight))
    steps = count()

    def step() -> Tensor:
        return learner.step(batch, next(steps), learner.schedule.rates(0))

    return step, step


def _torch_step(net: nn.Module, contender: Contender, batch: Batch) -> tuple[Step, Step]:
    """Return steps with torch's own optimizer and autocast, fast ones for most contenders."""
    settings, recipe = contender.settings, contender.plan.recipe
    wide = torch.float64 if contender.precision == "float64" else torch.float32
    images, fast = batch.images.to(wide), contender.name not in {"plain", "tensor_parallel"}
    net.to(images)
    if fast:
        net.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(),
        recipe.lr,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=fast,
    )

    def take(forward: Callable[[Tensor], Tensor]) -> Tensor:
        rounds = contender.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=rounds):
            logits = forward(images)
        loss = functional.cross_entropy(logits.to(wide), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    first = step = partial(take, net)
    if fast and settings.compile:
        mode = "reduce-overhead" if contender.name == "plain_reduce_overhead" else None
        step = partial(take, torch.compile(net, dynamic=False, mode=mode))
    return first, step


def _parallelized(plan: Plan, settings: BenchmarkSettings, mesh: Mesh) -> nn.Module:
    """Return the net as torch's tensor-parallel API splits it.

    The API can split fully connected layers.  Each process computes all convolutions, which the
    API does not know, and all of fc8, whose bias it would add twice.
    """
    net = AlexNet(plan, settings.seed).to(mesh.device)
    if settings.channels_last:
        net.to(memory_format=torch.channels_last)
    if settings.compile:
        compile_parts(mesh, [net])
    # fc6 leaves half of its units on each process, so ours would draw masks of the wrong size.
    net.blocks.dropouts["fc6"] = nn.Dropout(plan.dropout)
    devices = init_device_mesh(mesh.device.type, (mesh.world_size,))
    parallelize_module(net, devices, {"fc6": ColwiseParallel(), "fc7": RowwiseParallel()})
    return net
