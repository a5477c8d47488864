"""A run directory: which run it holds, and whether the one that starts is the same run."""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modelpar import limits
from modelpar.config import without_secrets
from modelpar.declare import flatten
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, InUseError, LaunchError, SettingsError, one_line
from modelpar.files import atomic_write
from modelpar.settings import TrainSettings

CONFIG: Final = "config.yaml"
# These settings make two starts the same run; the others may change.
FIXED: Final = (
    "data.name",
    "data.image_size",
    "recipe",
    "model",
    "init",
    "seed",
    "precision",
    "debug.one_batch",
)
# These may change, but alter the trajectory: a resumed run names them.
ALLOWED: Final = ("epochs", "data.epochs", "data.evaluate_every", "crossing.dtype", "tf32")
HARMLESS: Final = frozenset({"log"})  # left by Hydra and by starts that failed
LOCK: Final = "log/lock"
SHARED_WITHIN: Final = 10.0  # s in which a disk shared by several hosts shows a new file
FREED_WITHIN: Final = 10.0  # s by which the lock of a killed run may outlive it


def check_compatible(run_dir: Path, settings: TrainSettings) -> None:
    """Raise SettingsError if ``run_dir`` holds another run, or any run unless resume=auto."""
    try:
        found = {path.name for path in run_dir.iterdir()} - HARMLESS
    except FileNotFoundError:
        return
    except OSError as error:
        raise SettingsError(
            f"run_dir={run_dir}: cannot be read ({error.strerror}); use another folder"
        ) from None
    if not found:
        return
    problem = ""
    if CONFIG not in found:
        problem = f"{min(found)}, which is not part of a run; use a new folder"
    elif settings.resume != "auto":
        problem = f"a run, and resume={settings.resume}; use a new folder"
    elif difference := _first_difference(run_dir, settings):
        problem = f"a run with {difference}; use a new folder or the same settings"
    if problem:
        raise SettingsError(f"run_dir={run_dir}: holds {problem}")


def _first_difference(run_dir: Path, settings: TrainSettings) -> str:
    """Return what makes the run in ``run_dir`` another one; an empty string: it is the same."""
    try:
        before: Any = OmegaConf.load(run_dir / CONFIG)
        old, new = (int(one.batch_size) * int(one.replicas) for one in (before, settings))
        changes = [*_changes(before, settings, FIXED)]
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise SettingsError(
            f"{run_dir / CONFIG}: cannot be read ({one_line(error)}); use a new folder"
        ) from None
    for key, was, now in changes:
        return f"{key}={was}, not {now}"
    return f"{old} images per step (batch_size * replicas), not {new}" if old != new else ""


def trajectory_changes(run_dir: Path, settings: TrainSettings) -> list[str]:
    """Return the changed settings that alter the trajectory of a resumed run."""
    if not (run_dir / CONFIG).is_file():
        return []
    changes = _changes(OmegaConf.load(run_dir / CONFIG), settings, ALLOWED)
    return [f"{key}={now}, not {was}" for key, was, now in changes]


def _changes(
    before: Any, settings: TrainSettings, groups: tuple[str, ...]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, old and new value of each setting of ``groups`` that has changed.

    A setting that an older version did not have had its default.
    """
    defaults = flatten(type(settings)())
    for key, new in flatten(settings).items():
        if not any(f"{key}.".startswith(f"{group}.") for group in groups):
            continue  # a value may hold a variable of the environment that is no longer set
        old: Any = OmegaConf.select(before, key, default=defaults[key])
        if old != new:
            was, now = ("null" if value is None else value for value in (old, new))
            yield key, was, now


@contextmanager
def locked(run_dir: Path, mesh: Mesh) -> Generator[None]:
    """Create the run directory and lock it for this run, before anything in it is read.

    A collective of the world.  Raises CheckpointError on every rank if another run has the lock.
    """
    lock = FileLock(run_dir / LOCK)
    try:
        with mesh.all_or_none(), written(run_dir):
            if mesh.rank == 0:
                (run_dir / LOCK).parent.mkdir(parents=True, exist_ok=True)
                # The system frees it when this process ends in any way; NFS takes its time.
                lock.acquire(timeout=min(FREED_WITHIN, mesh.timeout / 2))
        yield
    finally:
        lock.release()


@contextmanager
def written(run_dir: Path) -> Generator[None]:
    """Raise CheckpointError if the run directory cannot be locked or written.

    Raises LaunchError for a limit of the system.
    """
    try:
        yield
    except Timeout:
        raise InUseError(
            f"{run_dir}: in use by another run; wait for it or use another run_dir"
        ) from None
    except OSError as error:
        if line := limits.reached(error):
            raise LaunchError(f"{run_dir}: {line}") from None
        raise CheckpointError(
            f"{run_dir}: cannot be written ({one_line(error)}); use another run_dir"
        ) from None


def write_config(run_dir: Path, settings: TrainSettings, mesh: Mesh) -> None:
    """Write the run's resolved settings, without secrets, and check that all ranks see them.

    A collective of the world.  Raises CheckpointError on every rank.
    """
    with mesh.all_or_none(), written(run_dir):
        if mesh.rank == 0:
            text = OmegaConf.to_yaml(OmegaConf.create(without_secrets(asdict(settings))))
            atomic_write(run_dir / CONFIG, text)
    with mesh.all_or_none():
        deadline = time.monotonic() + SHARED_WITHIN
        while not (run_dir / CONFIG).is_file():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"rank {mesh.rank} does not see {run_dir}, which rank 0 created; "
                    "use a run_dir on a disk that all hosts share"
                )
            time.sleep(0.1)
