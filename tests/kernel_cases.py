"""Cases that hold the kernels to their plain versions, on any device.

A script, since Triton reads TRITON_INTERPRET when it is imported: kernel_cases.py DEVICE OUT_FILE
CASE... writes {case: "" or what went wrong}.
"""

import copy
import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelpar import AlexNet, Recipe
from modelpar.gpu.block import POSITIONS, STRIP_ROWS, Block, Norm, block, plain
from modelpar.gpu.update import update
from modelpar.images.augment import Augmentation, CropFlipColour, Statistics
from modelpar.net.fused import patches
from modelpar.net.plan import Plan
from modelpar.training.optimizer import MomentumDecay, _fused_update, _update

LAST = torch.channels_last
FLAGS = (torch.tensor(0, dtype=torch.int32), torch.tensor(data=False))


def drawn(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def state(shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Return a weight, a velocity and the rounded weight, in channels_last memory if they can."""
    weight, velocity = drawn(shape, device), drawn(shape, device, 1) * 0.01
    if len(shape) == 4:
        weight, velocity = weight.to(memory_format=LAST), velocity.to(memory_format=LAST)
    return [weight, velocity, weight.bfloat16()]


def assert_rounded(found: Tensor, weight: Tensor) -> None:
    """The interpreter cuts bfloat16 off where a GPU rounds to nearest."""
    if found.is_cuda:
        assert torch.equal(found, weight.bfloat16())
    else:
        assert ((found.float() - weight).abs() <= 2**-7 * weight.abs()).all()


def update_is_bit_for_bit_the_plain_one(device: torch.device) -> None:
    rate = torch.tensor([0.1, 0.0123], device=device)[1]  # not at the start of its memory
    for shape in ((1,), (3000,), (48, 3, 5, 5), (40, 50, 6, 6)):  # the last has large blocks
        for dtype in (torch.float32, torch.bfloat16):
            for decay in (0.0005, 0.0):
                grad = drawn(shape, device, 2).to(dtype)
                found, plain = state(shape, device), state(shape, device)
                update(*found[:2], grad, rate, decay, 0.9, found[2])
                weight, velocity, rounded = ([part] for part in plain)
                _update(weight, velocity, [grad], [rate], [decay], [0.9], rounded)
                assert not torch.equal(found[0], drawn(shape, device))
                assert torch.equal(found[0], plain[0])
                assert torch.equal(found[1], plain[1])
                assert_rounded(found[2], plain[0])


def update_takes_a_gradient_of_other_strides(device: torch.device) -> None:
    shape, rate = (8, 6, 3, 3), torch.tensor(0.1, device=device)
    grad = drawn(shape, device, 2)
    results = []
    for one in (grad, grad.to(memory_format=LAST), grad.transpose(0, 1).clone().transpose(0, 1)):
        found = state(shape, device)
        update(*found[:2], one, rate, 0.01, 0.9)
        results.append(found[:2])
    assert len({grad.stride(), results[0][0].stride()}) == 2
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def a_zero_rate_or_flag_changes_nothing(device: torch.device) -> None:
    rate, grad = torch.tensor(0.1, device=device), drawn((3000,), device) * float("nan")
    for step, ok in ((rate * 0, None), *((rate, flag.to(device)) for flag in FLAGS)):
        found = state((3000,), device)
        update(*found[:2], grad, step, 0.01, 0.9, found[2], ok)
        assert all(map(torch.equal, found, state((3000,), device)))


def optimizers(device: torch.device, dtype: torch.dtype) -> list[MomentumDecay]:
    """Return two with the same net and gradients, one of them compiled."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Conv2d(8, 4, 3), nn.Linear(7, 6))
    net.to(device, memory_format=LAST)
    made = [MomentumDecay(copy.deepcopy(net), Recipe.named("paper"), dtype) for _ in range(2)]
    if device.type == "cpu" and dtype == torch.bfloat16:
        made[0].update = _fused_update  # the check would see that the interpreter cuts off
    else:
        made[0].compile()
    for number, pair in enumerate(zip(*(one.named.values() for one in made), strict=True)):
        for weight in pair:
            weight.grad = drawn(tuple(weight.shape), device, number).to(dtype)
    return made


def assert_equal(fused: MomentumDecay, plain: MomentumDecay) -> None:
    for kind in ("weights", "velocities"):
        found, expected = getattr(fused, kind)(), getattr(plain, kind)()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name, weight in fused.named.items():
        if fused.masters:
            assert_rounded(weight.detach(), plain.masters[name])


def some_rates(optimizer: MomentumDecay, rate: float) -> dict[str, float]:
    """Return another rate for each parameter; that of the second convolution is 0."""
    names = list(optimizer.named)
    return {name: 0.0 if name[0] == "1" else rate * (k + 1) for k, name in enumerate(names)}


def optimizer_with_the_kernel_equals_the_plain_one(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        fused, plain = optimizers(device, dtype)
        assert fused.update is _fused_update
        for rate in (0.01, 0.01, 0.002):
            for one in (fused, plain):
                one.set_rates(some_rates(one, rate))
                one.step()
            assert_equal(fused, plain)
        fused.step(torch.zeros((), dtype=torch.int32, device=device))
        assert_equal(fused, plain)
        fused.run_eager()
        assert fused.update is _update


def captured_step_sees_new_rates_and_the_flag(device: torch.device) -> None:
    """Only on a GPU; nothing in it may make the host wait."""
    for dtype in (torch.float32, torch.bfloat16):
        fused, plain = optimizers(device, dtype)
        ok = torch.ones((), dtype=torch.int32, device=device)
        fused.step(ok)
        plain.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fused.step(ok)
        torch.cuda.set_sync_debug_mode("error")
        for rate in (0.01, 0.002, 0.03):
            for one in (fused, plain):
                one.set_rates(some_rates(one, rate))
            graph.replay()
            plain.step()
        ok.zero_()
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        assert_equal(fused, plain)


def gated_step_in_float64_does_not_wait(device: torch.device) -> None:
    """Only on a GPU: the plain update obeys the flag there too."""
    net = nn.Linear(5, 3).double().to(device)
    optimizer = MomentumDecay(net, Recipe.named("paper"))
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight)
    before = {name: weight.clone() for name, weight in optimizer.weights().items()}
    ok = torch.zeros((), dtype=torch.int32, device=device)
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step(ok)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(weight, before[name]) for name, weight in optimizer.weights().items())
    optimizer.step(ok + 1)
    assert not torch.equal(optimizer.weights()["weight"], before["weight"])


def crop_is_the_plain_one(device: torch.device) -> None:
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 50, 50), dtype=torch.uint8, generator=source).to(device)
    kinds = {
        "stored": pixels,
        "channels last": pixels.to(memory_format=LAST),
        "grey": pixels[:, :1].expand(-1, 3, -1, -1),
        "a part": pixels.repeat(1, 1, 2, 2)[:, :, 3:53, 7:57],
    }
    means = torch.rand(3, 50, 50, generator=source) * 255
    spread = torch.tensor([60.0, 20.0, 10.0])
    statistics = Statistics(means, spread, torch.linalg.qr(drawn((3, 3), torch.device("cpu")))[0])
    draws = CropFlipColour.of_epoch(3, 0, 5, 50 - 37, "per_image").to(device)
    assert 0 < int(draws.flip.sum()) < 5
    for dtype in (torch.float32, torch.bfloat16):
        for scaled in (False, True):
            how = {"scaled": scaled, "device": device, "dtype": dtype}
            plain, fused = (Augmentation(statistics, 37, **how) for _ in range(2))
            fused.compile()
            assert fused.fused
            for name, images in kinds.items():
                for noise in (0.0, 0.1):
                    expected = plain.train(images, draws, noise)
                    found = fused.train(images, draws, noise)
                    assert found.dtype == dtype
                    assert found.is_contiguous(memory_format=LAST)
                    # float32: rounding of numbers up to 300.  bfloat16: one bit of 8.
                    bound = 1e-4 + (2**-7 * expected.abs() if dtype == torch.bfloat16 else 0)
                    assert ((found - expected).abs() <= bound).all(), (name, dtype, noise)
            fused.run_eager()
            assert torch.equal(fused.train(pixels, draws, 0.1), plain.train(pixels, draws, 0.1))


