"""share_gpu=true: two ranks on one GPU, started both ways.  This process does not see the GPU."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import children, send, still_alive
from test_exact import relative
from torch import Tensor

from modelpar.training.checkpoint import newest, read_part

pytestmark = pytest.mark.gpu
LAUNCHER = ["-m", "modelpar.train"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
TORCHRUN += ["--nproc-per-node", "2", *LAUNCHER]
SHARED = "two columns on 2 processes that share GPUs (NCCL; this shows correctness, not speed)"
STEPS = 20
TIMEOUT = 15  # s, comm.timeout of a run with a killed rank
PATIENCE = 120  # s for a run to start or to finish


class Start:
    """Start trainings in a folder; end what is left of them after the test."""

    def __init__(self, folder: Path, images: Path, env: dict[str, str]) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[bytes]]()
        first = env.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        self.env = {**env, "CUDA_VISIBLE_DEVICES": first}  # with more, the ranks would not share
        self.words = [
            *("data=imagefolder", f"data.root={images}", "model.image_size=64", "workers=0"),
            *("batch_size=8", "precision=float64", "compile=false", "device=cuda"),
            *("monitor.progress=false", "monitor.tensorboard=false"),
        ]

    def __call__(self, name: str, how: list[str], *words: str) -> subprocess.Popen[bytes]:
        """Start a run in the directory ``name``; it prints to ``name``.txt."""
        with (self.folder / f"{name}.txt").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *how, *self.words, f"run_dir={name}", *words],
                cwd=self.folder,
                env=self.env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def printed(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()


@pytest.fixture
def start(tmp_path: Path, images: Path, gpu_env: dict[str, str]) -> Iterator[Start]:
    start = Start(tmp_path, images, gpu_env)
    yield start
    for process in start.started:
        if process.poll() is None:
            for one in [process.pid, *children(process.pid, deep=True)]:
                send(signal.SIGKILL, one)
            process.wait()


def final_weights(run_dir: Path) -> dict[str, Tensor]:
    found = newest(run_dir)
    assert found is not None
    assert found.step == STEPS
    return read_part(found, "weights", None)


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    start: Start, tmp_path: Path
) -> None:
    """With our kernels and CUDA graphs, and ``deterministic=true``."""
    fast = ("columns=1", "precision=bfloat16", "compile=true", "deterministic=true")
    for name, steps in (("once", STEPS), ("twice", STEPS // 2 - 1), ("twice", STEPS)):
        process = start(name, LAUNCHER, *fast, f"steps={steps}")
        assert process.wait(PATIENCE) == 0, start.printed(name)
        assert "is not used" not in start.printed(name)  # a graph or a kernel
    resumed, once = (final_weights(tmp_path / name) for name in ("twice", "once"))
    for key, value in once.items():
        assert torch.equal(resumed[key], value), key


def test_both_ways_to_start_end_with_the_weights_of_one_process(
    start: Start, tmp_path: Path
) -> None:
    runs = {
        "one": start("one", LAUNCHER, f"steps={STEPS}", "columns=1"),
        "launcher": start("launcher", LAUNCHER, f"steps={STEPS}", "share_gpu=true"),
        "torchrun": start("torchrun", TORCHRUN, f"steps={STEPS}", "share_gpu=true"),
        # With kernels, and exchanges in a CUDA graph: NCCL does not end before the graph has.
        "recorded": start(
            "recorded",
            LAUNCHER,
            *(f"steps={STEPS}", "share_gpu=true"),
            *("precision=float32", "compile=true", "cuda_graph=on"),
        ),
    }
    for name, process in runs.items():
        assert process.wait(PATIENCE) == 0, start.printed(name)
    whole = final_weights(tmp_path / "one")
    for name in ("launcher", "torchrun"):
        assert f"modelpar: {SHARED}, float64" in start.printed(name)
        found = final_weights(tmp_path / name)
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            assert relative(found[key], value) < 1e-12, (name, key)


@pytest.mark.parametrize("how", [[], ["precision=float32", "compile=true", "cuda_graph=on"]])
def test_a_killed_rank_is_noticed_within_comm_timeout(
    start: Start, tmp_path: Path, how: list[str]
) -> None:
    """Also in a recorded step, which NCCL does not watch."""
    words = ("epochs=10000", "data.evaluate_every=10000", f"comm.timeout={TIMEOUT}", *how)
    process = start("run", LAUNCHER, "share_gpu=true", *words)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.read_text().count("\n") > STEPS):
        assert process.poll() is None, start.printed("run")
        assert time.monotonic() < deadline, start.printed("run")
        time.sleep(0.1)
    ranks = children(process.pid)
    os.kill(max(ranks), signal.SIGKILL)
    # Ten more seconds for the launcher; only after 30 s it would kill a rank that hangs.
    assert process.wait(TIMEOUT + 10) == 6, start.printed("run")
    assert re.search("rank [01] was killed by SIGKILL", start.printed("run"))
    assert not still_alive(ranks)
