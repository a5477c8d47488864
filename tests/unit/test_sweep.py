"""Sweeps: what is checked before the first job, what a job's end does to the others."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from modelpar import config, train
from modelpar.distributed import Mesh
from modelpar.errors import DivergedError, PeerLostError, SettingsError, StoppedError
from modelpar.training import prepare, trainer

agent = pytest.importorskip("modelpar.agent", reason="a sweep's jobs are now processes")
SMALL = [
    "data=imagefolder",
    "model.image_size=64",
    "workers=0",
    "batch_size=8",
    "steps=2",
    "monitor.progress=false",
    "monitor.tensorboard=false",
    "compile=false",
]


@pytest.fixture
def place(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modelpar-train"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    (tmp_path / "images").symlink_to(images)
    return tmp_path


class Launched:
    """Stands for torchrun's agent: the settings it was given, and how each job ends."""

    def __init__(self, end: Callable[[Any], float]) -> None:
        self.end = end
        self.settings: list[Any] = []
        self.folders: list[str] = []

    def __call__(
        self, job: Any, settings: Any, ranks: int, run_dir: Path, handled: Any = None
    ) -> float:
        del job, ranks, handled
        self.settings.append(settings)
        self.folders.append(str(run_dir))
        return self.end(settings)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    stand_in = Launched(lambda settings: 10.0 + settings.seed)
    monkeypatch.setattr(agent, "launch", stand_in)
    return stand_in


def swept(*words: str) -> Any:
    """Run a sweep in this process; return its exit status."""
    sys.argv = ["modelpar-train", "-m", *SMALL, "data.root=images", "run_dir=sweep", *words]
    with pytest.raises(SystemExit) as end:
        train.main()
    return end.value.code


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()


def raises(error: BaseException, seed: int) -> Callable[[Any], float]:
    def end(settings: Any) -> float:
        if settings.seed == seed:
            raise error
        return 10.0

    return end


# -- before the first job ------------------------------------------------------------------------

WRONG = [
    ("experiment=two_columns,no_lnr", "experiment=no_lnr: did you mean no_lrn?"),
    ("experiment=glob(no_such*)", "experiment=glob(no_such*): stands for nothing"),
    ("recipe=code2012,code2013", "recipe=code2013: did you mean code2012?"),
    ("batch_size=8,many", "batch_size: Value 'many'"),
    ("batchsize=8,16", "batchsize: no such setting; did you mean batch_size?"),
    ("+new=1,2", "new: no such setting"),
    ("seed=0,[", "seed=0,["),
    ("on_failure=halt", "on_failure=halt: use one of continue, stop"),
    ("hydra/launcher=jobli", "hydra/launcher=jobli: did you mean joblib?"),
    ("hydra/sweeper=optun", "hydra/sweeper=optun: did you mean optuna?"),
    ("run_dir=a,b", "run_dir: several values"),
    ("--config-dir=conf", "--config-dir=conf does not go with -m"),
    ("recipe.lr=interval(0.1,1)", "does not support sweep type"),
]


@pytest.mark.parametrize(("word", "expected"), WRONG)
def test_what_is_wrong_is_told_before_any_job(
    place: Path, launched: Launched, capfd: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    assert swept("seed=0,1", word) == 2
    (line,) = said(capfd)
    assert line.startswith("modelpar: ")
    assert expected in line
    assert not launched.settings
    assert [path.name for path in place.iterdir()] == ["images"]


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.PLUGINS["hydra/launcher"], "absent", "slurm")
    with pytest.raises(SettingsError, match=r"not installed; pip install 'modelpar\[slurm\]'"):
        config.check_sweep("train", ["hydra/launcher=absent"])


def test_a_sweep_takes_globs_and_combines_lists(place: Path, launched: Launched) -> None:
    launched.end = lambda _: math.nan  # nothing measured is no failure
    assert swept("experiment=glob(no_lrn*)", "seed=0,1") == 0
    found = [(settings.experiment, settings.seed) for settings in launched.settings]
    assert found == [("no_lrn", 0), ("no_lrn", 1), ("no_lrn2", 0), ("no_lrn2", 1)]
    assert launched.folders == [str(place / "sweep" / str(number)) for number in range(4)]


def test_a_search_is_a_sweep(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sys.argv = ["modelpar-train", "search=rate"]
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    assert "run python -m modelpar.train -m search=rate" in said(capfd)[0]
    assert [path.name for path in place.iterdir()] == ["images"]


# -- how a job ends ------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_a_failed_job_says_why_and_the_sweep_goes_on(
    launched: Launched, capfd: pytest.CaptureFixture[str]
) -> None:
    launched.end = raises(DivergedError("step 2: the loss is nan"), 1)
    assert swept("seed=0,1,-5,2") == 7  # the first that failed
    assert [settings.seed for settings in launched.settings] == [0, 1, 2]
    failed = [
        "modelpar: job 1 (seed=1): step 2: the loss is nan",
        "modelpar: job 2 (seed=-5): seed=-5: give 0 or more",
    ]
    assert said(capfd) == [*failed, "modelpar: 2 jobs failed:", *failed]


