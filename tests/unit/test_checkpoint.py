"""A checkpoint is complete or absent, and each kind of damage is named."""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from modelpar import AlexNet, Recipe, config, split
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import plan_for
from modelpar.net.weights import location
from modelpar.training import checkpoint, saving, trained
from modelpar.training.checkpoint import Checkpoint, find, newest, open_step, read_part
from modelpar.training.saving import DONE, FAILED, PENDING, Checkpointer

ONE = Mesh(torch.device("cpu"))


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    net = AlexNet.from_recipe("code2012", 10, 64, seed=seed)
    return {key: value.detach() for key, value in net.state_dict().items()}


SMALL = {
    f"{name}.{kind}": torch.randn(shape)
    for name in ("conv1", "fc8")
    for kind, shape in (("weight", (4, 6)), ("bias", (4,)))
}


STATISTICS = {"mean": torch.ones(1)}


def write(run_dir: Path, step: int, weights: Any = None, **keep: Any) -> Path:
    saver = Checkpointer(run_dir, ONE, **keep)
    weights = SMALL if weights is None else weights
    saver.start({"weights": weights, "velocities": weights}, STATISTICS, {"step": step})
    folder = saver.finish()
    assert folder is not None
    return folder


def test_saved_tensors_are_read_back(tmp_path: Path) -> None:
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
        read = read_part(found, kind, None)
        assert read.keys() == SMALL.keys()
        assert all(torch.equal(read[key], SMALL[key]) for key in SMALL)


def test_whole_net_can_be_read_as_columns(tmp_path: Path) -> None:
    whole_net = state()
    write(tmp_path, 1, weights=whole_net)
    found = newest(tmp_path)
    assert found is not None
    for column, expected in enumerate(split(whole_net)):
        read = read_part(found, "weights", column)
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[key], expected[key]) for key in expected)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_last_steps_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    assert names_in(tmp_path / "checkpoints") == ["step-00000004", "step-00000005"]


def test_every_nth_step_and_the_best_are_kept_too(tmp_path: Path) -> None:
    errors = {1: 50.0, 2: 20.0, 3: 20.5, 5: 30.0, 7: 40.0}
    rows = [{"kind": "test", "step": step, "top1": top1} for step, top1 in errors.items()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "test", "step": 4, "to')
    for step in range(1, 10):
        write(tmp_path, step, last=2, every=4, best=True)
    expected = [f"step-0000000{step}" for step in (2, 4, 8, 9)]
    assert names_in(tmp_path / "checkpoints") == expected


def test_checkpointer_writes_the_state_of_its_start(tmp_path: Path) -> None:
    weights = {key: value.clone() for key, value in SMALL.items()}
    saver = Checkpointer(tmp_path, ONE)
    saver.start({"weights": weights, "velocities": weights}, STATISTICS, {"step": 3})
    for value in weights.values():
        value.zero_()
    assert saver.finish() == tmp_path / "checkpoints" / "step-00000003"
    assert saver.finish() is None
    found = newest(tmp_path)
    assert found is not None
    read = read_part(found, "weights", None)
    assert all(torch.equal(read[key], SMALL[key]) for key in SMALL)


def test_save_is_published_after_all_ranks_have_reported(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, ONE)
    assert saver.status() == PENDING  # there is no save
    assert saver.advance([PENDING]) is None
    saver.start({"weights": SMALL, "velocities": SMALL}, STATISTICS, {"step": 3})
    assert saver.status(60.0) == DONE
    assert saver.advance([DONE, PENDING]) is None  # another rank is still writing
    assert newest(tmp_path) is None
    assert saver.advance([DONE, DONE]) is None  # now rank 0 publishes
    assert saver.status(60.0) == DONE
    assert saver.advance([DONE, DONE]) == tmp_path / "checkpoints" / "step-00000003"
    assert saver.status() == PENDING


def test_failed_save_is_raised_by_advance_and_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    saver = Checkpointer(tmp_path, ONE)
    saver.start({"weights": SMALL, "velocities": SMALL}, STATISTICS, {"step": 3})
    assert saver.status(60.0) == FAILED
    with pytest.raises(CheckpointError, match="step-00000003: not saved"):
        saver.advance([FAILED])
    assert saver.finish() is None


def test_published_step_is_never_overwritten(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"step-00000003: not saved.*not empty"):
        write(tmp_path, 3, weights={"fc8.bias": torch.zeros(4)})
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert names_in(tmp_path / "checkpoints") == ["step-00000003"]


def test_deleted_run_directory_is_not_created_again(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not saved.*No such file"):
        write(tmp_path / "gone", 3)
    assert not (tmp_path / "gone").exists()


def test_folder_named_after_another_step_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    folder.rename(folder.with_name("step-00000099"))
    with pytest.raises(CheckpointError, match="step-00000099: holds step 3"):
        newest(tmp_path)


def test_step_just_saved_is_kept_beside_newer_ones(tmp_path: Path) -> None:
    for step in (7, 8, 3):
        write(tmp_path, step)
    assert len(checkpoint.list_steps(tmp_path / "checkpoints")) == 3


def test_leftovers_of_interrupted_saves_are_removed(tmp_path: Path) -> None:
    write(tmp_path, 3)
    folder = tmp_path / "checkpoints"
    for name in (".tmp-step-00000004", ".del-step-00000001"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    write(tmp_path, 5)
    assert names_in(folder) == ["step-00000003", "step-00000005"]


def test_unfinished_and_unrelated_folders_are_ignored(tmp_path: Path) -> None:
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
def test_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
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
def test_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, 3)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        open_step(folder)


def change(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(checkpoint.signed({**json.loads(path.read_text()), **values})))


def test_old_steps_that_cannot_be_deleted_leave_the_new_one_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(folder: Path) -> None:
        raise checkpoint.unreadable(folder, PermissionError(errno.EACCES, "Permission denied"))

    monkeypatch.setattr(saving, "list_steps", unreadable)
    assert open_step(write(tmp_path, 3)).step == 3


def test_a_thread_that_cannot_be_started_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    saver = Checkpointer(tmp_path, ONE)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        saver.start({"weights": SMALL}, STATISTICS, {"step": 3})
    saver.join()


def test_a_panic_of_a_library_is_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """As safetensors raises it where it gets no memory."""

    def panic(_: object) -> bytes:
        raise PanicException("out of memory")

    monkeypatch.setattr(safetensors.torch, "save", panic)
    with pytest.raises(CheckpointError, match="step-00000003: not saved, out of memory"):
        write(tmp_path, 3)


@pytest.mark.parametrize("name", ["manifest.json", "whole.weights.safetensors", "net.safetensors"])
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path, 3)
    safetensors.torch.save_file(SMALL, tmp_path / "net.safetensors")
    opened = io.open

    def refused(file: Any, *arguments: Any, **more: Any) -> Any:
        if Path(str(file)).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *arguments, **more)

    monkeypatch.setattr(io, "open", refused)
    how = {
        "net.safetensors": lambda: trained.find(str(tmp_path / name)),
        "manifest.json": lambda: find(str(tmp_path)),
    }
    read = how.get(name, lambda: read_part(find(str(tmp_path)), "weights", None))
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\); make it"):
        read()


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    change(folder, format=7)
    with pytest.raises(CheckpointError, match="format 7, but this version reads 3"):
        open_step(folder)


