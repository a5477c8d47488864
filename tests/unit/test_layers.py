"""Response normalization against torch's own layer and against a plain sum; gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional

from modelpar import Plan, Recipe
from modelpar.net.layers import (
    ACTIVATIONS,
    AcrossMaps,
    BatchNorm,
    WithinMap,
    compile_norm,
    norm,
    pool,
)


@pytest.mark.parametrize("alpha", [1e-4, 5e-4])
@pytest.mark.parametrize("columns", [1, 2])
def test_across_maps_equals_torchs_layer_in_each_column(columns: int, alpha: float) -> None:
    maps = torch.randn(2, columns * 12, 5, 5, dtype=torch.float64) * 100
    maps.requires_grad_()
    expected = torch.cat(
        [
            functional.local_response_norm(part, 5, alpha, 0.75, 2.0)
            for part in maps.chunk(columns, 1)
        ],
        dim=1,
    )
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), maps)
    found = AcrossMaps(12, alpha).double()(maps)
    (gradient,) = torch.autograd.grad((found * weight).sum(), maps)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)
    assert torch.allclose(gradient, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", [AcrossMaps(7, 0.5), WithinMap()], ids=["across", "within"])
def test_norms_pass_gradcheck(norm: nn.Module) -> None:
    maps = (torch.randn(2, 7, 6, 3, dtype=torch.float64) * 30).requires_grad_()
    assert gradcheck(norm.double(), (maps,))


def plain_across(maps: torch.Tensor) -> torch.Tensor:
    return functional.local_response_norm(maps, 5, 1e-4, 0.75, 2.0)


def plain_within(maps: torch.Tensor) -> torch.Tensor:
    mean = functional.avg_pool2d(maps**2, 5, stride=1, padding=2)
    return maps * (1 + 1e-3 * mean) ** -0.75


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("kind", ["across", "within"])
def test_norms_equal_torchs_layers_in_each_dtype(
    kind: str, dtype: torch.dtype, error: float, *, compiled: bool, channels_last: bool
) -> None:
    plain = {"across": plain_across, "within": plain_within}[kind]
    norm = {"across": AcrossMaps(48, 1e-4), "within": WithinMap()}[kind].to(dtype)
    apply = compile_norm(norm, rectify=False) if compiled else norm
    assert apply is not None
    order = torch.channels_last if channels_last else torch.contiguous_format
    maps = (torch.randn(4, 48, 9, 9) * 60).to(dtype).contiguous(memory_format=order)
    exact = maps.double().requires_grad_()
    maps.requires_grad_()
    expected, found = plain(exact), apply(maps)
    weight = torch.randn_like(expected).to(dtype)
    (wanted,) = torch.autograd.grad((expected * weight.double()).sum(), exact)
    (gradient,) = torch.autograd.grad(found, maps, weight)
    assert found.dtype == gradient.dtype == dtype
    for one, other in ((found, expected), (gradient, wanted)):
        off = (one.double() - other).abs().max() / other.abs().max()
        assert float(off.detach()) < error


def test_the_band_is_not_in_the_state_dict() -> None:
    assert not AcrossMaps(48, 1e-4).state_dict()


def test_within_map_is_the_sum_over_25_pixels() -> None:
    maps = torch.randn(1, 2, 7, 7, dtype=torch.float64) * 30
    found = WithinMap()(maps)
    for top in range(7):
        for left in range(7):
            window = maps[:, :, max(0, top - 2) : top + 3, max(0, left - 2) : left + 3]
            scale = (1 + 1e-3 / 25 * window.pow(2).sum((2, 3))) ** -0.75
            assert torch.allclose(found[:, :, top, left], maps[:, :, top, left] * scale)


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("overlapping", 55, 27),
        ("overlapping", 13, 6),
        ("non_overlapping", 55, 28),
        ("average", 27, 13),
    ],
)
def test_pools_round_up(kind: str, size: int, expected: int) -> None:
    assert pool(kind)(torch.zeros(1, 1, size, size)).shape[-1] == expected


def test_overlapping_pool_takes_the_largest_of_nine() -> None:
    maps = torch.arange(25.0).view(1, 1, 5, 5)
    assert pool("overlapping")(maps).tolist() == [[[[12, 14], [22, 24]]]]


def test_batch_norm_equals_torchs_without_scale_and_shift() -> None:
    ours, torchs = BatchNorm(3), nn.BatchNorm2d(3, affine=False)
    for _ in range(3):
        maps = torch.randn(4, 3, 5, 5) * 7 + 2
        assert torch.equal(ours(maps), torchs(maps))
    assert torch.equal(ours.eval()(maps), torchs.eval()(maps))
    assert ours.state_dict().keys() == torchs.state_dict().keys() - {"num_batches_tracked"}


def test_running_means_do_not_stall_in_bfloat16() -> None:
    ours, wide = BatchNorm(3).bfloat16(), BatchNorm(3)
    draw = torch.Generator().manual_seed(2)
    for _ in range(200):
        maps = (torch.randn(8, 3, 4, 4, generator=draw) * 7 + 100).bfloat16()
        assert ours(maps).dtype == torch.bfloat16
        wide(maps.float())
    for name, value in wide.state_dict().items():
        assert ours.state_dict()[name] == pytest.approx(value, rel=1e-3)
    assert ours.double().get_buffer("running_mean").dtype == torch.float64


@pytest.mark.parametrize(
    ("choice", "layer", "kinds"),
    [
        ("response", "conv1", [AcrossMaps]),
        ("response", "conv2", [AcrossMaps, WithinMap]),
        ("first_only", "conv1", [AcrossMaps]),
        ("first_only", "conv2", [nn.Identity]),
        ("within_channel", "conv1", [WithinMap]),
        ("within_channel", "conv2", [WithinMap]),
        ("batch", "conv1", [BatchNorm]),
        ("none", "conv2", [nn.Identity]),
    ],
)
def test_each_choice_of_norm_has_its_layers_after_conv1_and_conv2(
    choice: str, layer: str, kinds: list[type[nn.Module]]
) -> None:
    found = norm(Plan(Recipe.named("code2012"), norm=choice), layer, 2)  # type: ignore[arg-type]
    parts = list(found) if isinstance(found, nn.Sequential) else [found]
    assert [type(part) for part in parts] == kinds


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("tanh", lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())),
        ("sigmoid", lambda x: 1 / (1 + (-x).exp())),
        ("elu", lambda x: torch.where(x > 0, x, x.expm1())),
    ],
)
def test_activations_are_those_that_their_names_say(
    name: str, function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    values = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name]()(values), function(values))
