"""Checkpoints are whole or not there; each damage is named."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modelpar import AlexNet, Recipe, config, split
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import plan_for
from modelpar.net.weights import location
from modelpar.training import checkpoint
from modelpar.training.checkpoint import Checkpoint, find, newest, open_step, read_part, save
from modelpar.training.saver import Checkpointer, Retention, prune

ONE = Mesh(torch.device("cpu"))
KEEP = Retention(2)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    net = AlexNet.from_recipe("code2012", 10, 64, seed=seed)
    return {key: value.detach() for key, value in net.state_dict().items()}


SMALL = {
    f"{name}.{kind}": torch.randn(shape)
    for name in ("conv1", "fc8")
    for kind, shape in (("weight", (4, 6)), ("bias", (4,)))
}


def write(
    run_dir: Path, step: int, keep: Retention = KEEP, weights: Any = None, **told: Any
) -> Path:
    weights = SMALL if weights is None else weights
    parts: Any = {"weights": weights, "velocities": weights}
    manifest = {"step": step, **told}
    folder = save(run_dir / "checkpoints", ONE, parts, {"mean": torch.ones(1)}, manifest)
    prune(run_dir / "checkpoints", keep)
    return folder


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    found = newest(tmp_path)
    assert found is not None
    assert (found.step, found.folder) == (7, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "statistics.safetensors",
        "whole.velocities.safetensors",
        "whole.weights.safetensors",
    ]
    for kind in ("weights", "velocities"):
        read = read_part(found, kind, None)  # type: ignore[arg-type]
        assert read.keys() == SMALL.keys()
        assert all(torch.equal(read[key], SMALL[key]) for key in SMALL)


def test_the_whole_net_is_read_as_columns(tmp_path: Path) -> None:
    whole_net = state()
    write(tmp_path, 1, weights=whole_net)
    found = newest(tmp_path)
    assert found is not None
    for column, expected in enumerate(split(whole_net)):
        read = read_part(found, "weights", column)
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]


def test_each_nth_and_the_best_are_kept_too(tmp_path: Path) -> None:
    errors = {1: 50.0, 2: 20.0, 5: 30.0, 6: 10.0}  # 6 was tested at 5
    for step in range(1, 10):
        tested = step if step != 6 else 5
        write(tmp_path, step, Retention(2, 4, best=True), top1=errors.get(step), tested=tested)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-0000000{step}" for step in (2, 4, 8, 9)]


def test_a_saver_writes_what_was_there_when_it_started(tmp_path: Path) -> None:
    weights = {key: value.clone() for key, value in SMALL.items()}
    saver = Checkpointer(tmp_path / "checkpoints", ONE, KEEP)
    saver.start({"weights": weights, "velocities": weights}, {"mean": torch.ones(1)}, {"step": 3})
    for value in weights.values():
        value.zero_()
    assert saver.end() == tmp_path / "checkpoints" / "step-00000003"
    assert saver.end() is None
    assert saver.take() is None
    found = newest(tmp_path)
    assert found is not None
    read = read_part(found, "weights", None)
    assert all(torch.equal(read[key], SMALL[key]) for key in SMALL)


def test_a_save_that_fails_is_raised_later_and_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    saver = Checkpointer(tmp_path / "checkpoints", ONE, KEEP)
    saver.start({"weights": SMALL, "velocities": SMALL}, {"mean": torch.ones(1)}, {"step": 3})
    saver.close()
    assert saver.failed()
    assert saver.take() is None
    with pytest.raises(CheckpointError, match="not saved"):
        saver.end()
    assert not saver.failed()
    assert saver.end() is None


def test_a_step_that_is_saved_again_is_told_more_of_and_not_overwritten(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, untested=True, tested=-1)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write(tmp_path, 3, untested=False, tested=3, top1=9.0)
    found = newest(tmp_path)
    assert found is not None
    assert (found.manifest["untested"], found.manifest["tested"]) == (False, 3)
    assert torch.equal(read_part(found, "weights", None)["fc8.bias"], SMALL["fc8.bias"])
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_run_directory_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not saved.*No such file"):
        write(tmp_path / "gone", 3)
    assert not (tmp_path / "gone").exists()


def test_a_folder_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    folder.rename(folder.with_name("step-00000099"))
    with pytest.raises(CheckpointError, match="step-00000099: holds step 3"):
        newest(tmp_path)


def test_what_was_just_saved_stays_whatever_lies_beside_it(tmp_path: Path) -> None:
    for step in (7, 8):
        write(tmp_path, step)
    saver = Checkpointer(tmp_path / "checkpoints", ONE, KEEP)
    parts: Any = {"weights": SMALL, "velocities": SMALL}
    saver.start(parts, {"mean": torch.ones(1)}, {"step": 3})
    assert saver.end() == tmp_path / "checkpoints" / "step-00000003"
    assert len(checkpoint.steps(tmp_path / "checkpoints")) == 3


def test_what_a_cut_off_save_left_is_swept(tmp_path: Path) -> None:
    write(tmp_path, 3)
    folder = tmp_path / "checkpoints"
    for name in (".tmp-step-00000004", ".del-step-00000001"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    write(tmp_path, 5)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000003", "step-00000005"]


def test_unfinished_and_foreign_folders_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, 3)
    folder = tmp_path / "checkpoints"
    for name in (".tmp-step-00000009", "step-00000008", "step-9-old", "my-step-00000007"):
        (folder / name).mkdir()
    (folder / ".tmp-step-00000009" / "manifest.json").write_text("{}")
    (folder / "step-9-old" / "manifest.json").write_text("{}")
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 3


@pytest.mark.parametrize(
    "name",
    ["whole.weights.safetensors", "whole.velocities.safetensors", "statistics.safetensors"],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_each_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = write(tmp_path, 3)
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    path.write_bytes(bytes(content[:-5] if damage == "cut" else content))
    if damage == "gone":
        path.unlink()
    found = newest(tmp_path)
    assert found is not None
    kind: Any = name.split(".")[1]
    read = partial(read_part, found, kind, None)
    if name.startswith("statistics"):
        read = partial(checkpoint.read_statistics, found)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, 3)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        open_step(folder)


def change(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(checkpoint.signed({**json.loads(path.read_text()), **values})))


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    change(folder, format=7)
    with pytest.raises(CheckpointError, match="format 7, this modelpar reads 2"):
        open_step(folder)


def test_a_manifest_that_was_changed_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = write(tmp_path, 3) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged.* on from step-00000002"):
        newest(tmp_path)


def test_a_manifest_says_what_lies_where(tmp_path: Path) -> None:
    manifest = open_step(write(tmp_path, 3)).manifest
    assert set(manifest["versions"]) == {"modelpar", "torch", "python"}
    assert manifest["versions"]["torch"] == torch.__version__
    file = manifest["files"]["whole.weights.safetensors"]
    assert file["tensors"]["fc8.weight"] == {
        "dtype": "float32",
        "shape": [4, 6],
        "whole": [4, 6],
        "first": [0, 0],
    }


def test_parts_lie_where_they_are_said_to() -> None:
    whole_net = state()
    for column, parts in enumerate(split(whole_net)):
        for key, part in parts.items():
            place = location(key, part.shape, 2, column)
            assert place["whole"] == list(whole_net[key].shape)
            where = tuple(
                slice(first, first + size)
                for first, size in zip(place["first"], part.shape, strict=True)
            )
            assert torch.equal(whole_net[key][where], part), key


@pytest.mark.parametrize("name", ["net.pt", "net.ckpt", "dcp"])
def test_what_may_be_a_pickle_is_never_read(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    if name == "dcp":
        place.mkdir()
        (place / ".metadata").write_bytes(b"")
    else:
        place.write_bytes(b"")
    with pytest.raises(CheckpointError, match="may hold a pickle"):
        find(str(place))


def test_a_step_without_a_manifest_is_passed_over_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 3)
    (tmp_path / "checkpoints" / "step-00000008").mkdir()  # copied in part
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert "step-00000008: passed over" in caplog.text


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".hidden"])
def test_a_manifest_names_plain_files_only(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 3)
    change(folder, files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(CheckpointError, match="plain file name"):
        open_step(folder)


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="make room"):
        write(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_write_that_fails_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    found = newest(tmp_path)
    assert found is not None
    assert read_part(found, "weights", None)


def test_find_takes_a_run_a_step_or_a_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 4)
    for place in (tmp_path, folder):
        found = find(str(place))
        assert isinstance(found, Checkpoint)
        assert found.step == 4
    file = folder / "whole.weights.safetensors"
    assert find(str(file)) == file
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        find(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("net", ["four_layer", "torchvision"])
def test_the_picture_is_of_the_first_convolution_of_any_net(tmp_path: Path, net: str) -> None:
    settings = config.read("train", [f"model.net={net}"])
    recipe = Recipe(**asdict(settings.recipe))
    weights = whole_net(plan_for(recipe, settings.model, 3, 64), seed=0).state_dict()
    write(tmp_path, 1, weights=weights)
    found = newest(tmp_path)
    assert found is not None
    first = {"four_layer": "conv1.weight", "torchvision": "features.0.weight"}[net]
    assert torch.equal(checkpoint.read_conv1(found), weights[first])


def test_only_one_column_need_be_read_for_the_picture(tmp_path: Path) -> None:
    weights = state()
    write(tmp_path, 1, weights=weights)
    found = newest(tmp_path)
    assert found is not None
    assert torch.equal(checkpoint.read_conv1(found), weights["conv1.weight"])
