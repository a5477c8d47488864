"""Exports trained weights as one file: of one checkpoint, or their mean over several."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from operator import attrgetter

import safetensors.torch
from torch import Tensor

from modelpar import config
from modelpar.errors import SettingsError
from modelpar.files import write_out
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import settings_of
from modelpar.net.weights import check_state
from modelpar.schemas import ExportSettings
from modelpar.training.trained import MEAN, METADATA, RUN_KEYS, TrainedNet, find, paths_of


def mean_weights(nets: Sequence[TrainedNet]) -> dict[str, Tensor]:
    """Return the mean of the whole net's weights over steps of one training, in their dtype.

    Differs: paper and code average the predictions of several nets.  Raises CheckpointError,
    SettingsError.
    """
    first, *others = nets
    seen = {first.step}
    for other in others:
        fix = "average the steps of one training, or predictions with modelpar-evaluate"
        for key in ("plan", "seed", "images_a_step", "classes"):
            if getattr(other, key) != getattr(first, key):
                raise SettingsError(
                    f"checkpoint={other.path}: another {key} than {first.path}; {fix}"
                )
        if other.step in seen:
            raise SettingsError(
                f"checkpoint={other.path}: step {other.step} is there twice; {fix}"
            )
        seen.add(other.step)
    if others and first.plan.norm == "batch":
        raise SettingsError(
            f"checkpoint={first.path}: averaged weights would need other statistics than those of "
            "model.norm=batch; use one checkpoint"
        )
    whole, sums, weights = whole_net(first.plan, seed=0), dict[str, Tensor](), dict[str, Tensor]()
    for one in nets:
        weights = one.weights(None)
        check_state(whole, weights, one.path)
        for name, weight in weights.items():
            sums[name] = sums.get(name, 0) + weight.double()
    return {name: (sums[name] / len(nets)).to(weight.dtype) for name, weight in weights.items()}


def export(settings: ExportSettings) -> None:
    """Write the whole net to one safetensors file, and print a line that describes it.

    Of several checkpoints of one training it has the mean.  Raises CheckpointError, SettingsError.
    """
    nets = [find(path, ema=settings.ema) for path in paths_of(settings.checkpoint)]
    weights, out = mean_weights(nets), settings.out
    trained = max(nets, key=attrgetter("step"))
    record = {
        "plan": settings_of(trained.plan),
        "data": config.without_secrets(asdict(trained.data)),
        **{key: getattr(trained, key) for key in (*RUN_KEYS, "classes", "names")},
    }
    metadata = {METADATA: json.dumps(record)}
    if stats := trained.statistics():
        metadata[MEAN] = base64.b64encode(safetensors.torch.save(vars(stats))).decode()
    write_out(out, safetensors.torch.save(weights, metadata))
    parameters = sum(value.numel() for value in weights.values())
    name = trained.plan.recipe.name
    mean = f", mean of {len(nets)} checkpoints" * (len(nets) > 1)
    print(f"{out}: {len(weights)} tensors, {parameters:,} parameters, {name}{mean}")  # noqa: T201
