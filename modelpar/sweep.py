"""Sweeps: each job is the command that a user would type, with a run directory of its own.

So any Hydra launcher can run the jobs, and a job that failed can be repeated by hand.  A job may
run in another process or on another host; ``log/jobs`` of the sweep holds how each one ended, and
``log/stop`` requests an end: no further job starts, and each byte in it is a signal for those that
run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from modelpar import config, device, environment, errors, overrides
from modelpar.checks import check_net
from modelpar.errors import LaunchError, SettingsError, StoppedError, one_line
from modelpar.files import atomic_write, check_writable
from modelpar.net.plan import plan_for
from modelpar.settings import TrainSettings
from modelpar.shutdown import SIGNALS
from modelpar.training.metrics import evaluations
from modelpar.training.run_dir import CONFIG

FLAGS: Final = {"--multirun", "-m", "hydra.mode=MULTIRUN"}  # that ask for a sweep
POLL_SECONDS: Final = 0.2  # between two looks at a running job


def run(name: str, words: list[str]) -> int:
    """Run the jobs of a sweep; return 75 if it was stopped, else the first failed job's status.

    Raises SettingsError, before the first job, for a value that any of them must not have.
    """
    words = [word for word in words if word not in FLAGS]
    sweep = _checked(name, words)
    place = overrides.quoted("hydra.sweep.dir", sweep.folder)
    # The jobs are processes of their own, so a working directory for each has no use.
    sys.argv[1:] = ["-m", *words, place, "hydra.job.chdir=false"]
    _handle_signals(sweep.request_stop)
    failure = 0  # of Hydra's sweeper or launcher
    try:
        config.run_hydra(name, sweep)
    except KeyboardInterrupt:  # raised by a job that must not start
        pass
    except SettingsError as error:
        failure = errors.report(error)
    except Exception as error:  # noqa: BLE001 - any of a plugin's
        failure = errors.report(LaunchError(f"{type(error).__module__}: {one_line(error)}"))
    return sweep.summary() or failure


def _checked(name: str, words: list[str]) -> "Sweep":
    """Return the sweep that a command line asks for; raises SettingsError for any of its jobs."""
    jobs, hydra, folder, varied = config.check_sweep(name, words)
    for settings in jobs:
        if isinstance(settings, TrainSettings):  # its net can be built
            size = settings.model.image_size or settings.data.image_size
            plan_for(settings.recipe, settings.model, 1, size)
            check_net(settings)
    at_once = int(hydra.launcher.get("n_jobs", 1)) or 1  # negative: almost one for each core
    if at_once != 1:
        ranks = max(settings.columns * settings.replicas for settings in jobs)
        threads = max(1, device.num_cores() // at_once // ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    check_writable("run_dir", folder)
    if (folder / CONFIG).exists():
        raise SettingsError(f"run_dir={folder}: holds a run, not a sweep; use another folder")
    sweep = Sweep(name, folder, varied, os.getpid())
    sweep.stop.unlink(missing_ok=True)  # of an earlier start
    for end in sweep.failed():
        sweep.end_file(end["job"]).unlink()
    sweep.end_file(0).parent.mkdir(parents=True, exist_ok=True)
    return sweep


def _handle_signals(handler: Callable[[int], object]) -> None:
    """Call ``handler`` at each signal that requests an end, instead of ending."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: handler(received))


