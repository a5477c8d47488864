"""The differentiable exchanges between the two columns, and what they counted (section 3.2).

``depart`` starts sending a column's maps; ``product`` is the layer that reads both columns' maps.
Forward it multiplies the own half while the peer's travels.  Backward it computes the gradient of
the peer's maps first and starts sending it home, then everything else; backward through ``depart``
waits for what the peer sent, and autograd adds it to the column's own.  Whatever is computed
between the two, forward or backward, hides the travel.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from modelpar.distributed import exchange

Transport = Callable[[Tensor], tuple[Tensor, Callable[[], None]]]


class Link:
    """One column's end of the wire to its peer.

    ``transport`` starts the swap of a tensor with the peer's of equal shape and returns what
    will be received and a wait.  ``dtype`` is what maps and gradients travel as (None: as they
    are).  Without ``overlap`` each exchange is waited for where it starts.  The maps of a batch
    cross in ``chunks``, those of one while the next is computed.  ``sent`` counts bytes by (layer,
    direction), ``swaps`` the exchanges, ``seconds`` the time this process stood still for them; on
    a GPU, where waits are queued, that is not seen.
    """

    def __init__(
        self,
        transport: Transport,
        column: int,
        *,
        dtype: torch.dtype | None = None,
        overlap: bool = True,
        chunks: int = 1,
    ) -> None:
        self.transport = transport
        self.column = column
        self.dtype = dtype
        self.overlap = overlap
        self.chunks = chunks
        self.sent: Counter[tuple[str, str]] = Counter()
        self.swaps: Counter[tuple[str, str]] = Counter()
        self.seconds = 0.0

    @classmethod
    def between(
        cls,
        pair: ProcessGroup,
        *,
        dtype: torch.dtype | None = None,
        overlap: bool = True,
        chunks: int = 1,
    ) -> "Link":
        """Return the link of a process group of two."""
        transport = partial(exchange, pair=pair)
        return cls(transport, pair.rank(), dtype=dtype, overlap=overlap, chunks=chunks)

    @property
    def bytes_sent(self) -> int:
        """Everything this column has sent, forward and backward, in bytes."""
        return self.sent.total()

    def start(self, tensor: Tensor, layer: str, direction: str) -> "_Travel":
        """Start a swap of ``tensor`` for ``layer``; ``direction`` is forward or backward."""
        began = time.perf_counter()
        scale = self._scale(tensor, direction)
        packed = (tensor if scale == 1 else tensor * scale).to(self.dtype)
        if packed.dim() > 2:  # noqa: PLR2004 - maps go channels last, whatever they are here
            packed = packed.movedim(1, -1)
        packed = packed.contiguous()
        received, wait = self.transport(packed)
        self.sent[layer, direction] += packed.numel() * packed.element_size()
        self.swaps[layer, direction] += 1
        travel = _Travel(self, packed, received, wait, tensor.dtype, scale)
        self.seconds += time.perf_counter() - began
        if not self.overlap:
            travel.land()
        return travel

    def _scale(self, tensor: Tensor, direction: str) -> float:
        """Return what ``tensor`` travels times: for gradients in float16 about the images' number.

        Those of a mean over the batch are mostly below float16's least normal number.  The 2012
        code's were of the sum: it divides by the batch at the weights (layer.cu, bpropWeights).
        A power of two rounds nothing.
        """
        if self.dtype != torch.float16 or direction != "backward":
            return 1.0
        return 2.0 ** (len(tensor) - 1).bit_length()


class _Travel:
    """A swap under way: holds both tensors until it is waited for."""

    def __init__(
        self,
        link: Link,
        packed: Tensor,
        received: Tensor,
        wait: Callable[[], None],
        dtype: torch.dtype,
        scale: float,
    ) -> None:
        self.link = link
        self.packed: Tensor | None = packed  # alive until it is sent
        self.received = received
        self.wait: Callable[[], None] | None = wait  # to be called once: gloo waits for ever else
        self.dtype = dtype
        self.scale = scale

    def land(self) -> None:
        """Wait until both tensors are over."""
        if self.wait is None:
            return
        began = time.perf_counter()
        self.wait()
        self.packed = self.wait = None
        self.link.seconds += time.perf_counter() - began

    def end(self) -> Tensor:
        """Wait; return what came, in the dtype of what was sent before packing."""
        self.land()
        came = self.received.to(self.dtype)
        if self.scale != 1:
            came = came / self.scale
        return came.movedim(-1, 1) if came.dim() > 2 else came  # noqa: PLR2004 - maps


class Crossing:
    """One exchange of one layer, on its way forward and back."""

    def __init__(self, link: Link, layer: str) -> None:
        self.link = link
        self.layer = layer
        self.out: _Travel | None = None  # forward: own maps out, the peer's in
        self.back: _Travel | None = None  # backward: the peer's gradient out, the own in

    def start(self, maps: Tensor) -> None:
        """Start sending ``maps``."""
        self.out = self.link.start(maps, self.layer, "forward")

    def start_back(self, grad: Tensor) -> None:
        """Start sending the gradient of the peer's maps home."""
        self.back = self.link.start(grad, self.layer, "backward")

    def end(self) -> Tensor:
        """Wait for the peer's maps."""
        travel, self.out = self.out, None
        return _ended(travel)

    def end_back(self) -> Tensor:
        """Wait for the own maps' gradient from the peer."""
        travel, self.back = self.back, None
        return _ended(travel)


def _ended(travel: _Travel | None) -> Tensor:
    if travel is None:
        raise RuntimeError("a crossing was waited for before it was started, or twice")
    return travel.end()


class Departed(NamedTuple):
    """A column's own maps (N, C, ...), on their way to the peer as well."""

    own: Tensor
    ticket: Tensor  # ties the two ends in autograd; its values are never read
    crossing: Crossing


