"""A run directory: which run lives there, and whether the one that starts is the same."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modelpar.config import without_secrets
from modelpar.errors import CheckpointError, SettingsError, one_line
from modelpar.mesh import Mesh, first_complaint

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

CONFIG: Final = "config.yaml"
# What makes two starts the same run: these give the same trajectory; the rest may change.
SAME: Final = ("data.name", "data.image_size", "recipe", "model", "seed", "precision")
HARMLESS: Final = frozenset({"log"})  # what Hydra and an earlier end leave behind
LOCK: Final = "log/lock"
SHARED_WITHIN: Final = 10.0  # s that a disk of several hosts may take to show a new file


def check_same(run_dir: Path, settings: Mapping[str, Any], resume: str) -> None:
    """Raise SettingsError where ``run_dir`` holds another run, or any and ``resume`` is never."""
    if not run_dir.exists():
        return
    held = {path.name for path in run_dir.iterdir()} - HARMLESS
    if not held:
        return
    if CONFIG not in held:
        message = f"run_dir={run_dir}: holds {min(held)}, which is no run's; give a new folder"
        raise SettingsError(message)
    if resume != "auto":
        message = f"run_dir={run_dir}: holds a run, and resume={resume}; give a new folder"
        raise SettingsError(message)
    try:
        before = OmegaConf.load(run_dir / CONFIG)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        message = f"{run_dir / CONFIG}: cannot be read ({one_line(error)}); give a new folder"
        raise SettingsError(message) from None
    now = OmegaConf.create(dict(settings))
    for key in SAME:
        old, new = OmegaConf.select(before, key), OmegaConf.select(now, key)
        if old != new:
            message = (
                f"run_dir={run_dir}: holds a run with {_first_difference(key, old, new)}; "
                "give a new folder, or the same settings"
            )
            raise SettingsError(message)
    old, new = (int(run.batch_size) * int(run.replicas) for run in (before, now))
    if old != new:
        message = (
            f"run_dir={run_dir}: holds a run with {old} images a step (batch_size * replicas), "
            f"not {new}; give a new folder, or the same settings"
        )
        raise SettingsError(message)


def _first_difference(key: str, old: Any, new: Any) -> str:
    if OmegaConf.is_dict(old) and OmegaConf.is_dict(new):
        for part in new:
            if old.get(part) != new[part]:
                return f"{key}.{part}={old.get(part)}, not {new[part]}"
    return f"{key}={old}, not {new}"


@contextmanager
def begun(run_dir: Path, settings: Mapping[str, Any], mesh: Mesh) -> Generator[None]:
    """Make the run directory, write its resolved settings down, and hold it for this run alone.

    A collective of the whole mesh.  Raises CheckpointError, on every process alike, where another
    run is at work there, or where not all processes see it.
    """
    lock = FileLock(run_dir / LOCK)
    complaint = ""
    if mesh.rank == 0:
        try:
            (run_dir / LOCK).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)  # the system frees it when this process ends, however it does
            write(run_dir, settings)
        except Timeout:
            complaint = f"{run_dir}: another run is at work there; wait, or give another run_dir"
        except OSError as error:
            complaint = f"{run_dir}: cannot be written ({one_line(error)}); give another run_dir"
    try:
        if not (complaint := first_complaint(complaint, mesh)) and not _sees(run_dir):
            complaint = (
                f"rank {mesh.rank} does not see {run_dir}, which rank 0 has made; "
                "give a run_dir on a disk that all hosts share"
            )
        if complaint := first_complaint(complaint, mesh):
            raise CheckpointError(complaint)
        yield
    finally:
        lock.release()


def _sees(run_dir: Path) -> bool:
    """Whether the run's settings are there, at once or as soon as a shared disk tells of them."""
    deadline = time.monotonic() + SHARED_WITHIN
    while not (run_dir / CONFIG).is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def write(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write a run's resolved settings down, without what the environment keeps secret."""
    run_dir.mkdir(parents=True, exist_ok=True)
    unfinished = run_dir / f".{CONFIG}.part"
    OmegaConf.save(OmegaConf.create(without_secrets(settings)), unfinished)
    unfinished.replace(run_dir / CONFIG)