@dataclass(frozen=True)
class Sweep:
    """What Hydra calls for each job, in this process or another one."""

    name: str  # of the command
    folder: Path
    varied: set[str]  # keys that have several values
    launcher: int  # process id of the sweep

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run one job, unless it has finished before; return its last top-1 error in %, if any.

        Raises KeyboardInterrupt in the sweep's process if no further job must start.
        """
        hydra = HydraConfig.get()
        run_dir = Path(hydra.runtime.output_dir)
        words = [
            word
            for word in hydra.overrides.task
            if not (overrides.FOLDER.match(word) or word.startswith("search="))
        ]
        words += [word for word in hydra.overrides.hydra if word.startswith("hydra.searchpath=")]
        end: dict[str, Any] = {"job": hydra.job.num, "words": words, "status": 0}
        path = self.end_file(hydra.job.num)
        before = json.loads(path.read_text("utf-8")) if path.exists() else None
        if end == before and "run_dir" in cfg and run_dir.exists():
            top1 = _last_error(run_dir)
            error = f", top-1 error {top1:.2f} %" if top1 is not None else ""
            print(f"modelpar: {self._title(end)}: finished{error}", flush=True)  # noqa: T201
            return top1
        if not self.stop.exists():
            place = [overrides.quoted("run_dir", run_dir)] if "run_dir" in cfg else []
            status = self._run([*words, *place])
            atomic_write(path, json.dumps({**end, "status": status}) + "\n")
            if status == 0:
                return _last_error(run_dir)
            if status == StoppedError.status or cfg.on_failure == "stop":
                self.stop.touch()
        if self.stop.exists() and os.getpid() == self.launcher:
            raise KeyboardInterrupt  # an Exception would only be noted by Hydra
        return None

    def _run(self, words: list[str]) -> int:
        """Run the command with ``words``, pass on requests to stop; return its exit status."""
        received: list[int] = []
        if os.getpid() != self.launcher:  # in a worker of joblib or submitit, which stays alive
            _handle_signals(received.append)
        with subprocess.Popen(  # noqa: S603 - our command
            [sys.executable, *environment.python_arguments(self.name, words)],
            start_new_session=True,  # Ctrl-C reaches it once, from here
            preexec_fn=environment.exit_with_parent,  # noqa: PLW1509 - it takes no lock
        ) as job:
            sent = 0
            while job.poll() is None:
                if max(len(received), self._requests()) > sent:
                    job.send_signal(signal.SIGTERM)
                    sent += 1
                time.sleep(POLL_SECONDS)
        if job.returncode and sent:
            return StoppedError.status
        return job.returncode if job.returncode >= 0 else 128 - job.returncode  # as shells count

    @property
    def stop(self) -> Path:
        """The file that requests an end: empty, running jobs may finish; else they must stop."""
        return self.folder / "log" / "stop"

    def request_stop(self, number: int) -> None:
        """Start no further job, and pass one signal on to those that run."""
        del number
        with self.stop.open("a") as file:
            file.write("x")

    def _requests(self) -> int:
        return self.stop.stat().st_size if self.stop.exists() else 0

    def end_file(self, job: int) -> Path:
        """Return the file that records how a job ended."""
        return self.folder / "log" / "jobs" / f"{job}.json"

    def failed(self) -> list[dict[str, Any]]:
        """Return the records of the jobs that did not finish, in the order of the jobs."""
        ends = [
            json.loads(path.read_text("utf-8")) for path in self.end_file(0).parent.glob("*.json")
        ]
        return sorted((end for end in ends if end["status"]), key=itemgetter("job"))

    def summary(self) -> int:
        """Print one line for each failed job; return the status of the sweep."""
        failed = self.failed()
        statuses = [int(end["status"]) for end in failed]
        for end in failed:
            if end["status"] != StoppedError.status:
                errors.say(f"{self._title(end)}: failed with status {end['status']}")
        if self._requests() or StoppedError.status in statuses:
            place = overrides.shell_word("run_dir", str(self.folder))
            errors.say(f"stopped; the same command with {place} continues")
            return StoppedError.status
        return next(iter(statuses), 0)

    def _title(self, end: dict[str, Any]) -> str:
        own = " ".join(word for word in end["words"] if word.partition("=")[0] in self.varied)
        return f"job {end['job']} ({own})" if own else f"job {end['job']}"


def _last_error(run_dir: Path) -> float | None:
    """Return the last top-1 error of a run in %, None if it was never evaluated."""
    rows = [*evaluations(run_dir).values()]
    return rows[-1]["top1"] if rows else None
