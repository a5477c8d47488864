"""What an experiment of ``conf/experiment/`` changes, and which run is the control of which."""

import json
from dataclasses import asdict
from functools import cache
from typing import Any, Final

from modelpar import config
from modelpar.errors import SettingsError
from modelpar.studies.runs import SIZES, Run, told

NET: Final = (
    "recipe.",
    "model.",
    "crossing.",
)  # what an experiment is about; the rest is how long


@cache
def composed(name: str) -> dict[str, str] | None:
    """Return what the experiment's file gives, as ``gather.told``; None: it is not of ours."""
    try:
        settings = config.compose_settings("train", [f"experiment={name}"])
        return told(asdict(config.to_object("train", settings)))
    except SettingsError:
        return None


def changed(name: str, control: str) -> dict[str, tuple[str, str]] | None:
    """Return what the experiment and its control have differently, in that order."""
    ours, theirs = composed(name), composed(control)
    if ours is None or theirs is None:
        return None
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}


def overridden(run: Run) -> list[str]:
    """Return what a run was told about its net and recipe that is not its experiment's."""
    own = composed(run.settings.get("experiment") or "")
    if own is None:
        return []
    keys = [key for key in own if key.startswith(NET) and key not in SIZES and key in run.told]
    other = {key: run.told[key] for key in keys if run.told[key] != own[key]}
    if name := other.pop("recipe.name", None):  # and all that comes with it
        other = {"recipe": name} | {
            key: value for key, value in other.items() if not key.startswith("recipe.")
        }
    return [f"{key}={_typed(json.loads(value))}" for key, value in other.items()]


def _typed(value: Any) -> str:
    """Return a value as a command line has it."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)


def controls(run: Run, other: Run) -> bool:
    """Whether ``other`` is the control of ``run``, like it in all but what their files change."""
    name, control = run.settings.get("experiment"), run.settings.get("control")
    if control is None or other.settings.get("experiment") != control:
        return False
    keys = run.told.keys() & other.told.keys()  # older runs lack the newest
    different = {key for key in keys if run.told[key] != other.told[key]}
    files = changed(name or "", control)
    if files is None:
        return all(key.startswith(NET) for key in different)
    return different <= files.keys() and all(
        (run.told[key], other.told[key]) == files[key] for key in files.keys() & keys
    )
