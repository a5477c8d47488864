"""A run that starts from layers of another net, rates by layer, and files of older versions."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import nn

from modelpar import Recipe, config
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, SettingsError
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import Plan, plan_for
from modelpar.training import prepare, runner
from modelpar.training.checkpoint import MANIFEST, newest, read_part, signed
from modelpar.training.optimizer import MomentumDecay
from modelpar.training.schedule import Schedule

SMALL = ["data=synthetic", "experiment=cifar_relu", "batch_size=4", "compile=false", "recipe.lr=0"]
QUIET = ["monitor.progress=false", "monitor.tensorboard=false"]


def source(folder: Path, classes: int = 7) -> Path:
    """Write the weights of a four-layer net for another number of classes."""
    settings = config.read("train", SMALL)
    recipe = Recipe(**vars(settings.recipe))
    net = whole_net(plan_for(recipe, settings.model, classes, 28), seed=5)
    safetensors.torch.save_file(net.state_dict(), folder / "other.safetensors")
    return folder / "other.safetensors"


def train(run_dir: Path, *words: str) -> dict[str, torch.Tensor]:
    """Train in one process with rates of 0; return the weights of the newest checkpoint."""
    settings = config.read("train", [*SMALL, *QUIET, "model.num_classes=10", *words])
    runner.train(settings, prepare.prepare(settings, run_dir), Mesh(torch.device("cpu")), run_dir)
    found = newest(run_dir)
    assert found is not None
    return read_part(found, "weights", None)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_net_has_exactly_the_chosen_layers_of_another(tmp_path: Path, precision: str) -> None:
    file, run_dir = source(tmp_path), tmp_path / "run"
    words = [f"init.checkpoint={file}", "init.layers=[conv1,local4]", f"precision={precision}"]
    found = train(run_dir, *words, "steps=1")
    usual = train(tmp_path / "usual", f"precision={precision}", "steps=1")
    theirs = safetensors.torch.load_file(file)
    for name, value in found.items():
        chosen = name.partition(".")[0] in {"conv1", "local4"}
        assert torch.equal(value, (theirs if chosen else usual)[name]), name
        assert name.endswith(".bias") or not torch.equal(theirs[name][:7], usual[name][:7]), name
    file.unlink()  # a run that continues does not read it again
    again = train(run_dir, *words, "steps=2")
    assert all(torch.equal(again[name], value) for name, value in found.items())


@pytest.mark.parametrize(
    ("words", "kind", "line"),
    [
        (["init.layers=[conv9]"], SettingsError, r"init.layers=conv9: did you mean conv2\?"),
        (["init.layers=[fc10]"], CheckpointError, "fc10.bias has shape.*leave fc10 out of init.l"),
        ([], SettingsError, r"init.layers: missing; add init.layers=\[LAYER,LAYER\]"),
        (
            ["init.layers=[conv1]", "init.checkpoint=null"],
            SettingsError,
            "init.checkpoint: missing; add init.checkpoint=RUN_DIR",
        ),
        (
            ["init.layers=[conv1]", "init.checkpoint=gone"],
            CheckpointError,
            "init.checkpoint=.*gone: no checkpoint there",
        ),
    ],
)
def test_layers_that_do_not_fit_are_one_line(
    tmp_path: Path, words: list[str], kind: type[Exception], line: str
) -> None:
    with pytest.raises(kind, match=line) as caught:
        train(tmp_path / "run", f"init.checkpoint={source(tmp_path)}", *words)
    assert "\n" not in str(caught.value)


def without(values: Any, *keys: str) -> Any:
    for key in keys:
        del values[key]
    return values


def test_a_run_of_a_version_without_the_newest_settings_continues(tmp_path: Path) -> None:
    train(tmp_path, "steps=1")
    saved = OmegaConf.load(tmp_path / "config.yaml")
    without(saved.recipe, "bias_drop", "rates_by_layer")
    OmegaConf.save(without(saved, "init"), tmp_path / "config.yaml")
    step = newest(tmp_path)
    assert step is not None
    without(step.manifest["plan"]["recipe"], "bias_drop", "rates_by_layer")
    (step.folder / MANIFEST).write_text(json.dumps(signed(step.manifest)))
    train(tmp_path, "steps=2")
    step = newest(tmp_path)
    assert step is not None
    assert step.step == 2
    with pytest.raises(SettingsError, match="bias_drop=null, not last"):
        train(tmp_path, "steps=3", "recipe.bias_drop=last")


def test_rates_by_layer_are_those_of_the_update() -> None:
    net = nn.ModuleDict({name: nn.Linear(3, 2, dtype=torch.float64) for name in ("conv1", "fc8")})
    recipe = Recipe.named("code2012")
    recipe.rates_by_layer = {"fc8": 10.0}
    optimizer = MomentumDecay(net, recipe, torch.float64)
    weights = {name: value.detach().clone() for name, value in net.named_parameters()}
    velocities = {name: torch.zeros_like(value) for name, value in weights.items()}
    schedule = Schedule(recipe, 91, list(weights))
    for epoch in (0, 24, 25):
        optimizer.set_rates(schedule.rates(epoch))
        for name, parameter in net.named_parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
            rate = 0.01 * (0.1 if epoch == 25 else 1.0)
            decay = 5e-4
            if name.endswith(".bias"):
                rate, decay = 0.02, 0.0
            rate *= 10 if name.startswith("fc8") else 1
            slope = 0.5 + decay * weights[name]
            velocities[name] = 0.9 * velocities[name] - rate * slope
            weights[name] = weights[name] + velocities[name]
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert torch.allclose(parameter, weights[name], rtol=1e-12, atol=0), name


def test_a_plan_describes_rates_by_layer() -> None:
    recipe = Recipe.named("code2012")
    recipe.rates_by_layer = {"conv1": 0.5}
    assert Plan(recipe) != Plan(Recipe.named("code2012"))
