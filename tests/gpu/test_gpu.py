"""What functions of on_gpu.py find on one GPU, in processes that see it; this one does not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import _free_port
from test_exact import RECIPES, assert_equal_states, difference, relative

from modelpar import merge

pytestmark = pytest.mark.gpu


ALONE = ("trajectories", "recorded", "unwaited", "gradient_errors", "loader_errors", "replayed")
TOGETHER = ("trajectories", "recorded", "unwaited", "poisoned")


class Ran(NamedTuple):
    """What functions of on_gpu.py returned, by name."""

    alone: dict[str, Any]  # in a process of its own
    together: list[dict[str, Any]]  # on each of two ranks


def returned(process: subprocess.Popen[str], out: Path) -> dict[str, Any]:
    _, stderr = process.communicate(timeout=280)
    sys.stdout.write(stderr)
    assert process.returncode == 0, stderr[-4000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def ran(gpu_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Run them all: one process, and at the same time two ranks, on one GPU."""
    folder, port = tmp_path_factory.mktemp("ran"), str(_free_port())
    first = gpu_env.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [{**shared, "MASTER_PORT": port, "RANK": at, "LOCAL_RANK": at} for at in "01"]
    outs = [folder / f"{number}.pt" for number in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "on_gpu.py"), str(out), *names],
            env={**gpu_env, "CUDA_VISIBLE_DEVICES": first, **more},
            stderr=subprocess.PIPE,
            text=True,
        )
        for out, names, more in zip(outs, (ALONE, TOGETHER, TOGETHER), ({}, *ranks), strict=True)
    ]
    try:
        alone, *together = map(returned, processes, outs)
        yield Ran(alone, together)
    finally:
        for process in processes:
            process.kill()


def value(of: dict[str, Any], name: str) -> Any:
    """Return what a function returned."""
    assert not isinstance(of[name], str), of[name]
    return of[name]


def test_two_ranks_on_one_gpu_end_with_the_weights_of_one_rank(ran: Ran) -> None:
    columns = [value(one, "trajectories") for one in ran.together]
    whole = value(ran.alone, "trajectories")
    for recipe in (*RECIPES[:2], "rules"):
        for column in columns:
            assert relative(column[recipe]["logits"], whole[recipe]["logits"]) < 1e-12
            assert column[recipe]["losses"] == pytest.approx(whole[recipe]["losses"], rel=1e-12)
        for kind in {"gradients", "weights", "velocities", "ema"} & whole[recipe].keys():
            parts = [column[recipe][kind] for column in columns]
            assert_equal_states(parts, whole[recipe][kind])


def test_recorded_steps_of_two_ranks_are_those_of_one(ran: Ran) -> None:
    """With our kernels, in CUDA graphs with their exchanges, in float32."""
    columns = [value(one, "recorded") for one in ran.together]
    whole = value(ran.alone, "recorded")
    for column in columns:
        assert column["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    merged = merge([column["weights"] for column in columns])
    for name, weight in whole["weights"].items():
        assert difference(merged[name], weight.double()) < 1e-3, name


def test_recorded_steps_are_bit_for_bit_those_without_a_graph(ran: Ran) -> None:
    found = value(ran.alone, "replayed")
    for precision in ("float32", "bfloat16"):
        without, recorded = (found[f"{precision} {graphs}"] for graphs in ("off", "on"))
        assert torch.equal(recorded["losses"], without["losses"])
        for kind in ("weights", "velocities"):
            for name, weight in without[kind].items():
                assert torch.equal(recorded[kind][name], weight), (precision, kind, name)


def test_nan_on_one_rank_stops_both_and_changes_no_weight(ran: Ran) -> None:
    for column in (value(one, "poisoned") for one in ran.together):
        assert column["good"] == [True] * 19 + [False] * 5
        before, after = column["states"]
        for kind, tensors in before.items():
            for name, tensor in tensors.items():
                assert torch.equal(after[kind][name], tensor), (kind, name)


def test_host_never_waits_for_a_step(ran: Ran) -> None:
    for one in (ran.alone, *ran.together):
        assert value(one, "unwaited") == {"bfloat16": 11, "float64": 11}


def test_float32_gradients_are_those_of_float64_on_the_cpu(ran: Ran) -> None:
    errors = value(ran.alone, "gradient_errors")
    assert len(errors) == 2 * 2 * 16
    assert max(errors.values()) < 1e-3, errors  # rounding; a rectified unit may change its sign


def test_loader_on_a_busy_gpu_yields_the_batches_of_the_cpu(ran: Ran) -> None:
    errors = value(ran.alone, "loader_errors")
    assert len(errors) == 3 * 2 * 2 * 12  # ways to read, to crop, epochs, batches
    assert max(errors.values()) < 1e-3, errors  # of pixel values 0 to 255
