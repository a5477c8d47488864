"""Nets of one column train like the others: replicas, resume, evaluation, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from ranks import Ranks
from safetensors.torch import load_file

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.errors import SettingsError
from modelpar.images.loader import Batch
from modelpar.interchange import exports
from modelpar.net.plan import plan_for
from modelpar.training import evaluation, prediction, prepare, runner
from modelpar.training.checkpoint import newest, read_conv1, read_part
from modelpar.training.engine import Learner

ALONE = Mesh(torch.device("cpu"))
SIZES = {"four_layer": 28, "torchvision": 64}
BATCH = 8


def outcome(mesh: Mesh, net: str, steps: int) -> dict[str, Any]:
    """Train in float64 on this replica's rows of ``steps`` global batches."""
    words = [f"model.net={net}", "recipe.lr=0.001", "epochs=91", "seed=3", "precision=float64"]
    words.append("compile=false")
    settings = config.read("train", [*words, f"batch_size={BATCH // mesh.replicas}"])
    plan = plan_for(settings.recipe, settings.model, 10, SIZES[net])
    trained = Learner(plan, settings, mesh)
    source = torch.Generator().manual_seed(7)
    rows = slice(mesh.replica * trained.batch_size, (mesh.replica + 1) * trained.batch_size)
    losses: list[float] = []
    for step in range(steps):
        images = torch.randn(BATCH, 3, plan.image_size, plan.image_size, generator=source) * 60
        labels = torch.randint(0, 10, (BATCH,), generator=source)
        own = Batch(images[rows], labels[rows], 0.0)
        losses.append(float(trained.step(own, step, trained.schedule.rates(0))))
    return {"losses": losses, **trained.optimizer.weights()}


@pytest.mark.parametrize(
    "net", ["four_layer", pytest.param("torchvision", marks=pytest.mark.slow)]
)
def test_two_replicas_equal_one_process_on_the_global_batch(two_replicas: Ranks, net: str) -> None:
    whole = outcome(ALONE, net, 2)
    parts = two_replicas.run(outcome, net, 2)
    losses = whole.pop("losses")
    means = [sum(both) / 2 for both in zip(*(part.pop("losses") for part in parts), strict=True)]
    assert means == pytest.approx(losses, rel=1e-12)
    for key, value in whole.items():
        assert torch.equal(parts[0][key], parts[1][key]), key
        assert float((parts[0][key] - value).norm() / value.norm()) < 1e-12, key


def words(images: Path, net: str, *more: str) -> list[str]:
    return [
        *("data=imagefolder", f"data.root={images}", f"model.net={net}", "columns=1"),
        *(f"model.image_size={SIZES[net]}", "workers=0", "batch_size=8", "compile=false"),
        *("monitor.progress=false", "monitor.tensorboard=false", *more),
    ]


def trained(settings: list[str], run_dir: Path) -> None:
    read = config.read("train", settings)
    runner.train(read, prepare.prepare(read), ALONE, run_dir)


@pytest.mark.parametrize(
    "net", ["four_layer", pytest.param("torchvision", marks=pytest.mark.slow)]
)
def test_run_resumes_exactly_and_is_evaluated_and_exported(
    images: Path, tmp_path: Path, net: str, capsys: pytest.CaptureFixture[str]
) -> None:
    how = words(images, net, "epochs=2", "recipe.lr=0.001")
    trained(how, tmp_path / "once")
    trained([*how, "steps=3"], tmp_path / "twice")
    trained(how, tmp_path / "twice")
    once, twice = newest(tmp_path / "once"), newest(tmp_path / "twice")
    assert once is not None
    assert twice is not None
    assert once.step == twice.step == 10
    state = read_part(once, "weights", None)
    for kind in ("weights", "velocities"):
        one, other = (read_part(each, kind, None) for each in (once, twice))
        assert all(torch.equal(one[key], other[key]) for key in one), kind
    tensors = once.manifest["files"]["whole.weights.safetensors"]["tensors"]
    assert all(place["whole"] == list(state[key].shape) for key, place in tensors.items())
    assert (tmp_path / "once" / "conv1.png").is_file()
    assert read_conv1(once).shape == (64, 3, *((5, 5) if net == "four_layer" else (11, 11)))

    file = tmp_path / "net.safetensors"
    request = [f"checkpoint={tmp_path / 'once'}", f"out={file}"]
    exports.export(config.read("export", request))
    assert f"{len(state)} tensors" in capsys.readouterr().out
    exported = load_file(file)
    assert all(torch.equal(value, exported[key]) for key, value in state.items())
    if net == "torchvision":
        torchvision.models.AlexNet(2).load_state_dict(exported)

    rows = map(json.loads, (tmp_path / "once" / "metrics.jsonl").read_text().splitlines())
    last = [row for row in rows if row["kind"] == "test"][-1]
    for place in (tmp_path / "once", file):
        settings = config.read("evaluate", [f"checkpoint={place}", "columns=1"])
        found = evaluation.evaluate_checkpoint(settings, evaluation.prepare(settings), ALONE)
        (errors,) = found.members
        assert errors.top1 == last["top1"]
        assert errors.loss == pytest.approx(last["loss"], rel=1e-5)
    request = [f"checkpoint={file}", f"images={images}/val", "neighbours=1", "training_images=4"]
    settings = config.read("predict", [*request, f"out={tmp_path}/page.html"])
    answers, _ = prediction.predict_files(settings, prediction.prepare(settings), ALONE)
    wrong = [Path(one.file).parent.name != one.prediction.classes[0] for one in answers]
    assert 100 * sum(wrong) / len(wrong) == last["top1"]
    assert all(len(one.nearest) == 1 for one in answers)
    with pytest.raises(SettingsError, match="its net has one column; use columns=1"):
        evaluation.prepare(config.read("evaluate", [f"checkpoint={file}"]))


@pytest.mark.parametrize("net", SIZES)
def test_one_column_is_not_split(images: Path, net: str) -> None:
    with pytest.raises(SettingsError, match=f"model.net={net}: has one column; use columns=1"):
        prepare.prepare(config.read("train", [*words(images, net), "columns=2"]))