class _Depart(Function):
    """Start sending ``maps``.  Adjoint: wait for their gradient from the peer."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.start(maps)
        return maps.new_zeros(()).expand_as(maps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        del grads  # the ticket's gradient: what counts is on the wire
        return ctx.crossing.end_back(), None


def depart(own: Tensor, link: Link, layer: str) -> Departed:
    """Start sending this column's maps (N, C, H, W) or units (N, C), of equal shape on both.

    A collective of the pair, with the ``product`` that reads them.  Adjoint: waits for the
    gradient that the peer's layer has for these maps.
    """
    crossing = Crossing(link, layer)
    return Departed(own, _Depart.apply(own, crossing), crossing)


class Multiply(Protocol):
    """What a layer does with half of its inputs, and the gradients of that."""

    def __call__(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of ``maps`` and ``weight``."""
        ...

    def maps_grad(self, maps: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of ``maps``."""
        ...

    def weight_grad(self, first: Tensor, second: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of the whole ``weight`` (M, 2 C, ...) from both columns' maps."""
        ...

    def bias_grad(self, grad: Tensor) -> Tensor:
        """Return the gradient of the bias (M)."""
        ...


class Linear:
    """A fully connected layer: units (N, C), weight (M, C)."""

    def __call__(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (N, M)."""
        return functional.linear(maps, weight, bias)

    def maps_grad(self, maps: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return (N, C)."""
        del maps
        return grad @ weight

    def weight_grad(self, first: Tensor, second: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return (M, 2 C), in one product: the weights are large, the units small."""
        del weight
        return grad.t() @ torch.cat([first, second], dim=1)

    def bias_grad(self, grad: Tensor) -> Tensor:
        """Return (M)."""
        return grad.sum(0)


class Convolution:
    """A convolution: maps (N, C, H, W), weight (M, C, K, K)."""

    def __init__(self, stride: int, padding: int) -> None:
        self.stride = stride
        self.padding = padding

    def __call__(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (N, M, H', W')."""
        return functional.conv2d(maps, weight, bias, self.stride, self.padding)

    def maps_grad(self, maps: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return (N, C, H, W)."""
        return conv2d_input(maps.shape, weight, grad, self.stride, self.padding)

    def weight_grad(self, first: Tensor, second: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return (M, 2 C, K, K), in two products: the maps are large, the weights small."""
        shape = weight.chunk(2, dim=1)[0].shape
        parts = [
            conv2d_weight(maps, shape, grad, self.stride, self.padding) for maps in (first, second)
        ]
        return torch.cat(parts, dim=1)

    def bias_grad(self, grad: Tensor) -> Tensor:
        """Return (M)."""
        return grad.sum((0, 2, 3))


class _Product(Function):
    """A layer over both columns' maps; the order of its work is what hides the travel.

    Adjoint: the gradient of the peer's maps is computed first and sent; the weights' gradient and
    that of the own maps hide its travel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,
        ticket: Tensor,
        weight: Tensor,
        bias: Tensor,
        crossing: Crossing,
        multiply: Multiply,
    ) -> Tensor:
        del ticket
        own_half, peer_half = halves(weight, crossing.link.column)
        out = multiply(own, own_half, bias)
        peer = crossing.end()
        ctx.save_for_backward(own, peer, weight)
        ctx.crossing, ctx.multiply = crossing, multiply
        return out.add_(multiply(peer, peer_half, None))

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None, None]:
        (grad,) = grads
        own, peer, weight = ctx.saved_tensors
        crossing: Crossing = ctx.crossing
        multiply: Multiply = ctx.multiply
        own_half, peer_half = halves(weight, crossing.link.column)
        ticket = None
        if ctx.needs_input_grad[1]:
            crossing.start_back(multiply.maps_grad(peer, peer_half, grad))
            ticket = grad.new_zeros(()).expand_as(own)
        both = (own, peer) if crossing.link.column == 0 else (peer, own)
        weight_grad = multiply.weight_grad(*both, weight, grad)
        own_grad = multiply.maps_grad(own, own_half, grad)
        return own_grad, ticket, weight_grad, multiply.bias_grad(grad), None, None


def product(departed: Departed, weight: Tensor, bias: Tensor, multiply: Multiply) -> Tensor:
    """Return a layer of weight (M, 2 C, ...) over both columns' maps (N, C, ...).

    Adjoint: starts sending the gradient of the peer's maps, see ``depart``.
    """
    own, ticket, crossing = departed
    values = (value.to(own.dtype) for value in (weight, bias))  # under autocast they are wider
    return _Product.apply(own, ticket, *values, crossing, multiply)


def halves(weight: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Return what of ``weight`` (M, 2 C, ...) reads the own column, and what reads the peer's."""
    first, second = weight.chunk(2, dim=1)
    return (first, second) if column == 0 else (second, first)


class _Summed(Function):
    """Sum partial logits over the pair.  Adjoint: the identity.

    Both columns compute the same loss from the same sum, so the gradient of each partial is the
    gradient of the sum as it stands on its own device; to add the peer's would count the loss
    twice.
    """

    @staticmethod
    def forward(ctx: Any, partial_logits: Tensor, link: Link) -> Tensor:
        del ctx
        travel = link.start(partial_logits, "fc8", "forward")
        ours = partial_logits.to(link.dtype).to(partial_logits)  # rounded as the peer sees them
        return ours + travel.end()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


def summed(partial_logits: Tensor, link: Link) -> Tensor:
    """Return the sum (N, classes) of both columns' partial logits, the same on both.

    A collective of the pair.  Its adjoint is the identity: the loss is the same on both columns
    and must not be counted twice.
    """
    return _Summed.apply(partial_logits, link)
