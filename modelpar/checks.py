"""Whether settings are allowed: each by its field, and all of a command together."""

import math
from pathlib import Path
from typing import Any, Final

from modelpar.bench.contenders import CONTENDERS
from modelpar.declare import walk
from modelpar.errors import SettingsError, refuse_choice
from modelpar.files import check_folder, check_writable
from modelpar.net.paper import BASELINES
from modelpar.schemas import (
    BenchmarkSettings,
    ConvertSettings,
    ExportSettings,
    FiguresSettings,
    PredictSettings,
    PrepareSettings,
)
from modelpar.settings import EvaluateSettings, RankSettings, TrainSettings

FILES: Final[dict[type, tuple[str, ...]]] = {  # endings of the file that ``out`` names
    EvaluateSettings: (".json",),
    ExportSettings: (".safetensors", ".onnx", ".pt2"),
    ConvertSettings: (".safetensors",),
    PredictSettings: (".html", ".csv"),
}


def check(settings: Any, prefix: str = "") -> None:
    """Raise SettingsError for the first value that its field or the other settings forbid."""
    for key, entry, value in walk(settings, prefix):
        limits = entry.metadata
        if value == [] and limits.get("filled"):
            raise SettingsError(f"{key}=[]: use one or more values")
        values = value.values() if isinstance(value, dict) else value
        for one in values if isinstance(value, (dict, list, tuple)) else [value]:
            if one is not None and one not in limits.get("choices", [one]):
                refuse_choice(key, one, limits["choices"])
            if one is None or "minimum" not in limits:
                continue
            if not math.isfinite(one):
                raise SettingsError(f"{key}={one}: use a finite number")
            if one < limits["minimum"]:
                raise SettingsError(f"{key}={one}: use {limits['minimum']} or more")
            if one >= limits["below"]:
                raise SettingsError(f"{key}={one}: use a number below {limits['below']}")
    _check_combination(settings)
    _check_places(settings)
    if isinstance(settings, TrainSettings):
        _check_training(settings)


def _check_training(settings: TrainSettings) -> None:
    """Raise SettingsError for rules of training that do not fit each other."""
    parts, size = settings.accumulate, settings.batch_size
    if size % parts:
        raise SettingsError(
            f"accumulate={parts}: batch_size={size} cannot be cut into {parts} equal parts; "
            "use a divisor"
        )
    if settings.monitor.wandb and not settings.monitor.tensorboard:
        wrong = "monitor.wandb=true: copies the events of TensorBoard"
        raise SettingsError(f"{wrong}; use monitor.tensorboard=true")
    recipe = settings.recipe
    unrecorded = {
        "accumulate": parts > 1,
        "replicas": settings.replicas > 1,
        "recipe.clip": recipe.clip,
        "recipe.ema": recipe.ema,
        "compile=false": not settings.compile,
        "precision=float64": settings.precision == "float64",
    }
    if settings.cuda_graph == "on" and (used := [key for key in unrecorded if unrecorded[key]]):
        raise SettingsError(f"cuda_graph=on: records no steps with {used[0]}; use auto")


def check_net(settings: TrainSettings) -> None:
    """Raise SettingsError for a net that cannot be split, or cannot be trained in parts.

    Under torchrun ``replicas`` is known only after ``check``.
    """
    model, ema = settings.model, settings.recipe.ema
    if settings.columns > 1 and model.net in {"one_column", *BASELINES}:
        raise SettingsError(f"model.net={model.net}: has one column; use columns=1")
    if model.norm != "batch":
        return
    for key in ("replicas", "accumulate"):
        if getattr(settings, key) > 1:
            wrong = "model.norm=batch: each part of a batch would be normalized alone"
            raise SettingsError(f"{wrong}; use {key}=1")
    if ema:
        raise SettingsError(
            f"recipe.ema={ema}: averaged weights would need other statistics than those of "
            "model.norm=batch; use recipe.ema=0"
        )


def _check_combination(settings: Any) -> None:
    """Raise SettingsError where settings of a command do not fit each other."""
    if isinstance(settings, RankSettings):
        if settings.columns == 1 and settings.crossing.dtype not in {None, settings.precision}:
            wrong = f"crossing.dtype={settings.crossing.dtype}: one column has no crossings"
            raise SettingsError(
                f"{wrong}; use columns=2, with share_gpu=true on a host with one GPU, or "
                "crossing.dtype=null"
            )
        shown = str(getattr(settings, "out", "")).endswith(".html")
        if (count := getattr(settings, "neighbours", 0)) and not shown:
            raise SettingsError(f"neighbours={count}: requires out=FILE.html")
    elif isinstance(settings, BenchmarkSettings):
        odd = [size for size in settings.batch_sizes or [] if size % 2]
        timed = [] if settings.what == "data" else settings.contenders or CONTENDERS
        if odd and "ddp" in timed:
            raise SettingsError(f"batch_sizes={odd[0]}: ddp halves a batch; use even numbers")
        if len(settings.link.hosts) not in ({2} if settings.link.rates else {0, 2}):
            raise SettingsError("link: requires two hosts; use launch/slow_link.sh")
    elif isinstance(settings, FiguresSettings) and not (settings.checkpoint or settings.runs):
        raise SettingsError("checkpoint: missing; add checkpoint=RUN_DIR or runs=[RUN,RUN]")


def _check_places(settings: Any) -> None:
    """Raise SettingsError for an ``out`` with a wrong ending, or a place that cannot be used."""
    if cache := getattr(settings, "cache_dir", None):  # others may have filled it
        check_folder("cache_dir", Path(cache))
    out, ends = getattr(settings, "out", None), FILES.get(type(settings), ())
    if not out or (isinstance(settings, PrepareSettings) and settings.only_verifies):
        return
    if ends and not out.endswith(ends):
        raise SettingsError(f"out={out}: use a name that ends in {' or '.join(ends)}")
    check_writable("out", Path(out).parent if ends else Path(out))
