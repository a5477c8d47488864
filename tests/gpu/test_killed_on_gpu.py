"""Two ranks on one GPU, of which one is killed."""

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
    assert "is not used" not in start.printed("run")  # a step that could not be recorded