@pytest.mark.usefixtures("place")
def test_or_it_stops_as_asked(launched: Launched, capfd: pytest.CaptureFixture[str]) -> None:
    launched.end = raises(PeerLostError("rank 1 was ended by SIGKILL"), 1)
    assert swept("seed=0,1,2", "on_failure=stop") == 6
    assert [settings.seed for settings in launched.settings] == [0, 1]
    assert said(capfd)[1] == "modelpar: 1 job failed:"
    launched.end = lambda _: 10.0
    assert swept("seed=2", "on_failure=stop") == 0  # what stopped it is over


@pytest.mark.usefixtures("place")
def test_a_bug_in_a_job_brings_its_traceback_and_no_other(
    launched: Launched, capfd: pytest.CaptureFixture[str]
) -> None:
    launched.end = raises(ZeroDivisionError("a bug"), 0)
    assert swept("seed=0,1") == 1
    assert len(launched.settings) == 2
    lines = said(capfd)
    assert lines.count("Traceback (most recent call last):") == 1
    assert lines[-1] == "modelpar: job 0 (seed=0): ZeroDivisionError: a bug"


@pytest.mark.parametrize(
    "error",
    [StoppedError("sweep/1: asked to stop, saved at step 1 of 2; so"), KeyboardInterrupt()],
)
def test_a_job_that_was_asked_to_stop_stops_the_sweep(
    place: Path, launched: Launched, capfd: pytest.CaptureFixture[str], error: BaseException
) -> None:
    launched.end = raises(error, 1)
    assert swept("seed=0,1,2") == 75
    assert [settings.seed for settings in launched.settings] == [0, 1]
    lines = said(capfd)
    assert lines[-1] == f"modelpar: stopped; the same command with run_dir={place}/sweep goes on"
    if isinstance(error, StoppedError):
        assert "job 1 (seed=1): sweep/1: asked to stop, saved at step 1 of 2" in lines[0]


def test_a_finished_job_starts_nothing(
    place: Path, launched: Launched, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = config.read("train", [*SMALL, "data.root=images", "columns=1"])
    prepared = prepare.prepare(settings)
    alone, run_dir = Mesh(torch.device("cpu")), place / "sweep" / "0"
    top1 = trainer.train(settings, prepared, alone, run_dir)
    start = prepare.resume_point(settings, prepared, run_dir)
    assert prepare.final_error(prepared, run_dir, start) == top1
    assert swept("columns=1", "seed=0,1") == 0
    assert [settings.seed for settings in launched.settings] == [1]
    finished = f"modelpar: job 0 (seed=0): finished, top-1 {top1:.2f} %"
    assert finished in capfd.readouterr().out
    assert swept("columns=1", "seed=0", "steps=3") == 0  # there is more to do now
    assert [settings.seed for settings in launched.settings] == [1, 0]
    assert swept("columns=1", "seed=5") == 2  # another command: its folder holds another run
    assert "job 0: run_dir=" in (lines := said(capfd))[0]
    assert "holds a run with seed=0, not 5" in lines[0]


# -- search --------------------------------------------------------------------------------------


def test_a_search_survives_rates_that_diverge_and_takes_itself_up(
    place: Path, launched: Launched, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

    def end(settings: Any) -> float:
        if len(launched.settings) == 2:
            raise DivergedError("step 2: the loss is nan")
        return math.nan if len(launched.settings) == 3 else 100 * settings.recipe.lr

    launched.end = end
    assert swept("search=rate", "hydra.sweeper.n_trials=5") == 7
    rates = [settings.recipe.lr for settings in launched.settings]
    assert len(set(rates)) == 5
    assert all(0.001 <= rate <= 0.1 for rate in rates)
    assert f"job 1 (recipe.lr={rates[1]}): step 2: the loss is nan" in said(capfd)[-1]
    best = OmegaConf.load(place / "sweep" / "optimization_results.yaml")
    assert best.best_value == pytest.approx(100 * min(rates[0], *rates[3:]))
    assert swept("search=rate", "hydra.sweeper.n_trials=2") == 0
    assert [settings.recipe.lr for settings in launched.settings[5:]] == rates[:2]


def test_a_search_of_failures_alone_ends_with_theirs(
    place: Path, launched: Launched, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert swept("search=rate", "hydra.sweeper.n_trials=2", "batch_size=0") == 2
    lines = [line for line in said(capfd) if line.startswith("modelpar: ")]  # Optuna logs, too
    assert not launched.settings
    assert lines[2:4] == [
        "modelpar: optuna: No trials are completed yet.",
        "modelpar: 2 jobs failed:",
    ]
    assert [line.endswith("batch_size=0: give 1 or more") for line in lines] == [True] * 2 + [
        False
    ] * 2 + [True] * 2
    assert (place / "sweep" / "1").is_dir()
