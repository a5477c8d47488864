"""Read trainings from the disk: their settings, their errors, and what identifies them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, Final

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modelpar.errors import DataError, SettingsError, one_line
from modelpar.files import matches
from modelpar.net.paper import SCHEDULES
from modelpar.training.metrics import METRICS
from modelpar.training.run_dir import CONFIG

# The settings that identify a training. The others are its seed, where it ran, what it reported.
LENGTH: Final = ("epochs", "steps", "early_stopping")
IDENTIFYING: Final = ("recipe", "model", *LENGTH, "batch_size", "views", "precision")
SIZES: Final = ("model.image_size", "model.num_classes")
ROOTED: Final = ("imagefolder", "packed")  # data sets whose folder decides which images they have
DAMAGED: Final = (OSError, ValueError, KeyError, TypeError, AttributeError)  # as JSON or YAML
GOAL: Final = 25.0  # figure 1: training error in %


def identity(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that identify a training, without the seed: by dotted key, as JSON."""
    data = settings["data"]
    chosen = {key: settings[key] for key in IDENTIFYING if key in settings}
    if "batch_size" in chosen:
        chosen["batch_size"] *= settings.get("replicas", 1)  # images per step
    chosen["epochs"] = settings.get("epochs") or data.get("epochs")
    chosen["init"] = {"layers": settings.get("init", {}).get("layers", [])}
    chosen["debug"] = {"one_batch": settings.get("debug", {}).get("one_batch", False)}
    chosen["crossing"] = {"dtype": settings.get("crossing", {}).get("dtype")}
    chosen["data"] = {key: data[key] for key in ("name", "image_size", "num_classes")}
    if data["name"] in ROOTED:
        chosen["data"]["root"] = data["root"]
    flat: dict[str, str] = {}
    for key, value in chosen.items():
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{part}".rstrip("."): json.dumps(parts[part]) for part in parts}
    return flat


@dataclass(frozen=True)
class Run:
    """One training: its settings, and what its metrics.jsonl holds."""

    folder: Path
    settings: dict[str, Any]
    identity: dict[str, str]
    label: str  # the experiment's name, or the recipe's name and the model's switches
    data: str  # the images: data set, number of classes if chosen, size
    seed: int
    losses: list[tuple[int, float]]  # step, training loss in nats
    tests: list[tuple[int, float, float]]  # step, top-1 and top-5 error in %
    training: list[tuple[int, float]]  # epoch, top-1 error of a step in %; none in old runs
    finished: bool  # the last row is the evaluation at the end, with all its views

    @property
    def activation(self) -> str:
        """The activation function, which by default is ReLU."""
        return self.settings["model"].get("activation") or "relu"

    @property
    def initial(self) -> str | None:
        """The net that some layers started from, as ``init.checkpoint`` names it."""
        return self.settings.get("init", {}).get("checkpoint")

    def curve(self) -> list[tuple[float, float]]:
        """Return for each epoch its middle and the mean training error of its steps in %.

        A step's error is that of its batch before the update, augmented and with dropout.
        """
        epochs: dict[int, list[float]] = {}
        for epoch, error in self.training:
            epochs.setdefault(epoch, []).append(error)
        return [(epoch + 0.5, mean(errors)) for epoch, errors in sorted(epochs.items())]

    def epochs_to_goal(self) -> float | None:
        """Return when the curve first reaches ``GOAL``, by linear interpolation; None: never."""
        points = self.curve()
        if points and points[0][1] <= GOAL:
            return points[0][0]
        for (before, high), (after, low) in pairwise(points):
            if low <= GOAL < high:
                return before + (after - before) * (high - GOAL) / (high - low)
        return None


def run_of(folder: Path, settings: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> Run:
    """Return the run with these settings and rows; raises KeyError, TypeError, ValueError."""
    steps = [row for row in rows if row["kind"] == "train"]
    tests = [row for row in rows if row["kind"] == "test"]
    finished = False
    if steps and rows[-1]["kind"] == "test":
        views, length = settings.get("views", 1), settings.get("epochs")
        length = length or settings["data"]["epochs"]
        length = length or SCHEDULES[settings["recipe"]["schedule"]].length
        ended = rows[-1]["step"] >= (settings.get("steps") or math.inf)
        ended = ended or steps[-1]["epoch"] + 1 >= length
        ended = ended or "early_stopping" in rows[-1]
        finished = ended and rows[-1].get("views", views) == views  # old rows: no views
    return Run(
        folder,
        settings,
        identity(settings),
        _label(settings),
        _data(settings),
        int(settings["seed"]),
        [(int(row["step"]), float(row["loss"])) for row in steps],
        [(int(row["step"]), float(row["top1"]), float(row["top5"])) for row in tests],
        [(int(row["epoch"]), float(row["top1"])) for row in steps if "top1" in row],
        finished,
    )


def _label(settings: Mapping[str, Any]) -> str:
    model = settings["model"].items()
    switches = [f"{k}={v}" for k, v in model if v is not None and f"model.{k}" not in SIZES]
    return settings.get("experiment") or " ".join([settings["recipe"]["name"], *switches])


def _data(settings: Mapping[str, Any]) -> str:
    model, data = settings["model"], settings["data"]
    name = f"{data['name']} {data['root']}" if data["name"] in ROOTED else data["name"]
    classes = f", {model['num_classes']} classes" if model.get("num_classes") else ""
    return f"{name}{classes}, {model['image_size'] or data['image_size']} pixels"


def read(folder: Path) -> Run:
    """Read one run; raises DataError if its files are damaged."""
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
        metrics = folder / METRICS
        text = metrics.read_text("utf-8") if metrics.exists() else ""  # stopped before its start
        *lines, _ = text.split("\n")  # the last is empty or incomplete
        return run_of(folder, settings, [json.loads(line) for line in lines])
    except (*DAMAGED, YAMLError, OmegaConfBaseException) as error:
        raise DataError(
            f"{folder}: cannot read this run ({one_line(error)}); fix it or leave it out"
        ) from None


def find(patterns: Sequence[str]) -> list[Path]:
    """Return each run once that ``patterns`` name: runs, sweeps of runs, globs of either.

    Raises SettingsError for a pattern that names none.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        runs = [run for place in matches(pattern) for run in _runs_in(Path(place))]
        if not runs:
            raise SettingsError(
                f"runs={pattern}: no run there; use folders with {CONFIG} and {METRICS}"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(place: Path) -> list[Path]:
    """Return ``place`` if it is a run, or the jobs of a sweep in the order of their numbers."""
    if (place / CONFIG).is_file():
        return [place]
    jobs = [file.parent for file in place.glob(f"*/{CONFIG}")]
    return sorted(jobs, key=lambda job: (len(job.name), job.name))
