"""A run directory: which run lives there, and whether the one that starts is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modelpar.errors import SettingsError, one_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG: Final = "config.yaml"
# What makes two starts the same run: these give the same trajectory; the rest may change.
SAME: Final = ("data.name", "data.image_size", "recipe", "model", "seed", "precision")
HARMLESS: Final = frozenset({"log"})  # what Hydra and an earlier end leave behind


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
    except (OSError, ValueError, OmegaConfBaseException) as error:
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


def begin(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Make the run directory and write its resolved settings down."""
    run_dir.mkdir(parents=True, exist_ok=True)
    unfinished = run_dir / f".{CONFIG}.part"
    OmegaConf.save(OmegaConf.create(dict(settings)), unfinished)
    unfinished.replace(run_dir / CONFIG)
