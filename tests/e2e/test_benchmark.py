"""The benchmark as a command, small: its table, and every field of its JSON."""

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
    "counted_bytes",
    "crossing_s",
    "swaps_alone_s",
    "hidden",
    "first_step_s",
    "gflops",
    "share_of_peak",
    "layers",
}
CROSSED = 4 * 4 * (2 * (128 * 9 + 128 + 2048) + 10)  # bytes: 64 pixels, 4 images, 10 classes


@pytest.mark.parametrize(
    "contenders",
    [
        ("plain", "pair"),
        pytest.param(
            ("plain", "layers", "ddp", "tensor_parallel", "in_turn"), marks=pytest.mark.slow
        ),
    ],
)
def test_every_contender_takes_its_turn(tmp_path: Path, contenders: tuple[str, ...]) -> None:
    names = f"contenders=[{','.join(contenders)}]"
    done = subprocess.run(
        [sys.executable, "-m", "modelpar.benchmark", *SMALL, names],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "found" / "benchmark.json").read_text())
    assert set(result) == {"machine", "settings", "peaks", "rows", "timelines"}
    rows = {row["contender"]: row for row in result["rows"]}
    assert tuple(rows) == contenders
    for row in rows.values():
        assert set(row) == FIELDS
        assert row["step_s"]["median"] > 0
        assert row["peak_bytes"] > 100e6
        assert row["ratios"]["plain float32"]["median"] > 0
        assert set(row["layers"]) >= {"conv1", "fc8", "norms", "crossings", "rest"}
    for name in {"in_turn", "pair"} & rows.keys():
        assert rows[name]["counted_bytes"] == CROSSED
        assert CROSSED <= rows[name]["wire_bytes"] < 1.3 * CROSSED  # and headers
        assert rows[name]["crossing_s"] > 0 < rows[name]["swaps_alone_s"]
    if "ddp" in rows:
        assert rows["ddp"]["wire_bytes"] > 60e6  # all gradients
    assert rows["plain"]["wire_bytes"] < 1e4
    for timeline in result["timelines"].values():
        assert {span["place"] for span in timeline[0]} >= {"conv3", "travel", "crossings"}
    assert len(result["timelines"]) == ("pair" in rows)
    assert result["peaks"][0]["float32"]["matrix"] > 0
    assert f"| {contenders[-1]} | float32 |" in done.stdout
    assert (tmp_path / "found" / "benchmark.md").read_text() in done.stdout
    assert (tmp_path / "found" / "benchmark.png").exists()


@pytest.mark.slow
def test_a_slow_wire_is_slower(tmp_path: Path) -> None:
    if os.geteuid() or not (which("ip") and which("tc")):
        pytest.skip("needs root and iproute2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(ROOT / "launch" / "slow_link.sh"), "2", "modelpar.benchmark"]
    done = subprocess.run(
        [*command, *SMALL, "contenders=[pair]", "breakdown=false", "batch_sizes=[16]"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    full, slow = json.loads((tmp_path / "found" / "benchmark.json").read_text())["rows"]
    assert (full["link_mbit"], slow["link_mbit"]) == (None, 2)
    # what does not fit into the bucket travels at the rate, some of it behind the products
    assert slow["crossing_s"] > 0.5 * (4 * CROSSED - (128 << 10)) * 8 / 2e6
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert "modelpar-" not in left.stdout
