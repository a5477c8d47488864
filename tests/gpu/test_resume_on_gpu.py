"""A run on one GPU that is interrupted and resumed."""

from pathlib import Path

import pytest
import torch
from starting import LAUNCHER, PATIENCE, STEPS, Start, final_weights

pytestmark = pytest.mark.gpu


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
