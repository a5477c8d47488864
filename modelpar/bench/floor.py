"""The work of a training step, and its roofline: the least time that a device needs for it."""

from typing import Any

import torch
from torch import Tensor, nn

from modelpar.net.four_layer import whole_net
from modelpar.net.plan import Plan


def _layers(plan: Plan, batch_size: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
    """Return input, output and weight of each layer, without values, and all parameters' number.

    The input of a layer is padded.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        found.append((inputs[0], output, layer.weight))

    with torch.device("meta"):
        net = whole_net(plan, seed=0).eval().to("meta")
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(note)
        net(torch.empty(batch_size, 3, plan.image_size, plan.image_size))
    return found, sum(weight.numel() for weight in net.parameters())


def _flop(output: Tensor, weight: Tensor) -> int:
    """Return the operations of one product: a multiplication and an addition for each weight."""
    return 2 * output.numel() * weight[0].numel()


def gflop(plan: Plan, batch_size: int) -> float:
    """Return the GFLOP of the matrix products in one step of the whole net: 529 at 128 images.

    Each layer has three: for its output, the gradient of its weights, and the gradient of its
    input, which the first layer does not need.
    """
    layers, _ = _layers(plan, batch_size)
    first, *others = [_flop(output, weight) for _, output, weight in layers]
    return (2 * first + 3 * sum(others)) / 1e9


def floor(plan: Plan, batch_size: int, itemsize: int, flops: float, bandwidth: float) -> float:
    """Return the least time in s of a step of the whole net on one device.

    The device computes ``flops`` per s and moves ``bandwidth`` bytes per s; numbers have
    ``itemsize`` bytes.  The kernels run one after another.  Each reads its inputs and writes its
    outputs once, and takes the larger of its two times.  They are: the crop; the products of each
    layer, with bias and activation; norm and pool, forward and backward, which keep the place of
    each maximum in a byte; the update.
    """
    layers, parameters = _layers(plan, batch_size)
    crop = 3 * batch_size * plan.image_size**2 + itemsize * layers[0][0].numel()  # from bytes
    # The update reads weight, velocity and gradient, and writes weight, velocity and, if that
    # has fewer bytes, the rounded weight: 20 bytes a parameter for bfloat16 and for float32.
    kernels = [(0, crop), (0, 5 * max(4, itemsize) * parameters)]  # operations, bytes
    inputs = [maps.numel() for maps, _, _ in layers]
    for place, (maps, output, weight) in enumerate(layers):
        moved = itemsize * sum(part.numel() for part in (maps, output, weight))
        kernels += [(_flop(output, weight), moved)] * (3 if place else 2)
        pooled = inputs[place + 1] if place + 1 < len(layers) else output.numel()
        if pooled < output.numel():
            outside = pooled * (itemsize + 1)  # with the places of the maxima
            kernels += [(0, itemsize * output.numel() + outside)]
            kernels += [(0, 2 * itemsize * output.numel() + outside)]
    return sum(max(work / flops, moved / bandwidth) for work, moved in kernels)
