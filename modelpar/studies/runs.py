"""Runs as they lie on the disk: which they are, what they were told, how they went."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Final, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modelpar.errors import DataError, SettingsError, one_line
from modelpar.training.monitor import METRICS
from modelpar.training.run_dir import CONFIG

# What does not make a run another one: where it ran, what it showed, and the seed.
APART: Final = frozenset(
    {
        *("seed", "run_dir", "resume", "device", "threads", "workers", "cache_dir", "restarts"),
        *("checkpoint_every", "keep_last", "keep_every", "keep_best", "log_every", "compile"),
        *("channels_last", "columns", "replicas", "comm", "monitor", "tf32", "on_failure"),
        *("published", "control_published", "control", "experiment"),
    }
)
FOLDER: Final = "imagefolder"  # its folder says which images
IMAGES: Final = ("name", "image_size", "num_classes")  # of ``data``: which images these are
SIZES: Final = ("model.image_size", "model.num_classes")


def told(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return what makes a training another one, the seed apart: dotted keys, values as JSON."""
    data = settings["data"]
    own = {key: value for key, value in settings.items() if key not in APART}
    own["data"] = {key: data[key] for key in IMAGES}
    own["crossing"] = {"dtype": settings.get("crossing", {}).get("dtype")}  # the rest is speed
    if data["name"] == FOLDER:
        own["data"]["root"] = data["root"]
    own["epochs"] = settings.get("epochs") or data.get("epochs")
    flat: dict[str, str] = {}
    for key, value in own.items():
        parts = value.items() if isinstance(value, dict) else [(None, value)]
        for part, one in cast("Iterable[tuple[str | None, Any]]", parts):
            flat[f"{key}.{part}" if part else key] = json.dumps(one)
    return flat


@dataclass(frozen=True)
class Run:
    """One training: its settings, and its rows of metrics.jsonl."""

    folder: Path
    settings: dict[str, Any]
    losses: list[tuple[int, float]]  # step, training loss in nats
    tests: list[tuple[int, float, float]]  # step, top-1 and top-5 error in %
    training: list[tuple[int, float]]  # epoch, top-1 error in % of a step; older rows have none
    ended: bool = True  # the last test is the one at its end, with all its views

    @cached_property
    def told(self) -> dict[str, str]:
        """What makes it another training than another, see ``told``."""
        return told(self.settings)

    @property
    def label(self) -> str:
        """The experiment's name, or the recipe's with the model's switches."""
        model = {key: value for key, value in self.settings["model"].items() if value is not None}
        switches = [
            f"{key}={value}" for key, value in model.items() if f"model.{key}" not in SIZES
        ]
        name = self.settings.get("experiment")
        return name or " ".join([self.settings["recipe"]["name"], *switches])

    @property
    def data(self) -> str:
        """The images it learnt from and was tested on: name, classes if chosen, size."""
        model, data = self.settings["model"], self.settings["data"]
        where = [data["name"] if data["name"] != FOLDER else f"{FOLDER} {data['root']}"]
        classes = [f"{model['num_classes']} classes"] if model.get("num_classes") else []
        size = f"{model['image_size'] or data['image_size']} pixels"
        return ", ".join([*where, *classes, size])

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.settings["seed"])

    @property
    def key(self) -> str:
        """Everything that the runs of one experiment have in common, but the seed."""
        return json.dumps([self.label, self.told], sort_keys=True)


def find(patterns: Sequence[str]) -> list[Path]:
    """Return the runs that ``patterns`` name: runs, sweeps of runs, globs of either.

    Raises SettingsError for a pattern that names none.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        named = Path(pattern).expanduser()  # absolute or not: Path.glob takes either by half
        places = [Path(place) for place in sorted(glob(str(named)))]  # noqa: PTH207
        runs = [run for place in places for run in _runs(place)]
        if not runs:
            raise SettingsError(
                f"runs={pattern}: no run there; give folders with {CONFIG} and {METRICS}"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)  # once, by whatever name
    return list(found.values())


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
        *lines, _ = (folder / METRICS).read_text().split("\n")  # the last is empty, or cut
        rows = [json.loads(line) for line in lines]
        steps = [row for row in rows if row["kind"] == "train"]
        train = [(int(row["step"]), float(row["loss"])) for row in steps]
        errors = [(int(row["epoch"]), float(row["top1"])) for row in steps if "top1" in row]
        tests = [
            (int(row["step"]), float(row["top1"]), float(row["top5"]))
            for row in rows
            if row["kind"] == "test"
        ]
        own = cast("dict[str, Any]", settings)
        run = Run(folder, own, train, tests, errors, _ended(own, rows))
        _ = run.key, run.data  # all that is asked of it later is there
    except (OSError, ValueError, KeyError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise DataError(
            f"{folder}: not a run that can be read ({one_line(error)}); leave it out"
        ) from None
    return run


def _ended(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last row is the test that ends the run; older ones do not tell their views."""
    steps = [row for row in rows if row["kind"] == "train"]
    if not steps or rows[-1]["kind"] != "test":
        return False
    views, planned = settings.get("views", 1), settings.get("steps")
    whole = steps[-1]["epoch"] + 1 >= (settings.get("epochs") or settings["data"]["epochs"])
    return rows[-1].get("views", views) == views and (
        whole or (planned is not None and rows[-1]["step"] >= planned)
    )
