"""A trained net as it was saved: by a run, in one of its steps, or as one exported file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor

from modelpar.errors import CheckpointError, SettingsError, one_line
from modelpar.groups import DataSettings
from modelpar.images.augment import Statistics
from modelpar.net.plan import Plan, plan_of
from modelpar.training import checkpoint, exported
from modelpar.training.checkpoint import Checkpoint

RUN_KEYS: Final = ("step", "seed", "images_a_step")  # numbers that a manifest records of its run
NO_RECORD: Final = (SafetensorError, KeyError, TypeError, ValueError)  # if a file is no export


@dataclass(frozen=True)
class TrainedNet:
    """Weights, with what the manifest of their run or the metadata of their file records."""

    path: str  # as the settings name it
    source: Checkpoint | Path
    plan: Plan
    data: DataSettings
    step: int
    seed: int
    images_a_step: int
    classes: list[str] | None  # None: of a version that did not record them
    names: list[str]  # of the classes, for people; numbers if none are recorded
    kind: str  # of tensors: weights, or their moving average, ema
    statistics: Statistics | None  # that it was trained with; None: a file of a version without
    record: Mapping[str, Any]  # everything that the manifest or the metadata has

    def weights(self, column: int | None) -> dict[str, Tensor]:
        """Return a column's weights, or the whole net's for None; raises CheckpointError."""
        return checkpoint.read_part(self.source, self.kind, column)


def paths_of(given: Any) -> list[str]:
    """Return the paths of ``checkpoint=PATH`` or ``checkpoint=[PATH,PATH]``."""
    if not given:
        raise SettingsError(f"checkpoint={given}: use a path, or a list of paths, [PATH,PATH]")
    return given if isinstance(given, list) else [given]


def find(path: str, *, ema: bool = False) -> TrainedNet:
    """Resolve RUN_DIR, STEP_DIR or FILE.safetensors; raises CheckpointError.

    ``ema``: with the moving average in place of the weights.
    """
    source = checkpoint.find(path)
    try:
        if isinstance(source, Checkpoint):
            record, stats = source.manifest, Statistics(**checkpoint.read_statistics(source))
        else:
            record, stats = exported.read(source)
        schema = OmegaConf.structured(DataSettings)
        data: Any = OmegaConf.to_object(OmegaConf.merge(schema, record["data"]))
        plan, numbers = plan_of(record["plan"]), [int(record[key]) for key in RUN_KEYS]
        classes = record.get("classes")
        names = record.get("names") or classes or range(plan.num_classes)
        if len(names) != plan.num_classes:
            raise ValueError(f"{len(names)} names of {plan.num_classes} classes")
        if stats is not None:
            shape = tuple(stats.mean.shape)
            if shape != (3, shape[-1], shape[-1]) or shape[-1] < plan.image_size:
                raise ValueError(f"mean image of shape {shape}")
    except OSError as error:
        raise checkpoint.unreadable(Path(path), error) from None
    except (*NO_RECORD, OmegaConfBaseException, SettingsError) as error:
        raise CheckpointError(
            f"checkpoint={path}: does not describe the net it holds ({one_line(error)})"
        ) from None
    if ema and not (isinstance(source, Checkpoint) and plan.recipe.ema):
        raise CheckpointError(
            f"checkpoint={path}: has no moving average of the weights; use ema=false, or a run "
            "that was trained with recipe.ema"
        )
    return TrainedNet(
        path,
        source,
        plan,
        data,
        *numbers,
        classes=classes,
        names=[str(name) for name in names],
        kind="ema" if ema else "weights",
        statistics=stats,
        record=record,
    )
