"""Two processes start from layers of another net, and have the weights of one process."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from ranks import Ranks

from modelpar import AlexNet, config
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, SettingsError
from modelpar.training import prepare, runner, trainer
from modelpar.training.checkpoint import newest, read_part
from modelpar.training.metrics import read_rows

LAYERS = ("conv2", "conv3", "fc6", "fc8")  # of groups, of a crossing, split by inputs


def trained(mesh: Mesh, run_dir: str, *words: str) -> None:
    small = ["data=synthetic", "model.image_size=64", "model.num_classes=10", "batch_size=4"]
    quiet = ["compile=false", "monitor.progress=false", "monitor.tensorboard=false"]
    settings = config.read("train", [*small, *quiet, "steps=1", "recipe.lr=0", *words])
    runner.train(settings, prepare.prepare(settings), mesh, Path(run_dir))


def refused(mesh: Mesh, run_dir: str, *words: str) -> str:
    with pytest.raises(SettingsError) as caught:
        trained(mesh, run_dir, *words)
    return str(caught.value)


def test_a_pair_has_exactly_the_chosen_layers_of_another_net(pair: Ranks, tmp_path: Path) -> None:
    theirs = AlexNet.from_recipe("paper", 10, 64, seed=5).state_dict()
    usual = AlexNet.from_recipe("code2012", 10, 64, seed=0).state_dict()
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file(theirs, file)
    words = [f"init.checkpoint={file}", f"init.layers=[{','.join(LAYERS)}]"]
    pair.run(trained, str(tmp_path / "run"), *words)
    found = newest(tmp_path / "run")
    assert found is not None
    weights = read_part(found, "weights", None)
    assert weights.keys() == usual.keys()
    for name, value in weights.items():
        assert torch.equal(value, (theirs if name.startswith(LAYERS) else usual)[name]), name
    bad = pair.run(refused, str(tmp_path / "bad"), words[0], "init.layers=[conv9]")
    assert all("init.layers=conv9: did you mean" in line for line in bad)


def unwritable(mesh: Mesh, run_dir: str, folder: str) -> str:
    """Train where ``folder`` of the run directory may not be written on rank 1's host."""
    real = trainer.try_writing

    def refuse(place: Path) -> None:
        if mesh.rank == 1 and place.name == folder:
            raise PermissionError(13, "Permission denied", str(place))
        real(place)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "try_writing", refuse)
        with pytest.raises(CheckpointError) as caught:
            trained(mesh, run_dir)
    return str(caught.value)


def test_checkpoints_that_could_not_be_saved_are_noticed_before_the_first_step(
    pair: Ranks, tmp_path: Path
) -> None:
    one, other = pair.run(unwritable, str(tmp_path / "run"), "checkpoints")
    assert one == other
    assert one.startswith(f"{tmp_path / 'run'}: cannot be written ([Errno 13] Permission denied")
    assert not read_rows(tmp_path / "run")