ACROSS, WITHIN = Norm(2.0, 0.01, 5), Norm(1.0, 0.01, 5)
BLOCKS = {  # by layer: maps and side in the interpreter, the same on a GPU, what follows
    "conv1 of paper": ((48, 9), (48, 55), Block("first", ACROSS, pool=True)),
    "conv2 of paper": ((128, 4), (128, 27), Block("first", ACROSS, pool=True)),
    "conv1 of code2012": ((20, 8), (48, 55), Block("last", ACROSS, pool=True)),
    "conv2 of code2012": ((24, 7), (128, 27), Block("first", ACROSS, WITHIN, pool=True)),
    "only within maps": ((20, 6), (48, 55), Block("last", None, WITHIN, pool=True)),
    "conv4": ((192, 4), (192, 13), Block("first")),
    "conv5": ((128, 5), (128, 13), Block("first", pool=True)),
    "conv2 of no_crossing": ((136, 4), (160, 27), Block("first", ACROSS, pool=True)),
    "conv5 of one_column": ((136, 5), (256, 13), Block("first", pool=True)),
    "no pool": ((20, 4), (128, 27), Block("first", ACROSS)),
}


def differences(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float((one.double() - other).norm() / other.norm()) for one, other in pairs]


def with_gradients(function: Any, what: Block, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    out = function(*leaves, what)
    grad = drawn(tuple(out.shape), torch.device("cpu"), 3).to(out)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def block_is_the_plain_one(device: torch.device) -> None:
    for name, (small, real, what) in BLOCKS.items():
        maps, side = real if device.type == "cuda" else small
        response, bias = 3 * drawn((2, maps, side, side), device), drawn((maps,), device, 1)
        exact = with_gradients(plain, what, response.double(), bias.double())
        found = with_gradients(block, what, response, bias)
        assert max(differences(found, exact)) < 1e-6, (name, differences(found, exact))
        assert found[0].is_contiguous(memory_format=LAST), name
        if device.type == "cuda":  # the interpreter rounds bfloat16 in another way
            rounded = response.bfloat16(), bias.bfloat16()
            exact = with_gradients(plain, what, *(value.double() for value in rounded))
            ours = differences(with_gradients(block, what, *rounded), exact)
            theirs = differences(with_gradients(plain, what, *rounded), exact)
            assert all(a < 1.1 * b + 1e-3 for a, b in zip(ours, theirs, strict=True)), name


def block_takes_the_first_of_equals(device: torch.device) -> None:
    for name, ((maps, side), _, what) in BLOCKS.items():
        response, bias = (
            torch.ones(1, maps, side, side, device=device),
            torch.ones(maps).to(device),
        )
        found = with_gradients(block, what, response, bias)
        assert max(differences(found, with_gradients(plain, what, response, bias))) < 1e-6, name


def block_has_the_infinities_and_nan_of_the_plain_one(device: torch.device) -> None:
    bias = drawn((12,), device, 1)
    for name, (_, _, what) in BLOCKS.items():
        response = 3 * drawn((3, 12, 6, 6), device)
        for image, number in enumerate((torch.inf, -torch.inf, torch.nan)):
            response[image, 3, 2, 2] = response[image, -1, -1, -1] = number
        found = with_gradients(block, what, response, bias)
        expected = with_gradients(plain, what, response, bias)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True), name


