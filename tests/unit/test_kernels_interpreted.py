"""The kernels in Triton's interpreter, and what holds without them."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from kernel_cases import EVERYWHERE, SLOW, some_rates
from torch import nn

from modelpar import Recipe, gpu
from modelpar.device import CompileError
from modelpar.images.augment import (
    Augmentation,
    CropFlipColour,
    Statistics,
    _crops,
    _gathered_crops,
)
from modelpar.training.optimizer import MomentumDecay, _update, _update_if

TESTS = Path(__file__).parents[1]


def run(*words: str, **env: str) -> None:
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [sys.executable, *words], env=env, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]


@cache
def problems(names: tuple[str, ...]) -> dict[str, str]:
    """What went wrong in each of these cases in the interpreter."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "problems.json"
        run(str(TESTS / "kernel_cases.py"), "cpu", str(out), *names, TRITON_INTERPRET="1")
        return json.loads(out.read_text())


SLOW_CASES = tuple(case.__name__ for case in SLOW)
CASES = tuple(case.__name__ for case in EVERYWHERE if case not in SLOW)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_in_the_interpreter(case: str) -> None:
    pytest.importorskip("triton")
    found = problems(SLOW_CASES if case in SLOW_CASES else CASES)
    assert not found[case], found[case]


def test_package_works_without_triton() -> None:
    run(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "import modelpar.images.loader, modelpar.training.optimizer\n"
        "from modelpar import gpu\n"
        "assert not gpu.available(torch.device('cuda'))\n",
    )


def test_kernels_are_for_gpus() -> None:
    assert not gpu.available(torch.device("cpu"))
    assert not gpu.available(torch.device("meta"))


def optimizer() -> MomentumDecay:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    made = MomentumDecay(net, Recipe.named("paper"))
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight)
    return made


def test_a_kernel_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "available", lambda _: True)
    monkeypatch.setattr("modelpar.training.optimizer.update", lambda *_, **__: None)
    trained = optimizer()
    with pytest.raises(CompileError, match="the update of the weights: the value"):
        trained.compile()
    assert trained.update is _update
    monkeypatch.setattr("modelpar.images.augment.crop", lambda *_: torch.zeros(2, 3, 8, 8))
    statistics = Statistics(torch.zeros(3, 10, 10), torch.ones(3), torch.eye(3))
    augmentation = Augmentation(statistics, 8, scaled=False, device="cpu")
    with pytest.raises(CompileError, match="the crops: the value"):
        augmentation.compile()
    assert not augmentation.fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_augmentation_returns_the_type_that_was_asked_for(dtype: torch.dtype) -> None:
    statistics = Statistics(torch.rand(3, 10, 10), torch.ones(3), torch.eye(3))
    how = {"scaled": True, "device": "cpu"}
    wide, found = (
        Augmentation(statistics, 8, **how),
        Augmentation(statistics, 8, **how, dtype=dtype),
    )
    images = torch.randint(0, 256, (2, 3, 10, 10), dtype=torch.uint8)
    draws = CropFlipColour.of_epoch(0, 0, 2, 2, "per_image")
    pairs = [
        (found.train(images, draws, 0.1), wide.train(images, draws, 0.1)),
        (found.center_crop(images), wide.center_crop(images)),
        *zip(found.ten_crop(images), wide.ten_crop(images), strict=True),
    ]
    for one, other in pairs:
        assert torch.equal(one, other.to(dtype))
        assert one.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_a_step_whose_flag_is_zero_changes_nothing(dtype: torch.dtype) -> None:
    trained = optimizer()
    before = {name: weight.clone() for name, weight in trained.weights().items()}
    trained.step(torch.tensor(0).to(dtype))
    assert all(torch.equal(weight, before[name]) for name, weight in trained.weights().items())
    assert not any(velocity.any() for velocity in trained.velocities().values())
    trained.step(torch.tensor(1).to(dtype))
    assert not any(torch.equal(weight, before[name]) for name, weight in trained.weights().items())


def test_rates_are_written_only_when_they_change() -> None:
    trained = optimizer()
    rates = some_rates(trained, 0.01)
    trained.set_rates(rates)
    version = trained.rates._version
    trained.set_rates(dict(rates))
    assert trained.rates._version == version
    trained.set_rates(some_rates(trained, 0.02))
    assert trained.rates._version > version
    assert [float(rate) for rate in trained.scalars] == [0.02, 0.04, 0.0, 0.0]


@pytest.mark.parametrize("flag", [0, 1])
def test_plain_update_is_undone_where_the_flag_is_zero(flag: int) -> None:
    def state() -> list[list[torch.Tensor]]:
        return [[torch.ones(3)], [torch.ones(3)], [torch.full((3,), 2.0)], [torch.tensor(0.1)]]

    weights, velocities, grads, rates = state()
    copy = torch.zeros(3, dtype=torch.bfloat16)
    _update_if(
        torch.tensor(flag), _update, weights, velocities, grads, rates, [0.0], [0.9], [copy]
    )
    assert torch.allclose(velocities[0], torch.tensor(0.7 if flag else 1.0))
    assert torch.allclose(weights[0], torch.tensor(1.7 if flag else 1.0))
    assert torch.allclose(copy.float(), torch.tensor(1.7 if flag else 0.0), rtol=2**-8)


def test_crops_gathered_on_a_gpu_are_those_of_the_loop() -> None:
    images = torch.randint(0, 256, (9, 3, 40, 40), dtype=torch.uint8)
    draws = CropFlipColour.of_epoch(1, 0, 9, 9, "per_image")
    assert 0 < int(draws.flip.sum()) < 9
    for stored in (images, images[:, :1].expand(-1, 3, -1, -1)):
        assert torch.equal(_gathered_crops(stored, draws, 31), _crops(stored, draws, 31))
