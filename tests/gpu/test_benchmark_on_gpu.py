"""modelpar.benchmark on one GPU: shares of what the GPU can do, launches, its own memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
NAMES = ["plain", "plain_compiled", "layers", "column"]


def test_benchmark_reports_what_a_gpu_can_do(gpu_env: dict[str, str], tmp_path: Path) -> None:
    words = ["image_size=64", "num_classes=10", "batch_sizes=[8,16]", "rounds=2", "steps=3"]
    words += [f"contenders=[{','.join(NAMES)}]", "precisions=[float32]", "compile=false"]
    done = subprocess.run(
        [sys.executable, "-m", "modelpar.benchmark", *words],
        cwd=tmp_path,
        env=gpu_env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())
    assert [row["contender"] for row in result["rows"]] == 2 * NAMES, done.stderr
    for row in result["rows"]:
        assert 0 < row["share_of_floor"] < 1
        assert 0 < row["share_of_peak"] < 1
        assert row["kernels"] > 10
        assert row["launches"] > 0
        assert row["peak_bytes"] > 50e6
    eager = next(row for row in result["rows"] if row["contender"] == "plain")
    assert eager["launches"] >= 0.9 * eager["kernels"]  # no graph; libraries may launch two in one
    assert "share of floor" in done.stdout
