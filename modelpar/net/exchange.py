"""The differentiable exchanges between the two columns, and what they count (section 3.2).

                forward                                backward
    send        start sending this column's maps       wait for their gradient from the peer
    read_both   multiply this column's maps, wait      compute the gradient of the peer's maps,
                for the peer's, multiply those         start sending it, then compute the rest
    add_logits  add this column's logits and the       the identity: both columns compute the
                peer's                                 same loss
    swap        exchange some maps and wait            exchange their gradients and wait

``read_both`` is the layer that reads both columns' maps.  Its backward starts the exchange that
the backward of ``send`` waits for; autograd adds what arrives to the column's own gradient.
Whatever is computed between the two, forward or backward, hides the time of the exchange.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.profiler import record_function

from modelpar.distributed import exchange


@dataclass(eq=False)
class Link:
    """One column's connection to its peer.

    ``transport`` starts the exchange of a tensor with the peer's tensor of the same shape; it
    returns the tensor that will be received, and a function that waits for it.  ``dtype`` is that
    of maps and gradients on the wire (None: unchanged).  Without ``overlap`` each exchange is
    waited for where it starts.  The maps of a batch are exchanged in ``chunks``, each while the
    next is computed.

    ``sent`` counts bytes by (layer, direction) and ``swaps`` the exchanges.  ``seconds`` is the
    time that this process waited for them; on a GPU, where waits are queued, it misses them.
    """

    transport: Callable[[Tensor], tuple[Tensor, Callable[[], None]]]
    column: int
    _: KW_ONLY
    dtype: torch.dtype | None = None
    overlap: bool = True
    chunks: int = 1
    sent: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    swaps: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    seconds: float = 0.0

    @classmethod
    def between(cls, pair: ProcessGroup, **how: Any) -> "Link":
        """Return the link of this rank in a process group of two; ``how`` are further fields."""
        return cls(partial(exchange, pair=pair), pair.rank(), **how)

    @property
    def bytes_sent(self) -> int:
        """All that this column has sent, forward and backward, in bytes."""
        return self.sent.total()


class _Started(NamedTuple):
    """An exchange that has started; both tensors must live until it has been waited for."""

    packed: Tensor
    received: Tensor
    wait: Callable[[], None] | None  # None: done; a second call would block forever in gloo
    dtype: torch.dtype


class Crossing:
    """The exchanges of one layer in a step: forward maps, backward the peer's gradient."""

    def __init__(self, link: Link, layer: str) -> None:
        self.link = link
        self.layer = layer
        self.started: dict[str, _Started] = {}  # by direction

    def start(self, tensor: Tensor, direction: str) -> None:
        """Start exchanging ``tensor``; ``direction`` is forward or backward."""
        began, link = time.perf_counter(), self.link
        scale = self._scale(tensor, direction)
        with record_function(f"exchange of {self.layer}, {direction}: start"):
            packed = (tensor if scale == 1 else tensor * scale).to(link.dtype)
            if packed.dim() > 2:  # noqa: PLR2004 - maps are sent channels last
                packed = packed.movedim(1, -1)
            packed = packed.contiguous()
            received, wait = link.transport(packed)
        link.sent[self.layer, direction] += packed.numel() * packed.element_size()
        link.swaps[self.layer, direction] += 1
        if not link.overlap:
            wait()
            wait = None
        link.seconds += time.perf_counter() - began
        self.started[direction] = _Started(packed, received, wait, tensor.dtype)

    def finish(self, direction: str) -> Tensor:
        """Wait for the exchange; return what the peer sent, in the dtype of what was sent."""
        if direction not in self.started:
            raise RuntimeError(
                f"{self.layer}, {direction}: the exchange was finished twice or never started"
            )
        started = self.started.pop(direction)
        if started.wait is not None:
            began = time.perf_counter()
            with record_function(f"exchange of {self.layer}, {direction}: wait"):
                started.wait()
            self.link.seconds += time.perf_counter() - began
        received = started.received.to(started.dtype)
        scale = self._scale(received, direction)
        received = received if scale == 1 else received / scale
        return received.movedim(-1, 1) if received.dim() > 2 else received  # noqa: PLR2004 - maps

    def _scale(self, tensor: Tensor, direction: str) -> float:
        """Return the factor on the wire: for gradients in float16 about the number of images.

        Gradients of a mean over the batch are mostly below float16's smallest normal number.
        Those of the 2012 code were of the sum: it divides by the batch at the weights (layer.cu,
        bpropWeights).  A power of two causes no rounding.
        """
        if self.link.dtype != torch.float16 or direction != "backward":
            return 1.0
        return 2.0 ** (len(tensor) - 1).bit_length()


class InFlight(NamedTuple):
    """A column's maps (N, C, ...), which are also on their way to the peer."""

    maps: Tensor
    token: Tensor  # connects both ends in autograd; its values are never read
    crossing: Crossing


