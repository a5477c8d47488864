"""The baselines without columns: the net of figure 1, and torchvision's AlexNet.

``whole_net`` builds the net of any plan on one device.
"""

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from modelpar.net import paper
from modelpar.net.alexnet import AlexNet
from modelpar.net.layers import ACTIVATIONS, Dropout, as_weight, norm, pool
from modelpar.net.plan import Plan
from modelpar.net.weights import load_initial
from modelpar.seeding import generator


class Local(nn.Module):
    """A convolution with other weights and biases at each place (cuda-convnet: ``local``).

    Its maps, in and out, are ``side`` pixels wide.  ``weight`` is (side ** 2, outputs, inputs *
    kernel ** 2), ``bias`` (side ** 2, outputs).  Places are in row order; a kernel is ordered
    by inputs, rows, columns.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, side: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.side = side
        places = side**2
        size = (places, outputs, inputs * kernel**2)
        self.weight = nn.Parameter(torch.empty(size, device="meta"))
        self.bias = nn.Parameter(torch.empty(places, outputs, device="meta"))

    def forward(self, maps: Tensor) -> Tensor:
        """Return (N, outputs, H, W) of ``maps`` (N, inputs, H, W); outside them are zeros."""
        windows = functional.unfold(maps, self.kernel, padding=self.kernel // 2)
        # (places, inputs * kernel ** 2, N), copied at once: the product would copy place by place
        windows = windows.permute(2, 1, 0).contiguous()
        units = torch.baddbmm(self.bias[:, :, None], self.weight, windows)
        return units.permute(2, 1, 0).unflatten(2, (self.side, self.side))


class FourLayer(nn.Module):
    """The CIFAR-10 net of section 3.3, with or without norms; that of figure 1 has none.

    It has the layers of cuda-convnet's example files, whose errors are 13 and 11 %: two
    convolutions, two locally connected layers, and one unit for each class; no dropout.
    Differs: crops are 28 pixels wide, so that images are stored at their 32 pixels; the files
    were trained with 24.
    """

    def __init__(self, plan: Plan, seed: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        one, two, three, four, _ = plan.layers.values()
        side = plan.pooled(plan.pooled(plan.image_size))
        self.conv1 = nn.Conv2d(3, one.outputs, one.kernel, padding=one.padding, device="meta")
        self.conv2 = nn.Conv2d(
            one.outputs, two.outputs, two.kernel, padding=two.padding, device="meta"
        )
        self.local3 = Local(two.outputs, three.outputs, three.kernel, side)
        self.local4 = Local(three.outputs, four.outputs, four.kernel, side)
        self.fc10 = nn.Linear(four.outputs * side**2, plan.num_classes, device="meta")
        self.activations = nn.ModuleDict(
            {name: ACTIVATIONS[plan.activation]() for name in plan.layers if name != "fc10"}
        )
        self.pool = pool(plan.pool)
        self.norm1, self.norm2 = norm(plan, "conv1", 1), norm(plan, "conv2", 1)
        load_initial(self, plan, seed)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of ``images`` (N, 3, S, S)."""
        x = as_weight(images, self.conv1.weight)
        active = self.activations
        x = self.norm1(active["conv1"](self.pool(self.conv1(x))))  # (N, 64, 14, 14) at 28 pixels
        x = self.pool(self.norm2(active["conv2"](self.conv2(x))))  # (N, 64, 7, 7)
        x = active["local3"](self.local3(x))  # (N, 32 or 64, 7, 7)
        x = active["local4"](self.local4(x))  # (N, 32, 7, 7)
        return self.fc10(x.flatten(1))


class ScaledDropout(Dropout):
    """torchvision's dropout: scaled in training, not in evaluation."""

    def forward(self, units: Tensor) -> Tensor:
        """Return ``units`` (N, C), masked and scaled, or as they are."""
        return super().forward(units) / (1 - self.rate) if self.training else units


class Torchvision(torchvision.models.AlexNet):
    """torchvision's AlexNet: one column of 64, 192, 384, 256, 256 kernels, without norms.

    Layers, their names, initial weights and scaled dropout are torchvision's; a seed fixes the
    weights, a DropoutSeed the masks.  Differs: here it is trained with our crops, minus the mean
    image, and our optimizer; torchvision used crops of many sizes, minus the mean colour.
    """

    def __init__(self, plan: Plan, seed: int | None = None) -> None:
        with torch.random.fork_rng(devices=[], enabled=seed is not None), torch.device("cpu"):
            if seed is not None:  # torchvision draws from torch's global generator
                torch.default_generator.set_state(generator(seed, "init").get_state())
            super().__init__(plan.num_classes, plan.dropout)
        self.plan = plan
        # On the net's device: a copy from the host would wait for a GPU in each step.
        std = torch.tensor(paper.TORCHVISION_STD, dtype=torch.float64)[:, None, None]
        self.register_buffer("std", std, persistent=False)
        for place, layer in enumerate(self.classifier):
            if isinstance(layer, nn.Dropout):  # before the linear layer of the next place
                units = self.classifier.get_parameter(f"{place + 1}.weight").shape[1]
                self.classifier[place] = ScaledDropout(f"classifier.{place}", units, plan.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, 3, S, S)."""
        scale = 255 * self.get_buffer("std").to(x.dtype)
        return super().forward(as_weight(x / scale, self.features.get_parameter("0.weight")))


def whole_net(plan: Plan, seed: int | None = None) -> AlexNet | FourLayer | Torchvision:
    """Return the whole net of ``plan`` on one device; without a seed torch's generator is used.

    Input (N, 3, S, S), pixels 0-255 minus the mean; output (N, classes) logits.
    """
    baselines = {"four_layer": FourLayer, "torchvision": Torchvision}
    return baselines.get(plan.net, AlexNet)(plan, seed)
