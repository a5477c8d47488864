"""The differentiable exchanges between the two columns, and what they counted (section 3.2).

``depart`` starts sending the own maps, ``arrive`` waits for the peer's; each is the adjoint of the
other: backward through ``arrive`` starts sending the gradient of the peer's maps home, backward
through ``depart`` waits for the own maps' gradient from the peer, and autograd adds it to the
column's own.  Whatever is computed between the two, forward or backward, hides the travel.
"""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function

from modelpar.mesh import swap

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed import ProcessGroup

    Transport = Callable[[Tensor], tuple[Tensor, Callable[[], None]]]


class Link:
    """One column's end of the wire to its peer.

    ``transport`` starts the swap of a tensor with the peer's of equal shape and returns what
    will be received and a wait.  ``dtype`` is what maps and gradients travel as (None: as they
    are).  ``sent`` counts bytes by (layer, direction), ``swaps`` the exchanges, ``seconds`` the
    time this process stood still for them; on a GPU, where waits are queued, that is not seen.
    """

    def __init__(
        self,
        transport: Transport,
        column: int,
        *,
        dtype: torch.dtype | None = None,
        overlap: bool = True,
    ) -> None:
        self.transport = transport
        self.column = column
        self.dtype = dtype
        self.overlap = overlap
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
    ) -> Link:
        """Return the link of a process group of two."""
        return cls(partial(swap, pair=pair), pair.rank(), dtype=dtype, overlap=overlap)

    @property
    def bytes_sent(self) -> int:
        """Everything this column has sent, forward and backward, in bytes."""
        return self.sent.total()

    def start(self, tensor: Tensor, layer: str, direction: str) -> _Travel:
        """Start a swap of ``tensor`` for ``layer``; ``direction`` is forward or backward."""
        began = time.perf_counter()
        packed = tensor.to(self.dtype).contiguous()
        received, wait = self.transport(packed)
        self.sent[layer, direction] += packed.numel() * packed.element_size()
        self.swaps[layer, direction] += 1
        self.seconds += time.perf_counter() - began
        return _Travel(self, packed, received, wait, tensor.dtype)


class _Travel:
    """A swap under way: holds both tensors until it is waited for."""

    def __init__(
        self,
        link: Link,
        packed: Tensor,
        received: Tensor,
        wait: Callable[[], None],
        dtype: torch.dtype,
    ) -> None:
        self.link = link
        self.packed: Tensor | None = packed  # alive until it is sent
        self.received = received
        self.wait = wait
        self.dtype = dtype

    def end(self) -> Tensor:
        """Wait; return what came, in the dtype of what was sent before packing."""
        began = time.perf_counter()
        self.wait()
        self.packed = None
        self.link.seconds += time.perf_counter() - began
        return self.received.to(self.dtype)


class Crossing:
    """One exchange of one layer: first ``depart``, then ``arrive``."""

    def __init__(self, link: Link, layer: str) -> None:
        self.link = link
        self.layer = layer
        self.out: _Travel | None = None  # forward: own maps out, the peer's in
        self.back: _Travel | None = None  # backward: the peer's gradient out, the own in


def _ended(travel: _Travel | None) -> Tensor:
    if travel is None:
        message = "a crossing was waited for before it was started"
        raise RuntimeError(message)
    return travel.end()


class _Depart(Function):
    """Start sending ``maps``.  Adjoint: wait for their gradient from the peer."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.out = crossing.link.start(maps, crossing.layer, "forward")
        return maps.new_zeros(()).expand_as(maps)  # a ticket: its values are never read

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        del grads  # the ticket's gradient: what counts is on the wire
        return _ended(ctx.crossing.back), None


class _Arrive(Function):
    """Wait for the peer's maps.  Adjoint: start sending their gradient home."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, crossing: Crossing) -> Tensor:
        del ticket
        ctx.crossing = crossing
        return _ended(crossing.out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        crossing: Crossing = ctx.crossing
        crossing.back = crossing.link.start(grad, crossing.layer, "backward")
        return grad.new_zeros(()).expand_as(grad), None  # a ticket again


def depart(maps: Tensor, crossing: Crossing) -> Tensor:
    """Start sending this column's ``maps`` to the peer; returns the ticket for ``arrive``.

    ``maps`` (N, C, H, W) or units (N, C), of equal shape on both columns.  A collective of the
    pair.  Adjoint: waits for the gradient that the peer's layer has for these maps.
    """
    return _Depart.apply(maps, crossing)


def arrive(ticket: Tensor, crossing: Crossing) -> Tensor:
    """Wait for the peer's maps and return them, shaped as the own.

    Adjoint: starts sending their gradient to the peer.
    """
    return _Arrive.apply(ticket, crossing)


class _Product(Function):
    """A fully connected layer over both columns' units.

    Forward, the own half of the product is computed while the peer's units travel.  Adjoint: the
    gradient of the peer's units is computed first and sent; the weights' gradient, one product
    over both halves, hides its travel.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, weight: Tensor, bias: Tensor, crossing: Crossing) -> Tensor:
        travel = crossing.link.start(own, crossing.layer, "forward")
        own_half, peer_half = halves(weight, crossing.link.column)
        out = torch.addmm(bias, own, own_half.t())
        peer = travel.end()
        both = (own, peer) if crossing.link.column == 0 else (peer, own)
        ctx.save_for_backward(torch.cat(both, dim=1), weight)
        ctx.crossing = crossing
        return out.addmm_(peer, peer_half.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        both, weight = ctx.saved_tensors
        crossing: Crossing = ctx.crossing
        own_half, peer_half = halves(weight, crossing.link.column)
        travel = crossing.link.start(grad @ peer_half, crossing.layer, "backward")
        weight_grad = grad.t() @ both
        own_grad = grad @ own_half
        return own_grad + travel.end(), weight_grad, grad.sum(0), None


def product(own: Tensor, weight: Tensor, bias: Tensor, crossing: Crossing) -> Tensor:
    """Return (N, M): a fully connected layer of weight (M, 2 C) over both columns' units (N, C).

    A collective of the pair.  Adjoint: adds to the own units' gradient what the peer's layer has
    for them.
    """
    return _Product.apply(own, weight, bias, crossing)


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
