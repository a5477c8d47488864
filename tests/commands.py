"""Commands as a user runs them, started by tests."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL = ["batch_size=16", "monitor.progress=false", "compile=false"]  # quick to start
TINY = ["data=imagefolder", "model.image_size=64", "monitor.tensorboard=false", "workers=0"]
TIMEOUT = 280  # s


def run(words: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def ours(cwd: Path, *words: str, main: str = "train") -> subprocess.CompletedProcess[str]:
    return run(["-m", f"modelpar.{main}", *words], cwd)


def fine(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


# One batch to test on, and no net that diverges, however late a signal comes.
QUICK = ["data=synthetic", "model.image_size=64", "recipe.lr=1e-5", "monitor.tensorboard=false"]


TRAIN = (sys.executable, "-m", "modelpar.train")


def started(
    folder: Path, *words: str, runs: Sequence[str] = ("run",), command: Sequence[str] = TRAIN
) -> subprocess.Popen[str]:
    """Start a training by ``command``; wait until all ``runs`` have trained two steps."""
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [*command, *SMALL, "run_dir=run", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + TIMEOUT
    for metrics in (folder / name / "metrics.jsonl" for name in runs):
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    return process
