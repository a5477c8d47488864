"""launch/gpu_check.sh, with a stand-in for Python: which parts run, and what the report says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "gpu_check.sh"
STAND_IN = """#!/bin/sh
echo "ran: $*"
case "$2" in pytest) exit 3;; modelpar.benchmark) exit 124;; esac
"""
MOST = 420  # s
SEARCH, KILL = 25, 3  # s that the script leaves to find a GPU, and to kill a part that hangs


def check(python: str | Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *words],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def test_a_part_that_fails_does_not_stop_the_others(stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "one.whl").touch()
    report = tmp_path / "report.txt"
    done = check(stand_in, report, tmp_path / "wheels")
    assert done.returncode == 1
    text = report.read_text()
    assert text.startswith("\n== versions, at most ")
    assert text.endswith(done.stdout)
    assert re.sub(r"\d+ s\n", "N s\n", done.stdout) == (
        "\n== summary\n"
        "versions: passed, N s\n"
        "wheels: passed, N s\n"
        "tests: failed with status 3, N s\n"
        "benchmark: failed, it took too long, N s\n"
        "training: passed, N s\n"
    )
    ran = re.findall(r"^ran: (.*)", text, re.MULTILINE)
    assert [line.split()[1] for line in ran[1:]] == [
        "pip",
        "pytest",
        "modelpar.benchmark",
        "modelpar.train",
    ]
    assert ran[1].endswith("/packages " + str(tmp_path / "wheels" / "one.whl"))
    limits = re.findall(r"^== .*, at most (\d+) s:", text, re.MULTILINE)
    assert len(limits) == 5
    assert SEARCH + sum(int(limit) + KILL for limit in limits) <= MOST


def test_a_machine_without_a_gpu_is_refused_in_one_line(tmp_path: Path) -> None:
    done = check(sys.executable, tmp_path / "report.txt")
    assert done.returncode == 5
    assert done.stderr == (
        f"modelpar: launch/gpu_check.sh needs a GPU, and torch in {sys.executable} finds none\n"
    )
    assert not (tmp_path / "report.txt").exists()


def test_a_report_that_cannot_be_written_is_one_line(stand_in: Path, tmp_path: Path) -> None:
    done = check(stand_in, tmp_path / "nowhere" / "report.txt")
    assert done.returncode == 2
    assert done.stderr.startswith(f"modelpar: {tmp_path}/nowhere/report.txt: cannot be written")
