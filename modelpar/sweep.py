"""Sweeps: many jobs by one command, each a run in a folder of its own, by any launcher of Hydra's.

A job may run in another process or on another host, so the sweep's ``log/ends/`` holds what has to
be known of it elsewhere: how it failed, and that no further job is to start.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from modelpar import agent, config, device, ends
from modelpar.errors import LaunchError, RunError, SettingsError, StoppedError, one_line
from modelpar.files import check_writable
from modelpar.jobs import Job
from modelpar.shutdown import SIGNALS
from modelpar.training.run_dir import CONFIG

FLAGS: Final = ("--multirun", "-m", "hydra.mode=MULTIRUN")
ENDS: Final = Path("log/ends")  # in the sweep's directory: JOB.json of those that failed
STOP: Final = ENDS / "stop"  # no further job is to start
LAUNCHER: Final = -1  # stands for a job's number
PASSED_ON: Final = signal.SIGUSR1  # what joblib's workers are told of a signal to the launcher
HEARD: Final = tuple(number for number in agent.HANDLED if number not in {*SIGNALS} - {PASSED_ON})


def asked(words: list[str]) -> bool:
    """Whether the command line asks for a sweep."""
    return any(flag in words for flag in FLAGS)


def run(job: Job, words: list[str]) -> int:
    """Run the jobs that the command line ``words`` asks for; return the exit status.

    Raises SettingsError before the first starts, for what Hydra cannot compose.
    """
    overrides = [word for word in words if word not in FLAGS]
    sweep = _plan(job, overrides)
    shutil.rmtree(sweep.folder / ENDS, ignore_errors=True)  # of an earlier start
    where = str(sweep.folder).replace("'", r"\'")
    sys.argv[1:] = ["-m", *overrides, f"hydra.sweep.dir='{where}'"]
    shown = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra ends the process, after a page
    interrupted, lost = False, 0
    try:
        with _signals_passed_on(sweep) if sweep.launcher == "joblib" else _signals_raised():
            config.run_hydra(job.name, sweep)
    except KeyboardInterrupt:
        interrupted = True
        if sweep.launcher == "submitit_local":
            _end_local(sweep)
    except Exception as error:
        if shown:
            raise
        lost = _of_hydra(error)
    return _sum_up(sweep, lost, interrupted=interrupted)


def _plan(job: Job, overrides: list[str]) -> "Sweep":
    for word in overrides:
        if word.startswith("-"):
            raise SettingsError(f"{word} does not go with -m")
    first, alike = config.check_sweep(job.name, overrides)
    launcher, cores = str(first.hydra.runtime.choices["hydra/launcher"]), None
    if launcher == "joblib":
        at_once = int(first.hydra.launcher.n_jobs)
        if at_once == 0:
            raise SettingsError("hydra.launcher.n_jobs=0: give how many jobs at once, or -1")
        at_once = at_once if at_once > 0 else max(1, device.num_cores() + 1 + at_once)
        launcher = "joblib" if at_once > 1 else "basic"  # one at a time is run right here
        cores = None if agent.THREADS_GIVEN else max(1, device.num_cores() // at_once)
    folder = Path(str(first.hydra.sweep.dir)).absolute()
    check_writable("run_dir", folder)
    if (folder / CONFIG).exists():
        raise SettingsError(f"run_dir={folder}: holds a run, not a sweep; give another folder")
    return Sweep(job, folder, alike, launcher, cores)


def _end_local(sweep: "Sweep") -> None:
    """Have the jobs that submitit started on this machine save, and wait until they have."""
    sweep.stop()
    numbers = [int(place.name) for place in (sweep.folder / ".submitit").glob("[0-9]*")]
    for number in numbers:
        with suppress(ChildProcessError):  # of an earlier start of this sweep
            os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(number, signal.SIGTERM)
    for number in numbers:
        with suppress(ChildProcessError):
            os.waitpid(number, 0)


def _of_hydra(error: Exception) -> int:
    """Say in one line what came of Hydra's sweeper or launcher; return its exit status."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    whose = str(frame.f_globals["__name__"]).partition(".")[0]
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        error = SettingsError(config.explained(error))
    elif whose != "modelpar":
        error = LaunchError(f"{whose}: {one_line(error)}")
    else:
        traceback.print_exception(error)
    status, line = ends.status(error)
    ends.say(line)
    return status


def _sum_up(sweep: "Sweep", lost: int, *, interrupted: bool) -> int:
    """Say again which jobs failed; return the exit status of the sweep."""
    told = sweep.told()
    failed = [end for end in told if end["status"] != StoppedError.status]
    if failed:
        ends.say(f"{len(failed)} {'job' if len(failed) == 1 else 'jobs'} failed:")
    for end in failed:
        ends.say(end["line"])
    if len(failed) < len(told) or (interrupted and not failed):
        ends.say(f"stopped; the same command with run_dir={sweep.folder} goes on")
        return StoppedError.status
    return failed[0]["status"] if failed else lost


