"""The convolutions as a GPU computes them, with our kernels for all that follows each of them.

``Blocks`` has the reference implementation.  Here a convolution adds no bias: the kernel does.
conv1 reads patches of 4 x 4 pixels as 48 maps, so that it has a stride of 1: kernels of 11 x 11
become 3 x 3 patches of 4 x 4, with zeros in the last row and column.
"""

from torch import Tensor, nn
from torch.nn import functional

from modelpar import gpu
from modelpar.gpu import patches as kernel
from modelpar.gpu.block import Block, Norm
from modelpar.net import paper
from modelpar.net.layers import AcrossMaps, as_weight, response_norms
from modelpar.net.plan import Plan

CONV1 = paper.LAYERS["conv1"]


def block_of(plan: Plan, name: str, norm: nn.Module) -> Block | None:
    """Return what follows the convolution ``name``, or None if our kernels do not have it.

    ``norm`` is the normalization after it.
    """
    norms = response_norms(norm)
    usual = plan.activation == "relu" and plan.pool == "overlapping" and not plan.conv4_dropout
    if norms is None or not usual:
        return None
    found = {isinstance(one, AcrossMaps): Norm(one.k, one.slope, one.size) for one in norms}
    reads = plan.norm_inputs.get(name)
    if reads == "pooled" or plan.recipe.norms == "across_both":  # Caffe's
        return None
    return Block(
        rectify="last" if reads == "linear" else "first",
        across=found.get(True),
        within=found.get(False),
        pool=name in {"conv1", "conv2", "conv5"},
    )


def patches(images: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Return (N, 3, S, S) images as (N, 48, P, P) patches in the dtype of conv1's ``weight``."""
    left, right, top, bottom = plan.conv1_padding
    side, step = plan.image_size + left + right, CONV1.stride
    # The outputs need two patches more than there are outputs, which may be less than the image.
    count = (side - CONV1.kernel) // step + 1 + CONV1.kernel // step
    more = count * step - side
    images = as_weight(images, weight)
    if gpu.available(images.device) and images.dtype in gpu.DTYPES and not images.requires_grad:
        return kernel.patches(images, count, step, left, top)
    padded = functional.pad(images, (left, right + more, top, bottom + more))
    cut = padded.unflatten(3, (count, step)).unflatten(2, (count, step))
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).permute(0, 3, 1, 2)


def convolve(name: str, maps: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Return the convolution ``name`` of ``maps``, of ``patches`` for conv1, without its bias."""
    if name != "conv1":
        return functional.conv2d(maps, weight, padding=plan.padding(name))
    step = CONV1.stride
    zeros = -CONV1.kernel % step
    padded = functional.pad(weight, (0, zeros, 0, zeros))
    cut = padded.unflatten(3, (-1, step)).unflatten(2, (-1, step))
    return functional.conv2d(maps, cut.permute(0, 3, 5, 1, 2, 4).flatten(1, 3))
