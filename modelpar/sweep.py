"""Sweeps: each job is the command that a user would type, with a run directory of its own.

So any Hydra launcher can run the jobs, and a job that failed can be repeated by hand.  A job may
run in another process or on another host; ``log/jobs`` of the sweep holds how each one ended, and
``log/stop`` requests an end: no further job starts, and running ones get a signal for each byte.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from modelpar import config, device, errors
from modelpar.environment import exit_with_parent
from modelpar.errors import LaunchError, RunError, SettingsError, StoppedError, one_line
from modelpar.files import atomic_write, check_writable
from modelpar.net.plan import Recipe, plan_for
from modelpar.settings import TrainSettings, check
from modelpar.shutdown import SIGNALS
from modelpar.training.metrics import top1_errors
from modelpar.training.run_dir import CONFIG

FLAGS: Final = ("--multirun", "-m", "hydra.mode=MULTIRUN")
POLL_SECONDS: Final = 0.2  # between two looks at a running job


def requested(words: list[str]) -> bool:
    """Return whether the command line asks for a sweep."""
    return any(word in FLAGS for word in words)


def run(name: str, words: list[str]) -> int:
    """Run the jobs of a sweep; return 75 if it was stopped, else the first failed job's status."""
    overrides = [word for word in words if word not in FLAGS]
    failure = 0  # of Hydra's sweeper or launcher
    try:
        sweep = _checked(name, overrides)
    except (RunError, KeyboardInterrupt) as error:
        return errors.report(error)
    sys.argv[1:] = ["-m", *overrides, config.quoted("hydra.sweep.dir", sweep.folder)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print a page and exit
    _handle_signals(sweep.request_stop)
    try:
        config.run_hydra(name, sweep)
    except KeyboardInterrupt:  # raised by a job that must not start
        pass
    except (HydraException, OmegaConfBaseException) as error:
        failure = errors.report(SettingsError(config.explained(error)))
    except Exception as error:  # noqa: BLE001 - any of a plugin's
        failure = errors.report(LaunchError(f"{type(error).__module__}: {one_line(error)}"))
    return sweep.summary() or failure


def _checked(name: str, words: list[str]) -> "Sweep":
    """Return the sweep that a command line asks for; raises SettingsError for any of its jobs."""
    if flags := [word for word in words if word.startswith("-")]:
        raise SettingsError(f"-m: use key=value with it, not {' '.join(flags)}")
    first, shared = config.check_sweep(name, words, _check_job)
    cores, hydra = 0, first.hydra
    if hydra.runtime.choices["hydra/launcher"] == "joblib":
        at_once = int(hydra.launcher.n_jobs)
        if at_once == 0:
            raise SettingsError("hydra.launcher.n_jobs=0: use the number of jobs at once, or -1")
        at_once = at_once if at_once > 0 else max(1, device.num_cores() + 1 + at_once)
        cores = 0 if "OMP_NUM_THREADS" in os.environ else max(1, device.num_cores() // at_once)
    folder = Path(str(hydra.sweep.dir)).absolute()
    check_writable("run_dir", folder)
    if (folder / CONFIG).exists():
        raise SettingsError(f"run_dir={folder}: holds a run, not a sweep; use another folder")
    sweep = Sweep(name, folder, shared, str(first.on_failure), cores, os.getpid())
    for path in [sweep.stop, *(path for path, end in sweep.ends() if end["status"])]:
        path.unlink(missing_ok=True)  # of an earlier start
    return sweep


def _check_job(settings: Any) -> None:
    """Raise SettingsError if the net of a job cannot be built."""
    check(settings)
    if isinstance(settings, TrainSettings):
        sizes = [
            getattr(settings.model, key) or getattr(settings.data, key)
            for key in ("num_classes", "image_size")
        ]
        plan_for(Recipe(**asdict(settings.recipe)), settings.model, sizes[0] or 1, sizes[1])


def _handle_signals(handler: Callable[[], object]) -> None:
    """Call ``handler`` at each signal that requests an end, instead of ending."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: handler())


@dataclass(frozen=True)
class Sweep:
    """What Hydra calls for each job, in this process or another one."""

    name: str  # of the command
    folder: Path
    shared: frozenset[str]  # keys that have one value in all jobs
    on_failure: str
    cores: int  # of one job; 0: the job decides
    launcher: int  # process id of the sweep

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run one job, unless it has finished before; return its last top-1 error in %, if any.

        Raises KeyboardInterrupt in the sweep's process if no further job must start.
        """
        hydra = HydraConfig.get()
        run_dir = Path(hydra.runtime.output_dir) if "run_dir" in cfg else None
        words = [
            word for word in hydra.overrides.task if not word.startswith(("run_dir=", "search="))
        ]
        path = self.folder / "log" / "jobs" / f"{hydra.job.num}.json"
        end: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if run_dir and end.get("words") == words and end["status"] == 0 and run_dir.exists():
            top1 = _last_error(run_dir)
            error = f", top-1 error {top1:.2f} %" if top1 is not None else ""
            print(f"modelpar: {self._title(end)}: finished{error}", flush=True)  # noqa: T201
            return top1
        if not self.stop.exists():
            run_dir_word = [config.quoted("run_dir", run_dir)] if run_dir else []
            status = self._run([*words, *run_dir_word], cfg)
            end = {"job": int(hydra.job.num), "words": words, "status": status}
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(end) + "\n")
            if status == 0:
                return _last_error(run_dir) if run_dir else None
            if status == StoppedError.status or self.on_failure == "stop":
                self.stop.touch()
        if self.stop.exists() and os.getpid() == self.launcher:
            raise KeyboardInterrupt  # an Exception would only be noted by Hydra
        return None

    def _run(self, words: list[str], cfg: DictConfig) -> int:
        """Run the command with ``words``, pass on requests to stop; return its exit status."""
        received = 0

        def count() -> None:
            nonlocal received
            received += 1

        if os.getpid() != self.launcher:  # in a worker of joblib or submitit, which stays alive
            _handle_signals(count)
        # -m adds the working directory to the path, where this process may not look for modules.
        path = ["-m"] if sys.path[0] in {"", str(Path.cwd())} else ["-P", "-m"]
        env = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
        if self.cores:
            ranks = int(cfg.columns) * int(cfg.replicas)
            env["OMP_NUM_THREADS"] = str(max(1, self.cores // ranks))
        with subprocess.Popen(  # noqa: S603 - our command
            [sys.executable, *path, f"modelpar.{self.name}", *words],
            env=env,
            start_new_session=True,  # Ctrl-C reaches it once, from here
            preexec_fn=exit_with_parent,  # noqa: PLW1509 - it takes no lock
        ) as job:
            sent = 0
            while True:
                with suppress(subprocess.TimeoutExpired):
                    status = job.wait(POLL_SECONDS)
                    break
                if max(received, _size(self.stop)) > sent:
                    job.send_signal(signal.SIGTERM)
                    sent += 1
        if status and sent:
            return StoppedError.status
        return status if status >= 0 else 128 - status  # as shells count signals

    @property
    def stop(self) -> Path:
        """The file that requests an end: empty, running jobs may finish; else they must stop."""
        return self.folder / "log" / "stop"

    def request_stop(self) -> None:
        """Start no further job, and pass one signal on to those that run."""
        self.stop.parent.mkdir(parents=True, exist_ok=True)
        with self.stop.open("a") as file:
            file.write("x")

    def ends(self) -> list[tuple[Path, dict[str, Any]]]:
        """Return the file and the content of each job that ended, in the order of the jobs."""
        files = (self.folder / "log" / "jobs").glob("*.json")
        found = [(path, json.loads(path.read_text())) for path in files]
        return sorted(found, key=lambda item: item[1]["job"])

    def summary(self) -> int:
        """Print one line for each failed job; return the status of the sweep."""
        failed = [end for _, end in self.ends() if end["status"]]
        for end in failed:
            if end["status"] != StoppedError.status:
                errors.say(f"{self._title(end)}: failed with status {end['status']}")
        if _size(self.stop) or any(end["status"] == StoppedError.status for end in failed):
            errors.say(f"stopped; the same command with run_dir={self.folder} continues")
            return StoppedError.status
        return int(failed[0]["status"]) if failed else 0

    def _title(self, end: dict[str, Any]) -> str:
        own = " ".join(word for word in end["words"] if word.partition("=")[0] not in self.shared)
        return f"job {end['job']} ({own})" if own else f"job {end['job']}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_error(run_dir: Path) -> float | None:
    """Return the last top-1 error of a run in %, None if it was never evaluated."""
    return next(reversed(top1_errors(run_dir).values()), None)
