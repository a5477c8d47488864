"""Sweeps: each job is the command that a user would type, with a run directory of its own.

So any Hydra launcher can run it (basic, joblib, submitit), and a job that failed can be repeated
by hand.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from modelpar import config, errors
from modelpar.errors import RunError, SettingsError, StoppedError
from modelpar.files import check_writable
from modelpar.shutdown import SIGNALS

FLAGS: Final = ("--multirun", "-m", "hydra.mode=MULTIRUN")


def requested(words: list[str]) -> bool:
    """Return whether the command line asks for a sweep."""
    return any(flag in words for flag in FLAGS)


def run(name: str, words: list[str]) -> int:
    """Run all jobs of a sweep; return the exit status of the first that failed."""
    overrides = [word for word in words if word not in FLAGS]
    try:
        if config.has_flags(overrides):
            raise SettingsError(f"{overrides}: flags do not work with -m")
        first, shared = config.check_sweep(name, overrides)
        folder = Path(str(first.hydra.sweep.dir)).absolute()
        check_writable("run_dir", folder)
        jobs = Jobs(name, folder, shared, str(first.on_failure))
        jobs.clear()
        sys.argv[1:] = ["-m", *overrides, config.quoted("hydra.sweep.dir", folder)]
        config.run_hydra(name, jobs)
    except (RunError, KeyboardInterrupt) as error:
        return errors.report(error)
    failed = jobs.failed()
    for job in failed:
        errors.say(f"job {job['number']} ({job['words']}) failed with status {job['status']}")
    if any(job["status"] == StoppedError.status for job in failed):
        return StoppedError.status
    return failed[0]["status"] if failed else 0


@dataclass(frozen=True)
class Jobs:
    """What Hydra calls for each job, in this process or another one."""

    name: str
    folder: Path
    shared: frozenset[str]  # keys that have one value in all jobs
    on_failure: str

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run one job; return its objective, the last top-1 error in %."""
        del cfg
        hydra = HydraConfig.get()
        if (self.folder / "log" / "stop").exists():
            return None
        run_dir = Path(hydra.runtime.output_dir)
        words = [word for word in hydra.overrides.task if not word.startswith("run_dir=")]
        command = [sys.executable, "-m", f"modelpar.{self.name}", *words]
        command.append(config.quoted("run_dir", run_dir))
        with subprocess.Popen(command) as job, _signals_forwarded(job):  # noqa: S603 - ours
            status = job.wait()
        if status:
            named = " ".join(word for word in words if word.partition("=")[0] not in self.shared)
            row = {"number": hydra.job.num, "words": named, "status": status}
            self._file(f"failed-{hydra.job.num}.json").write_text(json.dumps(row) + "\n")
        if status == StoppedError.status or (status and self.on_failure == "stop"):
            self._file("stop").touch()
        return _objective(run_dir)

    def _file(self, name: str) -> Path:
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        return self.folder / "log" / name

    def clear(self) -> None:
        """Forget how jobs of an earlier start failed."""
        for path in [*(self.folder / "log").glob("failed-*.json"), self.folder / "log" / "stop"]:
            path.unlink(missing_ok=True)

    def failed(self) -> list[dict[str, Any]]:
        """Return the jobs that failed, in their order."""
        files = (self.folder / "log").glob("failed-*.json")
        return sorted((json.loads(path.read_text()) for path in files), key=lambda j: j["number"])


def _objective(run_dir: Path) -> float | None:
    """Return the last top-1 error of a run in %, None if it has none."""
    try:
        rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return None
    errors_seen = [row["top1"] for row in rows if row["kind"] == "test"]
    return errors_seen[-1] if errors_seen else None


@contextmanager
def _signals_forwarded(job: "subprocess.Popen[bytes]") -> Generator[None]:
    """Pass signals on to the job, which saves and exits, instead of ending by them."""

    def forward(number: int, frame: Any) -> None:
        del frame
        job.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