class _Send(Function):
    """Start sending ``maps``.  Adjoint: wait for their gradient from the peer."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.start(maps, "forward")
        return maps.new_zeros(()).expand_as(maps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        del grads  # the token's gradient; the real one comes from the peer
        return ctx.crossing.finish("backward"), None


def send(maps: Tensor, link: Link, layer: str) -> InFlight:
    """Start sending this column's maps (N, C, H, W) or units (N, C); both columns' shapes agree.

    A collective of the pair, together with the ``read_both`` that follows.  Adjoint: waits for
    the gradient of these maps from the peer's layer.
    """
    crossing = Crossing(link, layer)
    return InFlight(maps, _Send.apply(maps, crossing), crossing)


class Linear:
    """A fully connected layer: units (N, C), weight (M, C)."""

    def __call__(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (N, M)."""
        return functional.linear(maps, weight, bias)

    def maps_grad(self, _maps: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return (N, C)."""
        return grad @ weight

    def weight_grad(self, first: Tensor, second: Tensor, _weight: Tensor, grad: Tensor) -> Tensor:
        """Return (M, 2 C) by one product: the weights are large, the units small."""
        return grad.t() @ torch.cat([first, second], dim=1)


class Convolution(NamedTuple):
    """A convolution: maps (N, C, H, W), weight (M, C, K, K)."""

    stride: int
    padding: int

    def __call__(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (N, M, H', W')."""
        return functional.conv2d(maps, weight, bias, self.stride, self.padding)

    def maps_grad(self, maps: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return (N, C, H, W)."""
        return self._gradients(maps, weight, grad, (True, False, False))[0]

    def weight_grad(self, first: Tensor, second: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return (M, 2 C, K, K) by two products: the maps are large, the weights small."""
        part, wanted = weight.chunk(2, dim=1)[0], (False, True, False)
        parts = [self._gradients(maps, part, grad, wanted)[1] for maps in (first, second)]
        return torch.cat(parts, dim=1)

    def _gradients(self, maps: Tensor, weight: Tensor, grad: Tensor, wanted: Any) -> Any:
        """Return the gradients of maps, weight and bias of which ``wanted`` says so.

        torch.nn.grad.conv2d_input takes no maps, and on a GPU then copies ``grad`` to another
        memory format and back: 5 % of the step of a column on an H200.
        """
        stride, padding = [self.stride] * 2, [self.padding] * 2
        how = (stride, padding, [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(grad, maps, weight, None, *how, wanted)


class _ReadBoth(Function):
    """A layer that reads both columns' maps; the order of its work hides the exchange.

    Adjoint: the gradient of the peer's maps is computed first and sent.  The gradients of the
    weights and of this column's maps are computed meanwhile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        _token: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        crossing: Crossing,
        layer: Linear | Convolution,
    ) -> Tensor:
        own_weight, peer_weight = split_inputs(weight, crossing.link.column)
        out = layer(maps, own_weight, bias)
        peer = crossing.finish("forward")
        ctx.save_for_backward(maps, peer, weight)
        ctx.crossing, ctx.layer = crossing, layer
        return out.add_(layer(peer, peer_weight, None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        maps, peer, weight = ctx.saved_tensors
        crossing: Crossing = ctx.crossing
        layer: Linear | Convolution = ctx.layer
        own_weight, peer_weight = split_inputs(weight, crossing.link.column)
        token = None
        if ctx.needs_input_grad[1]:
            crossing.start(layer.maps_grad(peer, peer_weight, grad), "backward")
            token = grad.new_zeros(()).expand_as(maps)
        both = (maps, peer) if crossing.link.column == 0 else (peer, maps)
        weight_grad = layer.weight_grad(*both, weight, grad)
        maps_grad = layer.maps_grad(maps, own_weight, grad)
        needed = ctx.needs_input_grad[3]
        bias_grad = grad.sum([0, *range(2, grad.dim())]) if needed else None
        return maps_grad, token, weight_grad, bias_grad, None, None


def read_both(
    sent: InFlight, weight: Tensor, bias: Tensor | None, layer: Linear | Convolution
) -> Tensor:
    """Return a layer of weight (M, 2 C, ...) applied to both columns' maps (N, C, ...).

    Adjoint: starts sending the gradient of the peer's maps, see ``send``.
    """
    maps, token, crossing = sent
    weight = weight.to(maps.dtype)  # under autocast weight and bias are wider
    bias = None if bias is None else bias.to(maps.dtype)
    return _ReadBoth.apply(maps, token, weight, bias, crossing, layer)


def split_inputs(weight: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Return the parts of ``weight`` (M, 2 C, ...) that read this column and the peer."""
    first, second = weight.chunk(2, dim=1)
    return (first, second) if column == 0 else (second, first)


class _Swap(Function):
    """Exchange maps with the peer.  Adjoint: exchange their gradients."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.start(maps, "forward")
        return crossing.finish("forward")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.crossing.start(grads[0], "backward")
        return ctx.crossing.finish("backward"), None


def swap(maps: Tensor, link: Link, layer: str) -> Tensor:
    """Return the peer's ``maps`` (N, C, H, W), which follow ``layer`` and of which it gets ours.

    A collective of the pair.  Adjoint: the same with the gradients.
    """
    return _Swap.apply(maps, Crossing(link, layer))


class _AddLogits(Function):
    """Add the pair's partial logits.  Adjoint: the identity."""

    @staticmethod
    def forward(ctx: Any, partial_logits: Tensor, link: Link) -> Tensor:
        del ctx
        crossing = Crossing(link, "fc8")
        crossing.start(partial_logits, "forward")
        ours = partial_logits.to(link.dtype).to(partial_logits)  # rounded as the peer receives it
        return ours + crossing.finish("forward")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


def add_logits(partial_logits: Tensor, link: Link) -> Tensor:
    """Return the sum (N, classes) of both columns' partial logits, the same on both.

    A collective of the pair.  Its adjoint is the identity: both columns compute the same loss from
    the same sum, so each already has the gradient of its partial logits.  Adding the peer's would
    count the loss twice.

    Differs: in half precision partial logits are rounded, and nothing crosses backward.  Run
    170-quant rounded the units of fc7 and their gradients.
    """
    return _AddLogits.apply(partial_logits, link)
