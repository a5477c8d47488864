"""Sweeps: what is checked before the first job, and what the end of a job does to the others."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from modelpar import config, errors, overrides, sweep
from modelpar.errors import SettingsError
from modelpar.sweep import Sweep

SMALL = ["data=synthetic", "model.image_size=64", "workers=0", "batch_size=8", "compile=false"]


class Jobs:
    """Takes the place of the processes: notes each job's words and its exit status."""

    def __init__(self) -> None:
        self.words: list[list[str]] = []
        self.status: Callable[[str], int] = lambda _: 0
        self.top1: Callable[[str], float | None] = lambda _: 10.0

    def __call__(self, words: list[str]) -> int:
        self.words.append(words)
        line = " ".join(words)
        if (top1 := self.top1(line)) is not None:
            run_dir = Path(words[-1].partition("=")[2].strip('"'))
            rows = [{"kind": "test", "step": step, "top1": top1 + 2 - step} for step in (1, 2)]
            (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kin')
        return self.status(line)

    def values(self, key: str) -> list[str]:
        """Return the values that the jobs had for a key."""
        found = [dict(word.split("=", 1) for word in words) for words in self.words]
        return [words[key] for words in found]


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modelpar-train"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sweep, "_handle_signals", lambda _: None)
    made = Jobs()
    monkeypatch.setattr(Sweep, "_run", lambda self, words: made(words))  # noqa: ARG005
    return made


def run(*words: str) -> int:
    """Run a sweep in this process; return its exit status."""
    return errors.status_of(lambda: sweep.run("train", ["-m", *SMALL, "run_dir=sweep", *words]))


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines of modelpar on stderr; Optuna logs there, too."""
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("modelpar: ")]


# -- before the first job ------------------------------------------------------------------------

WRONG = [
    ("experiment=two_columns,no_lnr", "experiment=no_lnr: did you mean no_lrn?"),
    ("experiment=glob(no_such*)", "experiment=glob(no_such*): matches nothing"),
    ("recipe=code2012,code2013", "recipe=code2013: did you mean code2012?"),
    ("batch_size=8,many", "batch_size=many: use a whole number"),
    ("batch_size=8,-1", "batch_size=-1: use 1 or more"),
    ("batchsize=8,16", "batchsize: no such setting; did you mean batch_size?"),
    ("model.norm=none,batchnorm", "model.norm=batchnorm"),
    ("model.net=two_columns,apart", "model.net=apart: this value is now called no_crossing"),
    ("columns=1,3", "columns=3: use one of 1, 2"),
    ("+new=1,2", "new: no such setting"),
    ("seed=0,[", "seed=0,["),
    ("on_failure=halt", "on_failure=halt: use one of continue, stop"),
    ("on_failure=go_on", "on_failure=go_on: this value is now called continue"),
    ("hydra/launcher=jobli", "hydra/launcher=jobli: did you mean joblib?"),
    ("hydra/sweeper=optun", "hydra/sweeper=optun: did you mean optuna?"),
    ("run_dir=a,b", "run_dir: several values"),
    ("--config-dir=conf", "not --config-dir=conf"),
    ("recipe.lr=interval(0.1,1)", "requires hydra/sweeper=optuna"),
]


@pytest.mark.parametrize(("word", "expected"), WRONG)
def test_a_wrong_value_is_one_line_before_any_job(
    jobs: Jobs, capfd: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    assert run("seed=0,1", word) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("modelpar: ")
    assert expected in line
    assert not jobs.words
    assert not list(Path().iterdir())


def test_a_switch_that_the_net_lacks_is_one_line_before_any_job(
    jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("model.net=two_columns,four_layer", "model.dropout=0.5") == 2
    assert "model.dropout=0.5: model.net=four_layer takes only" in lines(capfd)[0]
    assert not jobs.words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.net=two_columns,one_column"], "model.net=one_column: has one column"),
        (["model.norm=response,batch", "accumulate=2"], "normalized alone; use accumulate=1"),
    ],
    ids=["columns", "norm"],
)
def test_a_net_that_cannot_be_split_or_cut_is_one_line_before_any_job(
    jobs: Jobs, capfd: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert run(*words) == 2
    assert expected in lines(capfd)[0]
    assert not jobs.words


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(overrides.PLUGINS["hydra/launcher"], "absent", "slurm")
    with pytest.raises(SettingsError, match=r"not installed; pip install 'modelpar\[slurm\]'"):
        config.check_sweep("train", ["hydra/launcher=absent"])


def test_a_folder_with_a_run_is_refused(jobs: Jobs, capfd: pytest.CaptureFixture[str]) -> None:
    Path("sweep").mkdir()
    Path("sweep/config.yaml").touch()
    assert run("seed=0,1") == 2
    assert "holds a run, not a sweep" in lines(capfd)[0]
    assert not jobs.words


def test_globs_and_lists_are_combined_and_each_job_has_a_run_dir(
    jobs: Jobs, tmp_path: Path
) -> None:
    jobs.top1 = lambda _: None  # a job that was not evaluated has not failed
    assert run("experiment=glob(no_lrn*)", "seed=0,1") == 0
    found = list(zip(jobs.values("experiment"), jobs.values("seed"), strict=True))
    assert found == [("no_lrn", "0"), ("no_lrn", "1"), ("no_lrn2", "0"), ("no_lrn2", "1")]
    assert jobs.values("run_dir") == [f'"{tmp_path}/sweep/{number}"' for number in range(4)]


# -- how a job ends ------------------------------------------------------------------------------


def test_a_failed_job_is_one_line_at_the_end_and_the_others_run(
    jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.status = lambda line: 7 if "seed=1" in line else 0
    assert run("seed=0,1,2") == 7
    assert jobs.values("seed") == ["0", "1", "2"]
    assert lines(capfd) == ["modelpar: job 1 (seed=1): failed with status 7"]


def test_on_failure_stop_starts_no_further_job(
    jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.status = lambda line: 6 if "seed=1" in line else 0
    assert run("seed=0,1,2", "on_failure=stop") == 6
    assert jobs.values("seed") == ["0", "1"]
    assert lines(capfd) == ["modelpar: job 1 (seed=1): failed with status 6"]
    jobs.status = lambda _: 0
    assert run("seed=0,1,2", "on_failure=stop") == 0  # the earlier end is over
    assert jobs.values("seed") == ["0", "1", "1", "2"]  # and job 0 had finished


def test_a_stopped_job_stops_the_sweep(
    jobs: Jobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.status = lambda line: 75 if "seed=1" in line else 0
    assert run("seed=0,1,2") == 75
    assert jobs.values("seed") == ["0", "1"]
    assert lines(capfd) == [
        f"modelpar: stopped; the same command with run_dir={tmp_path}/sweep continues"
    ]


def test_a_finished_job_is_not_started_again(
    jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("seed=0,1", "steps=2") == 0
    assert run("seed=0,1,2", "steps=2") == 0
    assert jobs.values("seed") == ["0", "1", "2"]
    assert "modelpar: job 0 (seed=0): finished, top-1 error 10.00 %" in capfd.readouterr().out
    assert run("seed=0,1", "steps=3") == 0  # there is more to do now
    assert jobs.values("seed") == ["0", "1", "2", "0", "1"]


# -- search --------------------------------------------------------------------------------------


def test_a_search_survives_diverged_jobs_and_resumes(
    jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    rate: Callable[[str], float] = lambda line: float(line.split("recipe.lr=")[1].split()[0])  # noqa: E731
    jobs.top1 = lambda line: None if len(jobs.words) == 3 else 100 * rate(line)
    jobs.status = lambda _: 7 if len(jobs.words) == 2 else 0
    assert run("search=rate", "hydra.sweeper.n_trials=5") == 7
    rates = [float(value) for value in jobs.values("recipe.lr")]
    assert len(set(rates)) == 5
    assert all(0.001 <= value <= 0.1 for value in rates)
    assert lines(capfd) == [f"modelpar: job 1 (recipe.lr={rates[1]}): failed with status 7"]
    best = OmegaConf.load("sweep/optimization_results.yaml")
    assert best.best_value == pytest.approx(100 * min(rates[0], *rates[3:]))
    assert run("search=rate", "hydra.sweeper.n_trials=2") == 0
    assert [float(value) for value in jobs.values("recipe.lr")[5:]] == rates[1:2]


def test_a_search_whose_jobs_all_failed_ends_with_their_status(
    jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    jobs.status = lambda _: 3
    assert run("search=rate", "hydra.sweeper.n_trials=2") == 3
    first, *failed = lines(capfd)
    assert "No trials are completed yet" in first
    assert [line.endswith("failed with status 3") for line in failed] == [True, True]


# -- the process of a job -------------------------------------------------------------------------

WAITS = """
import signal, sys, time
def stop(number, frame):
    open("signals", "a").write("x")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open("started", "w").close()
time.sleep(60)
"""


def test_a_signal_reaches_a_running_job_and_the_sweep_ends_with_75(tmp_path: Path) -> None:
    """A package of this name takes the place of ``modelpar.train``, whose start takes seconds."""
    (tmp_path / "job.py").write_text(WAITS)
    script = (
        "import os, sys; from pathlib import Path\n"
        "from modelpar import sweep\n"
        "folder = Path('sweep').absolute()\n"
        "(folder / 'log').mkdir(parents=True)\n"
        "s = sweep.Sweep('train', folder, set(), os.getpid())\n"
        "real = sweep.subprocess.Popen\n"
        "sweep.subprocess.Popen = lambda command, **k: real([sys.executable, 'job.py'], **k)\n"
        "sweep._handle_signals(s.request_stop)\n"
        "print(s._run([]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out.strip() == "75"
    assert (tmp_path / "signals").read_text() == "x"
