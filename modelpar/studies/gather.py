"""Runs as they lie on the disk: which they are, what they were told, how they went."""

from __future__ import annotations

import json
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modelpar.errors import DataError, SettingsError, one_line
from modelpar.training.monitor import METRICS
from modelpar.training.runs import CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# What does not make a run another one: where it ran, what it showed, and the seed.
APART: Final = frozenset(
    {
        *("seed", "run_dir", "resume", "device", "threads", "workers", "cache_dir", "restarts"),
        *("checkpoint_every", "keep_last", "keep_every", "keep_best", "log_every", "compile"),
        *("channels_last", "columns", "replicas", "comm", "monitor", "tf32"),
        *("published", "control_published", "control", "experiment"),
    }
)


@dataclass(frozen=True)
class Run:
    """One training: its settings, and its rows of metrics.jsonl."""

    folder: Path
    settings: dict[str, Any]
    losses: list[tuple[int, float]]  # step, training loss in nats
    tests: list[tuple[int, float, float]]  # step, top-1 and top-5 error in %
    training: list[tuple[int, float]]  # epoch, top-1 error in % of a step; older rows have none

    @property
    def label(self) -> str:
        """The experiment's name, or the recipe's with the model's switches."""
        model = {key: value for key, value in self.settings["model"].items() if value is not None}
        switches = [f"{key}={value}" for key, value in model.items() if key not in SIZES]
        name = self.settings.get("experiment")
        return name or " ".join([self.settings["recipe"]["name"], *switches])

    @property
    def data(self) -> str:
        """The images it learnt from and was tested on."""
        size = self.settings["model"]["image_size"] or self.settings["data"]["image_size"]
        return f"{self.settings['data']['name']}, {size} pixels"

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.settings["seed"])

    @property
    def key(self) -> str:
        """Everything that the runs of one experiment have in common, but the seed."""
        own = {key: value for key, value in self.settings.items() if key not in APART}
        own["data"] = {key: own["data"][key] for key in ("name", "image_size", "num_classes")}
        return json.dumps([self.label, own], sort_keys=True)


SIZES: Final = ("image_size", "num_classes")


def find(patterns: Sequence[str]) -> list[Path]:
    """Return the runs that ``patterns`` name: runs, sweeps of runs, globs of either.

    Raises SettingsError for a pattern that names none.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        named = Path(pattern).expanduser()  # absolute or not: Path.glob takes either by half
        places = [Path(place) for place in sorted(glob(str(named)))]  # noqa: PTH207
        runs = [run for place in places for run in _runs(place)]
        if not runs:
            message = f"runs={pattern}: no run there; give folders with {CONFIG} and {METRICS}"
            raise SettingsError(message)
        found |= dict.fromkeys(runs)
    return list(found)


def _runs(place: Path) -> Iterator[Path]:
    if (place / CONFIG).is_file():
        yield place
        return
    if place.is_dir():
        for inner in sorted(place.iterdir(), key=lambda path: (len(path.name), path.name)):
            if (inner / CONFIG).is_file():
                yield inner


def read(folder: Path) -> Run:
    """Read one run; raises DataError where its files are damaged."""
    try:
        settings = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
        rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "train"]
        train = [(row["step"], row["loss"]) for row in steps]
        errors = [(row["epoch"], row["top1"]) for row in steps if "top1" in row]
        tests = [(row["step"], row["top1"], row["top5"]) for row in rows if row["kind"] == "test"]
        run = Run(folder, cast("dict[str, Any]", settings), train, tests, errors)
        _ = run.key, run.data  # all that is asked of it later is there
    except (OSError, ValueError, KeyError, TypeError, YAMLError, OmegaConfBaseException) as error:
        message = f"{folder}: not a run that can be read ({one_line(error)}); leave it out"
        raise DataError(message) from None
    return run
