"""The kernels on one GPU, in a process that sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import EVERYWHERE, ON_GPUS

pytestmark = pytest.mark.gpu
CASES = [case.__name__ for case in EVERYWHERE + ON_GPUS]
SCRIPT = Path(__file__).parents[1] / "kernel_cases.py"


@pytest.fixture(scope="module")
def problems(gpu_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each case on the GPU."""
    out = tmp_path_factory.mktemp("cases") / "problems.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "cuda", str(out), *CASES],
        env=gpu_env,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(problems: dict[str, str], case: str) -> None:
    assert not problems[case], problems[case]
