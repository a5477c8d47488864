"""The package on one GPU.  Each test starts processes that see it; this process does not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import _free_port
from test_exact import RECIPES, assert_equal_states, difference, relative

from modelpar import merge

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu


def start(function: str, out: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "on_gpu.py"), function, str(out)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str], out: Path) -> Any:
    _, stderr = process.communicate(timeout=280)
    assert process.returncode == 0, stderr[-4000:]
    return torch.load(out, weights_only=True)


def on_two_ranks(function: str, env: dict[str, str], folder: Path) -> list[Any]:
    """NCCL refuses two ranks on one GPU, unless they seem to be on two hosts."""
    port = str(_free_port())
    outs = [folder / f"{function}-{rank}.pt" for rank in (0, 1)]
    ranks = [
        start(
            function,
            out,
            {
                **env,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "NCCL_HOSTID": f"host{rank}",
                "NCCL_SOCKET_IFNAME": "lo",
                "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        for rank, out in enumerate(outs)
    ]
    try:
        return [result(process, out) for process, out in zip(ranks, outs, strict=True)]
    finally:
        for process in ranks:
            process.kill()


def test_two_ranks_on_one_gpu_end_with_the_weights_of_one_rank(
    gpu_env: dict[str, str], tmp_path: Path
) -> None:
    columns = on_two_ranks("trajectories", gpu_env, tmp_path)
    one = tmp_path / "one.pt"
    whole = result(start("trajectories", one, gpu_env), one)
    for recipe in RECIPES[:2]:
        for column in columns:
            assert relative(column[recipe]["logits"], whole[recipe]["logits"]) < 1e-12
            assert column[recipe]["losses"] == pytest.approx(whole[recipe]["losses"], rel=1e-12)
        for kind in ("gradients", "weights", "velocities"):
            parts = [column[recipe][kind] for column in columns]
            assert_equal_states(parts, whole[recipe][kind])


def test_recorded_steps_of_two_ranks_are_those_of_one(
    gpu_env: dict[str, str], tmp_path: Path
) -> None:
    """With our kernels, in CUDA graphs with their exchanges, in float32."""
    columns = on_two_ranks("recorded", gpu_env, tmp_path)
    one = tmp_path / "one.pt"
    whole = result(start("recorded", one, gpu_env), one)
    for column in columns:
        assert column["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    merged = merge([column["weights"] for column in columns])
    for name, weight in whole["weights"].items():
        assert difference(merged[name], weight.double()) < 1e-3, name


def test_float32_gradients_are_those_of_float64_on_the_cpu(
    gpu_env: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "errors.pt"
    errors = result(start("gradient_errors", out, gpu_env), out)
    assert len(errors) == 2 * 2 * 16
    assert max(errors.values()) < 1e-3, errors  # rounding; a rectified unit may change its sign


def test_loader_on_a_busy_gpu_yields_the_batches_of_the_cpu(
    gpu_env: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "errors.pt"
    errors = result(start("loader_errors", out, gpu_env), out)
    assert len(errors) == 3 * 2 * 2 * 12  # ways to read, to crop, epochs, batches
    assert max(errors.values()) < 1e-3, errors  # of pixel values 0 to 255


def test_train_evaluate_figures_and_export_finish(
    gpu_env: dict[str, str], images: Path, tmp_path: Path
) -> None:
    def run(command: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"modelpar.{command}", *words],
            cwd=tmp_path,
            env=gpu_env,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    root = f"data.root={images}"
    data = ["data=imagefolder", root, "workers=0", "batch_size=8"]
    small = [*data, "model.image_size=64", "columns=1", "device=cuda", "monitor.progress=false"]
    shown = run("train", *small, "epochs=1", "run_dir=run")
    assert "torch.compile is not used" not in shown
    run(
        "evaluate", "checkpoint=run", f"data.root={images}", "columns=1", "device=cuda", "views=10"
    )
    run("figures", "checkpoint=run", root, "device=cuda", "out=figures")
    assert (tmp_path / "figures" / "figure4.png").exists()
    run("export", "checkpoint=run", "out=net.safetensors")
    assert (tmp_path / "net.safetensors").exists()