def test_format_2_is_still_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    change(folder, format=2, tested=3, untested=False, top1=9.0)
    assert open_step(folder).step == 3


def test_changed_manifest_is_refused_with_the_step_to_continue_from(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = write(tmp_path, 3) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: damaged.*to continue from step-00000002"
    ):
        newest(tmp_path)


def test_manifest_records_the_location_of_each_part(tmp_path: Path) -> None:
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


def test_recorded_locations_are_those_of_split() -> None:
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
def test_file_that_may_be_a_pickle_is_never_read(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    if name == "dcp":
        place.mkdir()
        (place / ".metadata").write_bytes(b"")
    else:
        place.write_bytes(b"")
    with pytest.raises(CheckpointError, match="may hold a pickle"):
        find(str(place))


def test_step_without_manifest_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 3)
    (tmp_path / "checkpoints" / "step-00000008").mkdir()  # copied in part
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert "step-00000008: skipped" in caplog.text


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".hidden"])
def test_manifest_may_name_plain_files_only(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 3)
    change(folder, files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(CheckpointError, match="plain file name"):
        open_step(folder)


def test_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match=r"free some space.*older checkpoints are intact"):
        write(tmp_path, 2)
    assert names_in(tmp_path / "checkpoints") == ["step-00000001"]


def test_failed_write_leaves_older_checkpoints_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "atomic_write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 2)
    assert names_in(tmp_path / "checkpoints") == ["step-00000001"]
    found = newest(tmp_path)
    assert found is not None
    assert read_part(found, "weights", None)


def test_find_accepts_a_run_a_step_or_a_file(tmp_path: Path) -> None:
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
def test_read_conv1_finds_the_first_convolution_of_any_net(tmp_path: Path, net: str) -> None:
    settings = config.read("train", [f"model.net={net}"])
    recipe = Recipe(**asdict(settings.recipe))
    weights = whole_net(plan_for(recipe, settings.model, 3, 64), seed=0).state_dict()
    write(tmp_path, 1, weights=weights)
    found = newest(tmp_path)
    assert found is not None
    first = {"four_layer": "conv1.weight", "torchvision": "features.0.weight"}[net]
    assert torch.equal(checkpoint.read_conv1(found), weights[first])


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_read_conv1_names_a_file_that_is_missing_or_cut_short(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    write(tmp_path, 1, weights=state())
    found = newest(tmp_path)
    assert found is not None
    spoil(path := found.folder / "whole.weights.safetensors")
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
        checkpoint.read_conv1(found)


def test_read_conv1_returns_the_kernels_of_the_whole_net(tmp_path: Path) -> None:
    weights = state()
    write(tmp_path, 1, weights=weights)
    found = newest(tmp_path)
    assert found is not None
    assert torch.equal(checkpoint.read_conv1(found), weights["conv1.weight"])
