"""Sweeps, from the command line."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import SMALL, TIMEOUT, TINY, fine, ours, rows, started
from processes import children

from modelpar.training.checkpoint import newest

AT_ONCE = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
LOCAL = ["hydra/launcher=submitit_local"]


def swept(folder: Path, images: Path, *words: str) -> subprocess.CompletedProcess[str]:
    root = f"data.root={os.path.relpath(images, folder)}"
    return ours(folder, "-m", *SMALL, *TINY, root, "batch_size=8", "run_dir=sweep", *words)


@pytest.mark.slow
def test_parallel_jobs_are_separate_and_one_may_fail(tmp_path: Path, images: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    rates = "recipe.lr=0.01,1e30,0.02"
    done = swept(tmp_path, images, rates, "steps=2", *AT_ONCE, "cache_dir=cache", "columns=1")
    assert done.returncode == 7, done.stdout + done.stderr
    first, last = done.stderr.splitlines()
    assert "recipe.lr" in first  # of the job itself
    assert last == "modelpar: job 1 (recipe.lr=1e+30): failed with status 7"
    for name, rate in (("0", 0.01), ("2", 0.02)):
        assert f"\n  lr: {rate}\n" in (tmp_path / "sweep" / name / "config.yaml").read_text()
        assert [row["step"] for row in rows(tmp_path / "sweep" / name)] == [1, 2]
    assert len(list((tmp_path / "cache" / "statistics").glob("*.safetensors"))) == 1


@pytest.mark.slow
def test_sweep_on_slurm_creates_a_folder_for_each_job(tmp_path: Path, images: Path) -> None:
    """Submitit starts the jobs as on Slurm; docs has sweeps without it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    how = ["steps=1", "columns=1", "hydra/launcher=submitit_local"]
    fine(swept(tmp_path, images, "seed=0,1", *how))
    losses = [rows(tmp_path / "sweep" / name)[0]["loss"] for name in ("0", "1")]
    assert losses[0] != losses[1]
    failed = swept(tmp_path, images, "seed=0,5", *how)
    assert failed.returncode == 2  # the folder of job 1 holds another run
    assert failed.stderr.splitlines()[-1] == "modelpar: job 1 (seed=5): failed with status 2"


def _at_work(process: int) -> bool:
    """Whether a process still has its memory; one that is ending has none, and no command."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], AT_ONCE, LOCAL], ids=str)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_sweep_saves_and_continues(
    tmp_path: Path, images: Path, launcher: list[str], number: signal.Signals
) -> None:
    """SIGTERM as of ``kill``, to the launcher alone, SIGINT as of a terminal, to all."""
    if launcher:
        plugin = "submitit" if launcher == LOCAL else "joblib"
        pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    jobs, at_once = {"[]": (2, 1), str(AT_ONCE): (3, 2)}.get(str(launcher), (2, 2))
    runs = [f"sweep/{job}" for job in range(at_once)]
    words = [*TINY, f"data.root={images}", "batch_size=8", "run_dir=sweep"]
    seeds = ",".join(str(seed) for seed in range(jobs))
    grid = [f"seed={seeds}", "recipe.lr=1e-5"]  # no job diverges, however late the signal comes
    if launcher:
        grid.append("columns=1")  # two ranks take longer to start; those of one job are enough
    process = started(tmp_path, "-m", *words, *grid, "epochs=1000", *launcher, runs=runs)
    below = children(process.pid, deep=True)
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    _, text = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75, text
    lines = text.splitlines()
    assert (
        lines[-1] == f"modelpar: stopped; the same command with run_dir={tmp_path}/sweep continues"
    )
    assert launcher == LOCAL or len(lines) == len(runs) + 1  # submitit has files for the jobs'
    # Only submitit's jobs do not wait for Python's own trackers.
    deadline = time.monotonic() + (10 if launcher == LOCAL else 0)
    while at_work := [one for one in below if _at_work(one)]:
        assert time.monotonic() < deadline, at_work
        time.sleep(0.1)
    steps = [found.step + 1 for name in runs if (found := newest(tmp_path / name))]
    assert len(steps) == len(runs)
    if launcher and number == signal.SIGINT:
        return  # the same jobs continue after SIGTERM
    fine(swept(tmp_path, images, *grid, f"steps={max(steps)}", *launcher))
    for name in map(str, range(jobs)):
        found = [row["step"] for row in rows(tmp_path / "sweep" / name)]
        assert found == list(range(1, max(steps) + 1))
    if not launcher:  # which has no part in this
        out = fine(swept(tmp_path, images, *grid, f"steps={max(steps)}"))
        assert out.count("): finished, top-1 error ") == jobs
        assert "CPU process" not in out  # no job has started again
