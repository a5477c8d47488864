"""Two ranks on one GPU, of which one is killed or suspended."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from processes import children, still_alive
from starting import LAUNCHER, PATIENCE, STEPS, Start

pytestmark = pytest.mark.gpu
TIMEOUT = 15  # s, comm.timeout
RECORDED = ["precision=float32", "compile=true", "cuda_graph=on"]


@pytest.mark.parametrize(
    ("how", "number", "seconds", "reported"),
    [
        # Ten seconds for the launcher; only after 30 s it would kill a rank that hangs.
        ([], signal.SIGKILL, 10, "rank [01] was killed by SIGKILL"),
        (RECORDED, signal.SIGKILL, 10, "rank [01] was killed by SIGKILL"),
        # The other rank waits ten seconds before it reports, and the launcher 30 s for this one.
        (RECORDED, signal.SIGSTOP, 60, "another rank has exited or does not respond"),
    ],
)
def test_a_lost_rank_is_noticed_within_comm_timeout(
    start: Start, tmp_path: Path, how: list[str], number: int, seconds: float, reported: str
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
    os.kill(max(ranks), number)
    assert process.wait(TIMEOUT + seconds) == 6, start.printed("run")
    assert re.search(reported, start.printed("run"))
    assert not still_alive(ranks)
    assert "is not used" not in start.printed("run")  # a step that could not be recorded
