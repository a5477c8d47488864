"""A run directory: which run lives there, and whether the one that starts is the same."""

import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modelpar.config import without_secrets
from modelpar.distributed import Mesh, first_complaint
from modelpar.errors import CheckpointError, SettingsError, one_line

CONFIG: Final = "config.yaml"
# What makes two starts the same run: these give the same trajectory; the rest may change.
FIXED: Final = ("data.name", "data.image_size", "recipe", "model", "seed", "precision")
# What may change all the same, and changes the trajectory: said when a run goes on.
ALLOWED: Final = ("epochs", "data.epochs", "data.evaluate_every", "crossing.dtype", "tf32")
HARMLESS: Final = frozenset({"log"})  # what Hydra and an earlier end leave behind
LOCK: Final = "log/lock"
SHARED_WITHIN: Final = 10.0  # s that a disk of several hosts may take to show a new file
FREED_WITHIN: Final = 10.0  # s that the lock of a run which was killed may outlive it


def check_compatible(run_dir: Path, settings: Mapping[str, Any], resume: str) -> None:
    """Raise SettingsError where ``run_dir`` holds another run, or any and ``resume`` is never."""
    try:
        found = {path.name for path in run_dir.iterdir()} - HARMLESS
    except FileNotFoundError:
        return
    except OSError as error:
        raise SettingsError(
            f"run_dir={run_dir}: cannot be read ({error.strerror}); give another folder"
        ) from None
    if not found:
        return
    if CONFIG not in found:
        raise SettingsError(
            f"run_dir={run_dir}: holds {min(found)}, which is no run's; give a new folder"
        )
    if resume != "auto":
        raise SettingsError(
            f"run_dir={run_dir}: holds a run, and resume={resume}; give a new folder"
        )
    try:
        before = OmegaConf.load(run_dir / CONFIG)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise SettingsError(
            f"{run_dir / CONFIG}: cannot be read ({one_line(error)}); give a new folder"
        ) from None
    now = OmegaConf.create(dict(settings))
    for key in FIXED:
        old, new = OmegaConf.select(before, key), OmegaConf.select(now, key)
        if old != new:
            raise SettingsError(
                f"run_dir={run_dir}: holds a run with {_first_difference(key, old, new)}; "
                "give a new folder, or the same settings"
            )
    old, new = (int(run.batch_size) * int(run.replicas) for run in (before, now))
    if old != new:
        raise SettingsError(
            f"run_dir={run_dir}: holds a run with {old} images a step (batch_size * replicas), "
            f"not {new}; give a new folder, or the same settings"
        )


def _first_difference(key: str, old: Any, new: Any) -> str:
    if OmegaConf.is_dict(old) and OmegaConf.is_dict(new):
        for part in new:
            if old.get(part) != new[part]:
                return _first_difference(f"{key}.{part}", old.get(part), new[part])
    was, now = ("null" if value is None else value for value in (old, new))
    return f"{key}={was}, not {now}"


@contextmanager
def locked(run_dir: Path, mesh: Mesh) -> Generator[None]:
    """Make the run directory and hold it for this run alone, before anything in it is read.

    A collective of the whole mesh.  Raises CheckpointError, on every process alike, where another
    run is at work there.
    """
    lock = FileLock(run_dir / LOCK)
    complaint = ""
    if mesh.rank == 0:
        try:
            (run_dir / LOCK).parent.mkdir(parents=True, exist_ok=True)
            # The system frees it when this process ends, however it does; NFS takes its time.
            lock.acquire(timeout=min(FREED_WITHIN, mesh.timeout / 2))  # the others wait meanwhile
        except Timeout:
            complaint = f"{run_dir}: another run is at work there; wait, or give another run_dir"
        except OSError as error:
            complaint = f"{run_dir}: cannot be written ({one_line(error)}); give another run_dir"
    try:
        if complaint := first_complaint(complaint, mesh):
            raise CheckpointError(complaint)
        yield
    finally:
        lock.release()


def write_config(run_dir: Path, settings: Mapping[str, Any], mesh: Mesh) -> None:
    """Write the run's resolved settings down, and see that all processes find them there.

    A collective of the whole mesh.  Raises CheckpointError, on every process alike.
    """
    complaint = ""
    if mesh.rank == 0:
        try:
            write(run_dir, settings)
        except OSError as error:
            complaint = f"{run_dir}: cannot be written ({one_line(error)}); give another run_dir"
    if not (complaint := first_complaint(complaint, mesh)) and not _sees(run_dir):
        complaint = (
            f"rank {mesh.rank} does not see {run_dir}, which rank 0 has made; "
            "give a run_dir on a disk that all hosts share"
        )
    if complaint := first_complaint(complaint, mesh):
        raise CheckpointError(complaint)


def trajectory_changes(run_dir: Path, settings: Mapping[str, Any]) -> list[str]:
    """Return what a run goes on with that it may, and that gives it another trajectory."""
    if not (run_dir / CONFIG).is_file():
        return []
    before, now = OmegaConf.load(run_dir / CONFIG), OmegaConf.create(dict(settings))
    both = {key: [OmegaConf.select(one, key) for one in (before, now)] for key in ALLOWED}
    return [f"{key}={new}, not {old}" for key, (old, new) in both.items() if old != new]


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
    with unfinished.open("w") as file:
        OmegaConf.save(OmegaConf.create(without_secrets(settings)), file)
        file.flush()
        os.fsync(file.fileno())  # an empty one, after a power cut, would be no run's
    unfinished.replace(run_dir / CONFIG)
