"""share_gpu=true: two ranks on one GPU, started both ways."""

from pathlib import Path

import pytest
from starting import LAUNCHER, PATIENCE, STEPS, Start, final_weights
from test_exact import relative

pytestmark = pytest.mark.gpu
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
TORCHRUN += ["--nproc-per-node", "2", *LAUNCHER]
SHARED = "two columns on 2 processes that share GPUs (NCCL; this shows correctness, not speed)"


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
        assert "is not used" not in start.printed(name)  # a step that could not be recorded
    whole = final_weights(tmp_path / "one")
    for name in ("launcher", "torchrun"):
        assert f"modelpar: {SHARED}, float64" in start.printed(name)
        found = final_weights(tmp_path / name)
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            assert relative(found[key], value) < 1e-12, (name, key)