@dataclass(frozen=True)
class Sweep:
    """What each job knows of its sweep; Hydra calls it, in whatever process, to run one."""

    job: Job
    folder: Path
    alike: frozenset[str]  # keys that have one value in all jobs
    launcher: str  # Hydra's: basic runs jobs in this process
    cores: int | None  # of one job; None: all, or as OMP_NUM_THREADS says

    def __call__(self, cfg: DictConfig) -> Any:
        """Run one job; return its objective, None where it has none."""
        if (self.folder / STOP).exists():
            return self.stop()
        number, words = HydraConfig.get().job.num, HydraConfig.get().overrides.task
        own = " ".join(word for word in words if word.partition("=")[0] not in self.alike)
        name = f"job {number} ({own})" if own else f"job {number}"
        try:
            with _signals_heard() if self.launcher == "joblib" else _signals_raised():
                objective = self._run(cfg, name)
        except KeyboardInterrupt:
            self.tell(number, StoppedError.status, f"{name}: stopped")
            return self.stop()
        except Exception as error:  # noqa: BLE001 - every end has its status
            status, line = ends.status(error)
            if not isinstance(error, RunError):
                traceback.print_exception(error)
            stopped = isinstance(error, StoppedError)
            line = f"{name}: {line.partition('; ')[0] if stopped else line}"  # the sweep goes on
            ends.say(line)
            self.tell(number, status, line)
            return self.stop() if stopped or cfg.on_failure == "stop" else None
        return objective if math.isfinite(objective) else None

    def _run(self, cfg: DictConfig, name: str) -> float:
        settings, ranks = agent.place(config.typed(self.job.name, cfg))
        if self.cores is not None and settings.threads is None:
            settings.threads = max(1, self.cores // ranks)
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        done = self._over(settings, run_dir)
        if done is not None:
            error = f", top-1 {done:.2f} %" if math.isfinite(done) else ""
            print(f"modelpar: {name}: finished{error}", flush=True)  # noqa: T201
            return done
        handled = HEARD if self.launcher == "joblib" else agent.HANDLED
        return agent.launch(self.job, settings, ranks, run_dir, handled)

    def _over(self, settings: Any, run_dir: Path) -> float | None:
        prepared = self.job.prepare(settings, run_dir)
        return self.job.over(prepared, settings, run_dir) if self.job.over else None

    def tell(self, number: int, status: int, line: str) -> None:
        """Leave word of how a job ended."""
        (self.folder / ENDS).mkdir(parents=True, exist_ok=True)
        end = {"job": number, "status": status, "line": line}
        (self.folder / ENDS / f"{number}.json").write_text(json.dumps(end) + "\n")

    def told(self) -> list[dict[str, Any]]:
        """Return how jobs ended that did not end well, in their order."""
        found = [json.loads(path.read_text()) for path in (self.folder / ENDS).glob("*.json")]
        return sorted(found, key=lambda end: end["job"])

    def stop(self) -> "_Ended":
        """Let no further job start; raises KeyboardInterrupt where Hydra is in this process."""
        (self.folder / ENDS).mkdir(parents=True, exist_ok=True)
        (self.folder / STOP).touch()
        if self.launcher == "basic":
            raise KeyboardInterrupt
        return _Ended()


class _Ended:
    """What a job of a sweep that stops returns: who asks it for a number, as Optuna does, ends."""

    def __float__(self) -> float:
        raise KeyboardInterrupt


# -- signals -------------------------------------------------------------------------------------


def _raise(number: int, frame: Any) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt


def _pass(number: int, frame: Any) -> None:
    del number, frame


@contextmanager
def _signals_to(handler: Callable[[int, Any], object]) -> Generator[None]:
    """Have ``handler`` hear the signals that end a run, and then who heard them before."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, heard in before.items():
            signal.signal(number, heard)


def _signals_raised() -> AbstractContextManager[None]:
    """Have a signal raise KeyboardInterrupt, wherever a sweep or a job stands."""
    return _signals_to(_raise)


def _signals_passed_on(sweep: "Sweep") -> AbstractContextManager[None]:
    """Keep signals from joblib, which would kill its workers at once; pass them on to the jobs."""

    def pass_on(number: int, frame: Any) -> None:
        del frame
        sweep.tell(LAUNCHER, StoppedError.status, f"asked to stop ({signal.Signals(number).name})")
        sweep.stop()
        for worker in multiprocessing.active_children():
            if worker.pid is not None:
                os.kill(worker.pid, PASSED_ON)

    return _signals_to(pass_on)


@contextmanager
def _signals_heard() -> Generator[None]:
    """Let a job in one of joblib's workers hear what is passed on to it, and just that.

    Ctrl-C reaches all processes: a worker that waits for a job must outlive it, for joblib kills
    all when one is gone, and an agent that is told twice leaves its ranks alone.
    """
    for number in SIGNALS:
        signal.signal(number, _pass)
    signal.signal(PASSED_ON, _raise)
    try:
        yield
    finally:
        signal.signal(PASSED_ON, _pass)
