"""The exchanges without a net: their adjoints, their values, their counters."""

import pytest
import torch
from ranks import Ranks

from modelpar.distributed import Mesh
from modelpar.net.exchange import (
    Convolution,
    Crossing,
    Linear,
    Link,
    add_logits,
    read_both,
    send,
)


def _link(mesh: Mesh, **how: object) -> Link:
    assert mesh.pair is not None
    return Link.between(mesh.pair, **how)  # type: ignore[arg-type]


def _random(seed: int, *shape: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=source)


CASES: dict[str, tuple[Linear | Convolution, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (Linear(), (3, 4), (6, 8)),
    "convolution": (Convolution(1, 1), (3, 4, 5, 5), (6, 8, 3, 3)),
    "strided convolution": (Convolution(2, 0), (3, 4, 7, 7), (6, 8, 3, 3)),
}


def read_both_gradients(mesh: Mesh, case: str, how: dict[str, bool]) -> list[torch.Tensor]:
    """Return the output, and the gradients of maps, weight and bias."""
    layer, maps, weights = CASES[case]
    x = _random(mesh.column, *maps)
    if how["last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = _random(20 + mesh.column, *weights).requires_grad_()  # each column has other units
    bias = _random(30 + mesh.column, weights[0]).requires_grad_()
    link = _link(mesh, overlap=how["overlap"])
    out = read_both(send(x, link, "conv3"), weight, bias, layer)
    out.backward(_random(10 + mesh.column, *out.shape))
    return [out.detach(), x.grad, weight.grad, bias.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_read_both_is_one_layer_over_both(pair: Ranks, case: str, *, overlap: bool) -> None:
    layer, maps, weights = CASES[case]
    both = torch.cat([_random(0, *maps), _random(1, *maps)], dim=1).requires_grad_()
    weight = torch.cat([_random(20, *weights), _random(21, *weights)]).requires_grad_()
    bias = torch.cat([_random(30, 6), _random(31, 6)]).requires_grad_()
    out = layer(both, weight, bias)
    half = (len(out), 6, *out.shape[2:])
    out.backward(torch.cat([_random(10, *half), _random(11, *half)], dim=1))
    assert both.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    last = case != "linear" and overlap  # the memory format does not change the result
    how = {"last": last, "overlap": overlap}
    for column, found in enumerate(pair.run(read_both_gradients, case, how)):
        expected = [
            out.detach().chunk(2, 1)[column],
            both.grad.chunk(2, 1)[column],
            weight.grad.chunk(2)[column],
            bias.grad.chunk(2)[column],
        ]
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def inner_products(mesh: Mesh) -> tuple[float, float]:
    """Return <P x, g> and <x, P' g> of a layer P over both columns' units."""
    x = _random(mesh.column, 3, 4).requires_grad_()
    g = _random(10 + mesh.column, 3, 6)
    weight, bias = _random(20 + mesh.column, 6, 8), torch.zeros(6, dtype=torch.float64)
    out = read_both(send(x, _link(mesh), "fc6"), weight, bias, Linear())
    out.backward(g)
    assert x.grad is not None
    return float((out.detach() * g).sum()), float((x.detach() * x.grad).sum())


def test_read_both_and_its_adjoint_agree(pair: Ranks) -> None:
    forward, backward = zip(*pair.run(inner_products), strict=True)
    assert sum(forward) == pytest.approx(sum(backward), rel=1e-14)
    assert forward[0] != pytest.approx(backward[0], rel=1e-3)  # only the sums agree


def frozen_below(mesh: Mesh) -> tuple[int, torch.Tensor | None]:
    link = _link(mesh)
    weight = _random(20, 6, 8).requires_grad_()
    units = _random(mesh.column, 3, 4)
    read_both(send(units, link, "fc6"), weight, _random(30, 6), Linear()).sum().backward()
    return link.swaps["fc6", "backward"], weight.grad


def test_no_gradient_is_sent_for_maps_that_need_none(pair: Ranks) -> None:
    for swaps, grad in pair.run(frozen_below):
        assert swaps == 0
        assert grad is not None


def test_small_gradients_survive_float16() -> None:
    """A mean over 128 images makes them subnormal in float16; a sum does not."""
    link = Link(lambda tensor: (tensor.clone(), lambda: None), 0, dtype=torch.float16)
    grad = 5e-6 * torch.randn(128, 64, generator=torch.Generator().manual_seed(3))
    crossing, errors = Crossing(link, "fc6"), {}
    for way in ("forward", "backward"):
        crossing.start(grad, way)
        errors[way] = float((crossing.finish(way) - grad).norm() / grad.norm())
    assert errors["forward"] > 1e-3
    assert errors["backward"] < 3e-4  # 11 bits
    assert link.sent["fc6", "backward"] == 2 * grad.numel()


def test_an_exchange_is_finished_once() -> None:
    link = Link(lambda tensor: (tensor.clone(), lambda: None), 0, dtype=torch.float32)
    crossing = Crossing(link, "fc6")
    with pytest.raises(RuntimeError, match=r"fc6, forward: the exchange was .* never started"):
        crossing.finish("forward")
    crossing.start(torch.ones(2, 2), "forward")
    crossing.finish("forward")
    with pytest.raises(RuntimeError, match="finished twice"):
        crossing.finish("forward")


def sum_and_gradient(mesh: Mesh, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    partial = _random(mesh.column, 4, 7).requires_grad_()
    total = add_logits(partial, _link(mesh, dtype=dtype))
    total.backward(_random(9, 4, 7))
    assert partial.grad is not None
    return total.detach(), partial.grad


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_added_logits_are_the_same_on_both_columns_and_not_counted_twice(
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
    weight = torch.ones(5, 16, 3, 3, requires_grad=True)
    out = read_both(send(x, link, "conv3"), weight, torch.zeros(5), Convolution(1, 1))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    return dict(link.sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_counted_in_the_dtype_on_the_wire(pair: Ranks, dtype: torch.dtype) -> None:
    sent = 2 * 8 * 9 * dtype.itemsize
    for counted in pair.run(wire_bytes, dtype):
        assert counted == {("conv3", "forward"): sent, ("conv3", "backward"): sent}


def exchanged(mesh: Mesh) -> torch.Tensor:
    """Maps with another memory format on each column."""
    maps = torch.full((2, 3, 4, 4), float(mesh.column)) + torch.arange(3.0)[:, None, None]
    order = torch.channels_last if mesh.column else torch.contiguous_format
    crossing = Crossing(_link(mesh), "conv3")
    crossing.start(maps.contiguous(memory_format=order), "forward")
    return crossing.finish("forward")


def test_maps_of_any_memory_format_arrive_unchanged(pair: Ranks) -> None:
    for column, peer in enumerate(pair.run(exchanged)):
        expected = torch.full((2, 3, 4, 4), 1.0 - column) + torch.arange(3.0)[:, None, None]
        assert torch.equal(peer, expected)
