"""Each experiment takes two steps, on two processes where its net is split."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ranks import Ranks

from modelpar import AlexNet, config
from modelpar.distributed import Mesh
from modelpar.net import paper
from modelpar.training import prepare, runner
from modelpar.training.checkpoint import newest

NAMES = sorted(path.stem for path in (config.conf_dir() / "experiment").glob("*.yaml"))
QUICK = {
    *("one_column", "conv6", "drop_conv3", "batch_norm", "dropout_conv4"),
    *("cifar_lrn", "cifar_tanh", "torchvision"),
}


# Those whose runs began with trained weights, here of a net with ten classes.
STARTED = {name for name in NAMES if config.load_group("experiment", name).get("init")}


@pytest.fixture(scope="module")
def trained_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the weights of the net with six convolutions, for 10 classes."""
    file = tmp_path_factory.mktemp("before") / "net.safetensors"
    crossings = paper.OWN_CROSSINGS["conv6"]
    net = AlexNet.from_recipe("code2012", 10, 64, seed=5, net="conv6", crossing_at=crossings)
    safetensors.torch.save_file(net.state_dict(), file)
    return file


def words_of(name: str) -> list[str]:
    small = ["data=synthetic", "batch_size=4", "steps=2", "compile=false"]
    if not name.startswith("cifar"):  # they are small
        small.append("model.image_size=64")
    return [f"experiment={name}", *small, "monitor.progress=false", "monitor.tensorboard=false"]


def trained(mesh: Mesh, name: str, run_dir: str, *words: str) -> None:
    settings = config.read("train", [*words_of(name), *words])
    runner.train(settings, prepare.prepare(settings), mesh, Path(run_dir))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES],
)
def test_each_experiment_trains_two_steps(
    pair: Ranks, tmp_path: Path, trained_before: Path, name: str
) -> None:
    run_dir = tmp_path / "run"
    words = [f"init.checkpoint={trained_before}"] if name in STARTED else []
    columns = config.read("train", words_of(name)).columns
    if columns == 1:
        trained(Mesh(torch.device("cpu")), name, str(run_dir))
    else:
        pair.run(trained, name, str(run_dir), *words)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", 1),
        ("train", 2),
        ("test", 2),
    ]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert (rows[0]["exchange_bytes_per_image"] > 0) == (columns == 2)
    found = newest(run_dir)
    assert found is not None
    assert found.manifest["columns"] == columns
    assert f"experiment: {name}\n" in (run_dir / "config.yaml").read_text()


def statistics(mesh: Mesh, run_dir: str, steps: int) -> None:
    words = [*words_of("batch_norm"), f"steps={steps}"]
    settings = config.read("train", words)
    runner.train(settings, prepare.prepare(settings), mesh, Path(run_dir))


@pytest.mark.slow
def test_running_means_are_saved_and_loaded(pair: Ranks, tmp_path: Path) -> None:
    pair.run(statistics, str(tmp_path / "twice"), 2)
    for name in ("twice", "once"):
        pair.run(statistics, str(tmp_path / name), 3)
    one, other = (newest(tmp_path / name) for name in ("twice", "once"))
    assert one is not None
    assert other is not None
    hashes = [
        {name: file["sha256"] for name, file in found.manifest["files"].items()}
        for found in (one, other)
    ]
    assert hashes[0] == hashes[1]
    tensors = one.manifest["files"]["column-1.weights.safetensors"]["tensors"]
    assert tensors["blocks.norm1.running_mean"]["whole"] == [96]
