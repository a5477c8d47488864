"""torch.compile: whatever it compiles must compute what the eager version computes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from modelpar import AlexNet, Plan, Recipe
from modelpar.device import CompileError, check_compiled
from modelpar.distributed import Mesh
from modelpar.gpu.block import block
from modelpar.images.loader import Batch
from modelpar.net.fused import block_of
from modelpar.net.layers import AcrossMaps
from modelpar.settings import TrainSettings
from modelpar.training.engine import Learner


class ZeroGradient(torch.autograd.Function):
    """The identity with the gradient that torch 2.11 computed for some in-place operations."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        del ctx
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        del ctx
        return torch.zeros_like(*grads)


def compiler_with_zero_gradients(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
    """Return ``function`` with right values; whatever returns one tensor has zero gradients.

    A compiled backward returns the gradient itself.
    """
    if function.__name__.endswith("_backward"):
        return lambda *inputs, **how: torch.zeros_like(function(*inputs, **how))
    return function


def broken_compiler(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"No working C++ compiler for {function.__name__}\nand much advice")

    return broken


def square(maps: torch.Tensor) -> torch.Tensor:
    return maps * maps


@pytest.mark.parametrize(
    ("compiled", "problem"),
    [
        (lambda maps: ZeroGradient.apply(square(maps)), "gradient 1 .* differs by 1.0e"),
        (lambda maps: square(maps).detach(), "has no gradient 1"),
        (lambda maps: 1.01 * square(maps), "value .* differs by 1.0e-02"),
        (lambda maps: square(maps) * float("nan"), "value .* differs by nan"),
    ],
    ids=["zero gradient", "no gradient", "other value", "not a number"],
)
def test_a_compiled_function_that_differs_is_refused(
    compiled: Callable[[torch.Tensor], torch.Tensor], problem: str
) -> None:
    maps = torch.randn(2, 3)
    check_compiled("square", lambda maps: square(maps).clone(), square, maps)
    with pytest.raises(CompileError, match=f"square: .*{problem}"):
        check_compiled("square", compiled, square, maps)


def learner(recipe: str, *, compiled: bool, **switches: Any) -> Learner:
    named = Recipe.named(recipe.removesuffix(" pooled"))
    if recipe.endswith("pooled"):
        named = replace(named, norm1_input="pooled", norm2_input="pooled")
    plan = Plan(named, 10, 64, **switches)
    settings = TrainSettings(batch_size=2, epochs=90, channels_last=False, compile=compiled)
    return Learner(plan, settings, Mesh(torch.device("cpu")))


def gradients(trained: Learner) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(7)
    images = torch.randn(2, 3, 64, 64, generator=source) * 60
    trained.gradients(Batch(images, torch.tensor([1, 3]), 0.0), step=0)
    return {
        name: weight.grad
        for name, weight in trained.net.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize(
    "recipe",
    [
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("paper", "caffe pooled")),
        "code2012",
    ],
)
def test_each_compiled_gradient_is_the_eager_one(recipe: str) -> None:
    torch.compiler.reset()  # stay under torch's limit of versions for a function
    trained = learner(recipe, compiled=True)
    assert trained.compiled
    assert set(trained.net.blocks.compiled_norms) == {"conv1", "conv2"}
    expected = gradients(learner(recipe, compiled=False))
    found = gradients(trained)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        error = float((grad - expected[name]).norm() / expected[name].norm())
        assert error < 1e-4, name


@pytest.mark.parametrize(
    ("compiler", "problem"),
    [
        (compiler_with_zero_gradients, "gradient 1 of the compiled version differs by 1.0e+00"),
        (broken_compiler, "No working C++ compiler for _normalize"),
    ],
)
def test_a_wrong_compiler_is_reported_in_one_line_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    compiler: Callable[..., Any],
    problem: str,
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    trained = learner("code2012", compiled=True)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "modelpar: torch.compile is not used and steps are slower (the normalization after conv1: "
    )
    assert problem in lines[0]
    assert not trained.compiled
    expected = gradients(learner("code2012", compiled=False))
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(trained).items())


def test_a_wrong_compiled_update_leaves_the_net_eager_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def compiler(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
        return (lambda *_: None) if function.__name__ == "_update" else function

    monkeypatch.setattr(torch, "compile", compiler)
    trained = learner("code2012", compiled=True)
    assert "(the update of the weights: the value" in capfd.readouterr().err
    assert not trained.net.blocks.compiled_norms


@pytest.mark.parametrize(
    ("switches", "names"),
    [
        ({"norm": "batch"}, set()),
        ({"norm": "first_only"}, {"conv1"}),
        ({"activation": "tanh"}, {"conv1"}),  # conv2 normalizes what tanh returns
    ],
    ids=str,
)
def test_only_response_normalizations_are_compiled(
    switches: dict[str, Any], names: set[str]
) -> None:
    net = AlexNet(Plan(Recipe.named("code2012"), 10, 64, **switches), seed=0)
    net.compile()
    assert set(net.blocks.compiled_norms) == names


@pytest.mark.parametrize(
    "changes",
    [{"norms": "across_both"}, {"norm1_input": "pooled"}, {"norm_k": 1.0}],
    ids=str,
)
def test_our_kernels_are_not_used_for_what_they_do_not_compute(changes: dict[str, Any]) -> None:
    plan = Plan(replace(Recipe.named("paper"), **changes), 10, 64)
    norm = AlexNet(plan, seed=0).blocks.norm1
    found = block_of(plan, "conv1", norm)
    if "norm_k" not in changes:
        assert found is None
        return
    assert found is not None
    response = torch.randn(2, 48, 9, 9) * 60
    expected = functional.max_pool2d(norm(response.relu()), 3, 2, ceil_mode=True)
    assert torch.allclose(block(response, torch.zeros(48), found), expected, rtol=1e-5)


def test_a_hook_on_an_activation_sees_its_output_in_compiled_training() -> None:
    net = AlexNet(Plan(Recipe.named("paper"), 10, 64), seed=0).train()
    net.compile()
    seen: list[float] = []
    hook = net.blocks.activations["conv1"].register_forward_hook(
        lambda *values: seen.append(float(values[2].detach().min()))
    )
    net(torch.randn(2, 3, 64, 64))
    assert seen == [0.0]
    hook.remove()
    net(torch.randn(2, 3, 64, 64))
    assert seen == [0.0]


def test_torch_compile_of_a_norm_itself_has_the_right_gradient() -> None:
    maps = (torch.randn(2, 12, 5, 5) * 60).requires_grad_()
    norm: nn.Module = AcrossMaps(12, 1e-4)
    weight = torch.randn_like(maps)
    (expected,) = torch.autograd.grad(norm(maps), maps, weight)
    (found,) = torch.autograd.grad(torch.compile(norm)(maps), maps, weight)
    assert torch.allclose(found, expected, rtol=1e-5)
