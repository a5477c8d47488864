"""modelpar.benchmark as a command with small settings: tables, JSON, traces, and a slow link."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "image_size=64",
    "num_classes=10",
    "batch_sizes=[4]",
    "rounds=1",
    "steps=1",
    "precisions=[float32]",
    "compile=false",
    "out=found",
    "breakdown=true",
]
FIELDS = {
    "contender",
    "what",
    "precision",
    "batch_size",
    "link_mbit",
    "processes",
    "rounds_s",
    "step_s",
    "images_per_s",
    "ratios",
    "peak_bytes",
    "wire_bytes",
    "first_step_s",
    "gflops",
    "share_of_peak",
    "traces",
}
CROSSED = 4 * 4 * (2 * (128 * 9 + 128 + 2048) + 10)  # bytes: 64 pixels, 4 images, 10 classes


@pytest.mark.slow
def test_every_contender_is_timed_and_traced(tmp_path: Path) -> None:
    contenders = ("plain", "layers", "ddp", "tensor_parallel", "in_turn", "pair")
    words = f"contenders=[{','.join(contenders)}]"
    done = subprocess.run(
        [sys.executable, "-m", "modelpar.benchmark", *SMALL, words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "found" / "benchmark.json").read_text())
    assert set(result) == {"machine", "settings", "peaks", "rows"}
    rows = {row["contender"]: row for row in result["rows"]}
    assert tuple(rows) == contenders
    for row in rows.values():
        assert set(row) == FIELDS
        assert row["step_s"]["median"] > 0
        assert row["peak_bytes"] > 100e6
        assert row["ratios"]["plain float32"]["median"] > 0
        assert len(row["traces"]) == row["processes"]
        for path in row["traces"]:
            with gzip.open(tmp_path / path) as file:
                names = {event["name"] for event in json.load(file)["traceEvents"]}
            assert "aten::convolution" in names
            assert ("gloo:send" in names) == (row["contender"] in {"in_turn", "pair"})
    for name in ("in_turn", "pair"):
        assert CROSSED <= rows[name]["wire_bytes"] < 1.02 * CROSSED  # gloo's messages have headers
    assert rows["ddp"]["wire_bytes"] > 60e6  # all gradients
    assert rows["plain"]["wire_bytes"] == rows["layers"]["wire_bytes"] == 0
    assert result["peaks"][0]["float32"] > 0
    assert f"| {contenders[-1]} | float32 |" in done.stdout
    assert (tmp_path / "found" / "benchmark.md").read_text() in done.stdout


@pytest.mark.slow
def test_step_over_a_slow_link_takes_as_long_as_its_bytes_do(tmp_path: Path) -> None:
    if os.geteuid() or not (which("ip") and which("tc")):
        pytest.skip("needs root and iproute2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(ROOT / "launch" / "slow_link.sh"), "2", "modelpar.benchmark"]
    done = subprocess.Popen(
        [*command, *SMALL, "contenders=[pair]", "batch_sizes=[16]"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    shown, _ = done.communicate(timeout=240)
    assert done.returncode == 0, shown
    full, slow = json.loads((tmp_path / "found" / "benchmark.json").read_text())["rows"]
    assert (full["link_mbit"], slow["link_mbit"]) == (None, 2)
    # what does not fit into the bucket is sent at the rate
    assert slow["step_s"]["median"] > (4 * CROSSED - (128 << 10)) * 8 / 2e6
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert f"modelpar-{done.pid}-" not in left.stdout  # others may be those of another test
