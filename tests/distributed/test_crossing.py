"""The crossings alone: adjoints, what they carry, what they count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

from modelpar.net.crossing import Crossing, Link, arrive, depart, product, summed

if TYPE_CHECKING:
    from ranks import Ranks

    from modelpar.mesh import Mesh


def _link(mesh: Mesh, **how: object) -> Link:
    assert mesh.pair is not None
    return Link.between(mesh.pair, **how)  # type: ignore[arg-type]


def _random(seed: int, *shape: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=source)


def exchange_products(mesh: Mesh) -> tuple[float, float]:
    """<E x, g> and <x, E' g> of this rank, with other numbers on each."""
    link = _link(mesh)
    x = _random(mesh.column, 3, 4, 5, 5).requires_grad_()
    g = _random(10 + mesh.column, 3, 4, 5, 5)
    crossing = Crossing(link, "conv3")
    peer = arrive(depart(x, crossing), crossing)
    peer.backward(g)
    assert x.grad is not None
    return float((peer.detach() * g).sum()), float((x.detach() * x.grad).sum())


def test_exchange_and_its_adjoint_agree(pair: Ranks) -> None:
    forward, backward = zip(*pair.run(exchange_products), strict=True)
    assert sum(forward) == pytest.approx(sum(backward), rel=1e-14)
    assert forward[0] != pytest.approx(backward[0], rel=1e-3)  # only over the pair


def product_products(mesh: Mesh) -> tuple[float, float]:
    """<P x, g> and <x, P' g> of a layer over both columns' units."""
    link = _link(mesh)
    x = _random(mesh.column, 3, 4).requires_grad_()
    weight = _random(20 + mesh.column, 6, 8)  # other units on each column
    bias = torch.zeros(6, dtype=torch.float64)
    g = _random(10 + mesh.column, 3, 6)
    out = product(x, weight, bias, Crossing(link, "fc6"))
    out.backward(g)
    assert x.grad is not None
    return float((out.detach() * g).sum()), float((x.detach() * x.grad).sum())


def test_product_and_its_adjoint_agree(pair: Ranks) -> None:
    forward, backward = zip(*pair.run(product_products), strict=True)
    assert sum(forward) == pytest.approx(sum(backward), rel=1e-14)
    assert forward[0] != pytest.approx(backward[0], rel=1e-3)  # only over the pair


def product_gradients(mesh: Mesh) -> list[torch.Tensor]:
    x = _random(mesh.column, 3, 4).requires_grad_()
    weight = _random(20 + mesh.column, 6, 8).requires_grad_()
    bias = _random(30 + mesh.column, 6).requires_grad_()
    out = product(x, weight, bias, Crossing(_link(mesh), "fc6"))
    out.backward(_random(10 + mesh.column, 3, 6))
    return [out.detach(), x.grad, weight.grad, bias.grad]  # type: ignore[list-item]


def test_product_is_the_layer_over_both(pair: Ranks) -> None:
    both = torch.cat([_random(0, 3, 4), _random(1, 3, 4)], dim=1).requires_grad_()
    weight = torch.cat([_random(20, 6, 8), _random(21, 6, 8)]).requires_grad_()
    bias = torch.cat([_random(30, 6), _random(31, 6)]).requires_grad_()
    out = functional.linear(both, weight, bias)
    out.backward(torch.cat([_random(10, 3, 6), _random(11, 3, 6)], dim=1))
    assert both.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    for column, found in enumerate(pair.run(product_gradients)):
        expected = [
            out.detach().chunk(2, 1)[column],
            both.grad.chunk(2, 1)[column],
            weight.grad.chunk(2)[column],
            bias.grad.chunk(2)[column],
        ]
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-13, atol=1e-13)


def exchanged(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    link = _link(mesh)
    x = _random(mesh.column, 2, 3).requires_grad_()
    crossing = Crossing(link, "fc6")
    peer = arrive(depart(x, crossing), crossing)
    ((x + peer) * _random(5 + mesh.column, 2, 3)).sum().backward()
    assert x.grad is not None
    return peer.detach(), x.grad


def test_exchange_gives_the_peers_values_and_adds_its_gradient(pair: Ranks) -> None:
    (peer0, grad0), (peer1, grad1) = pair.run(exchanged)
    assert torch.equal(peer0, _random(1, 2, 3))
    assert torch.equal(peer1, _random(0, 2, 3))
    both = _random(5, 2, 3) + _random(6, 2, 3)  # own use and the peer's
    assert torch.equal(grad0, both)
    assert torch.equal(grad1, both)


def sum_and_gradient(mesh: Mesh, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    partial = _random(mesh.column, 4, 7).requires_grad_()
    total = summed(partial, _link(mesh, dtype=dtype))
    total.backward(_random(9, 4, 7))
    assert partial.grad is not None
    return total.detach(), partial.grad


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_summed_logits_are_the_same_on_both_and_not_counted_twice(
    pair: Ranks, dtype: torch.dtype | None
) -> None:
    (total0, grad0), (total1, grad1) = pair.run(sum_and_gradient, dtype)
    assert torch.equal(total0, total1)
    error = {None: 0, torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert torch.allclose(total0, _random(0, 4, 7) + _random(1, 4, 7), rtol=0, atol=error)
    assert torch.equal(grad0, _random(9, 4, 7))
    assert torch.equal(grad1, grad0)


def wire_bytes(mesh: Mesh, dtype: torch.dtype) -> dict[tuple[str, str], int]:
    link = _link(mesh, dtype=dtype)
    x = torch.randn(2, 8, 3, 3).requires_grad_()
    crossing = Crossing(link, "conv3")
    peer = arrive(depart(x, crossing), crossing)
    assert peer.dtype == torch.float32
    peer.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    return dict(link.sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_those_of_the_wire_dtype(pair: Ranks, dtype: torch.dtype) -> None:
    sent = 2 * 8 * 9 * dtype.itemsize
    for counted in pair.run(wire_bytes, dtype):
        assert counted == {("conv3", "forward"): sent, ("conv3", "backward"): sent}


def channels_last(mesh: Mesh) -> torch.Tensor:
    crossing = Crossing(_link(mesh), "conv3")
    maps = torch.full((2, 3, 4, 4), float(mesh.column)) + torch.arange(3.0)[:, None, None]
    maps = maps.contiguous(memory_format=torch.channels_last)
    return arrive(depart(maps, crossing), crossing)


def test_maps_of_any_memory_format_arrive_whole(pair: Ranks) -> None:
    for column, peer in enumerate(pair.run(channels_last)):
        expected = torch.full((2, 3, 4, 4), 1.0 - column) + torch.arange(3.0)[:, None, None]
        assert torch.equal(peer, expected)