def block_within_maps_is_exact_in_several_programs(device: torch.device) -> None:
    what = Block("first", ACROSS, WITHIN, pool=True)
    # A maximum that is taken from another place, as of rounded maps, is far above these bounds.
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        response = (3 * drawn((1, 8, 18, 18), device)).to(dtype)
        bias = drawn((8,), device, 1).to(dtype)
        assert min(response.shape[2:]) > max(STRIP_ROWS, POSITIONS)  # two strips each way
        exact = with_gradients(plain, what, response.double(), bias.double())
        found = with_gradients(block, what, response, bias)
        assert max(differences(found, exact)) < bound, (dtype, differences(found, exact))


def net_with_the_kernels_is_the_plain_one(device: torch.device) -> None:
    net = AlexNet.from_recipe("code2012", 10, 64, seed=0).to(device).eval()
    results = []
    for compiled in (False, True):
        if compiled:
            net.compile()
        assert net.blocks.fuses == compiled
        net.zero_grad()
        logits = net(60 * drawn((1, 3, 64, 64), device))
        functional.cross_entropy(logits, torch.tensor([3], device=device)).backward()
        results.append([weight.grad for weight in net.parameters() if weight.grad is not None])
    # A rectified unit or a maximum may change where two numbers differ by rounding.
    assert max(differences(results[1], [grad.double() for grad in results[0]])) < 1e-3


def patches_are_the_plain_ones(device: torch.device) -> None:
    kinds = [("bottom_right", 64, torch.contiguous_format), ("bottom_right", 67, LAST)]
    for padding, size, order in [*kinds, ("around", 66, torch.contiguous_format)]:
        recipe = replace(Recipe.named("paper"), conv1_padding=padding)
        plan, weight = Plan(recipe, 10, size), torch.ones(1, device=device)
        images = drawn((2, 3, size, size), device).to(memory_format=order)
        found = patches(images, weight, plan)
        expected = patches(images.requires_grad_(), weight, plan)  # which needs a gradient
        assert torch.equal(found, expected.detach())
        assert found.is_contiguous(memory_format=LAST)


EVERYWHERE = (
    patches_are_the_plain_ones,
    block_is_the_plain_one,
    block_takes_the_first_of_equals,
    block_has_the_infinities_and_nan_of_the_plain_one,
    block_within_maps_is_exact_in_several_programs,
    net_with_the_kernels_is_the_plain_one,
    update_is_bit_for_bit_the_plain_one,
    update_takes_a_gradient_of_other_strides,
    a_zero_rate_or_flag_changes_nothing,
    optimizer_with_the_kernel_equals_the_plain_one,
    crop_is_the_plain_one,
)
SLOW = (  # in the interpreter
    block_is_the_plain_one,
    block_has_the_infinities_and_nan_of_the_plain_one,
    block_within_maps_is_exact_in_several_programs,
    net_with_the_kernels_is_the_plain_one,
)
ON_GPUS = (captured_step_sees_new_rates_and_the_flag, gated_step_in_float64_does_not_wait)


def main(device: torch.device, out: Path, names: list[str]) -> None:
    found: dict[str, str] = {}
    for case in EVERYWHERE + ON_GPUS:
        if case.__name__ not in names:
            continue
        try:
            case(device)
            found[case.__name__] = ""
        except Exception:  # noqa: BLE001 - the test shows it
            found[case.__name__] = traceback.format_exc()[-2000:]
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    place = torch.device(sys.argv[1])
    if place.type == "cuda":
        place = torch.device("cuda", 0)
        torch.cuda.set_device(place)
        # As in a training: rounded sums of squares change which value of a pool is largest.
        torch.backends.cudnn.allow_tf32 = False
    main(place, Path(sys.argv[2]), sys.argv[3:])
