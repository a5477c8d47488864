"""Wrong input gives one line that names the problem, the place and the fix; no file changes."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import IMAGES, SETTINGS, contents, remove_third
from PIL import Image

from modelpar import config, evaluate, export, files, train
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, LaunchError
from modelpar.interchange import exports
from modelpar.training import checkpoint, evaluation, prepare, runner, trained
from modelpar.training.metrics import read_rows
from modelpar.training.run_dir import written

MAINS: dict[str, Callable[[], Any]] = {
    "train": train.main,
    "evaluate": evaluate.main,
    "export": export.main,
}
SMALL = [
    "data=imagefolder",
    "data.root=images",
    "model.image_size=64",
    "workers=0",
    "batch_size=8",
    "monitor.progress=false",
    "monitor.tensorboard=false",
    "compile=false",
]


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps, saved after each, and the images it was trained on."""
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(images, place / "images")
    before = Path.cwd()
    os.chdir(place)
    try:
        words = [*SMALL, "columns=1", "steps=2", "checkpoint_every=1"]
        settings = config.read("train", words)
        runner.train(settings, prepare.prepare(settings), Mesh(torch.device("cpu")), Path("run"))
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``made`` as working directory.  Its files are hard links: replace, never write."""
    shutil.copytree(made, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def outcome(main: str, words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Run a main in this process; return its exit status and its one line."""
    sys.argv = [f"modelpar-{main}", *words]
    with pytest.raises(SystemExit) as end:
        MAINS[main]()
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("modelpar: ")
    assert not out
    return end.value.code, lines[0]


@pytest.mark.parametrize(
    ("name", "words", "status", "said"), SETTINGS, ids=[row[0] for row in SETTINGS]
)
def test_wrong_setting_is_one_line(
    place: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    words: list[str],
    status: int,
    said: str,
) -> None:
    before = contents(place)
    code, line = outcome("train", [*SMALL, *words], capfd)
    assert code == status, name
    assert said in line
    assert contents(place) == before


@pytest.mark.parametrize(("name", "spoil", "said"), IMAGES, ids=[row[0] for row in IMAGES])
def test_wrong_images(
    place: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    spoil: Callable[[Path], None],
    said: str,
) -> None:
    spoil(place)
    before = contents(place)
    code, line = outcome("train", [*SMALL, "run_dir=run", "cache_dir=../cache"], capfd)
    assert code == 3, name
    assert said in line
    assert contents(place) == before


def test_damaged_config_file_is_named(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "run/config.yaml").unlink()
    (place / "run/config.yaml").write_text("{ no")
    code, line = outcome("train", [*SMALL, "run_dir=run"], capfd)
    assert code == 2
    assert "run/config.yaml: cannot be read" in line


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "P", "LA", "CMYK", "1"])
def test_images_of_other_modes_become_rgb(place: Path, mode: str) -> None:
    """22 to 25: whatever their mode, an odd EXIF block, a JPEG that is named PNG."""
    path = remove_third(place)
    form = "JPEG" if mode == "CMYK" else "PNG"
    Image.new(mode, (80, 80), 1 << 15 if mode == "I;16" else 0).save(
        path, form, **({"exif": b"Exif\0\0broken"} if form == "JPEG" else {})
    )
    settings = config.read("train", [*SMALL, "cache_dir=../cache"])
    found = prepare.prepare(settings).images.train
    number = next(n for n in range(len(found)) if found.source(n).endswith("dark/3.png"))  # type: ignore[attr-defined]
    image, _ = found[number]
    assert image.shape == (3, 73, 73)
    assert image.unique().tolist() in ([0], [128], [255])
    assert (int(image[0, 0, 0]) == 128) == (mode == "I;16")  # scaled, not clipped


def flipped(place: Path, name: str) -> None:
    path = place / "run/checkpoints/step-00000002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


STEP = "run/checkpoints/step-00000002"
FILES = [
    "manifest.json",
    "statistics.safetensors",
    "whole.velocities.safetensors",
    "whole.weights.safetensors",
]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_changes_no_weight(place: Path, name: str) -> None:
    """33: one bit of each of its files."""
    assert sorted(path.name for path in (place / STEP).iterdir()) == FILES
    flipped(place, name)
    settings = config.read("train", [*SMALL, "columns=1", "steps=3"])
    before = contents(place)
    with pytest.raises(Exception, match=name.replace(".", r"\.")) as error:
        runner.train(settings, prepare.prepare(settings), Mesh(torch.device("cpu")), Path("run"))
    assert type(error.value).__name__ == "CheckpointError"
    assert "move step-00000002 away to continue from step-00000001" in str(error.value)
    assert contents(place) == before
    shutil.move(place / STEP, place / "damaged")
    runner.train(settings, prepare.prepare(settings), Mesh(torch.device("cpu")), Path("run"))


@pytest.mark.parametrize(
    ("main", "name"),
    [
        ("evaluate", "manifest.json"),
        ("evaluate", "statistics.safetensors"),
        ("export", "manifest.json"),
        ("export", "whole.weights.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_not_used(
    place: Path, capfd: pytest.CaptureFixture[str], main: str, name: str
) -> None:
    flipped(place, name)
    words = ["checkpoint=run", *(["columns=1"] if main == "evaluate" else ["out=o.safetensors"])]
    before = contents(place)
    code, line = outcome(main, words, capfd)
    assert code == 4
    assert name in line
    assert contents(place) == before


OTHERS = [
    ("other names", ("zebra", "apple"), "data=imagefolder: class 0 is 'apple', but 'dark' in "),
    ("a third", ("dark", "light", "x"), "data=imagefolder: has 3 classes, but the net of "),
    ("unicode", ("dark", "li\u0261ht"), "class 1 is 'li\u0261ht', but 'light' in "),
]


@pytest.mark.parametrize(("name", "classes", "said"), OTHERS, ids=[row[0] for row in OTHERS])
def test_a_net_is_not_evaluated_on_other_classes(
    place: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    classes: tuple[str, ...],
    said: str,
) -> None:
    for one in classes:
        shutil.copytree(place / "images/val/dark", place / "others/val" / one)
    words = ["checkpoint=run", "columns=1", "data.root=others"]
    code, line = outcome("evaluate", words, capfd)
    assert code == 3, name
    assert said in line


def test_a_run_does_not_continue_on_other_classes(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val"):
        (place / "images" / part / "dark").rename(place / "images" / part / "night")
    code, line = outcome("train", [*SMALL, "run_dir=run", "cache_dir=../cache"], capfd)
    assert code == 3
    assert "data=imagefolder: class 0 is 'light', but 'dark' in " in line


def test_val_alone_is_enough_to_evaluate(place: Path) -> None:
    shutil.rmtree(place / "images/train")
    (found,) = evaluation.prepare(config.read("evaluate", ["checkpoint=run", "columns=1"]))
    assert [len(found.images.train), len(found.images.test)] == [0, 10]
    assert found.trained.classes == ["dark", "light"]
    os.chdir(place.parent)  # the run knows where its images are
    evaluation.prepare(config.read("evaluate", ["checkpoint=here/run", "columns=1"]))


def test_an_export_knows_its_classes_and_old_checkpoints_load(place: Path) -> None:
    exports.export(config.read("export", ["checkpoint=run", "out=net.safetensors"]))
    exported = trained.find("net.safetensors")
    assert exported.classes == ["dark", "light"]
    (last,) = [row for row in read_rows(place / "run") if row["kind"] == "test"]
    card = (place / "net.safetensors.md").read_text()
    assert (
        f"| error | top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} %, the central " in card
    )
    assert "| made | trained for 2 steps from seed 0 with modelpar " in card
    assert f"```yaml\n{(place / 'run/config.yaml').read_text()}```" in card
    manifest = place / STEP / "manifest.json"
    record = json.loads(manifest.read_text())
    assert record.pop("classes") == ["dark", "light"]
    manifest.unlink()
    manifest.write_text(json.dumps(checkpoint.signed(record)))
    shutil.move("images/val/dark", "images/val/zebra")
    shutil.rmtree(place / "images/train")
    (old,) = evaluation.prepare(config.read("evaluate", ["checkpoint=run", "columns=1"]))
    assert old.trained.classes is None


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
PAIR = {**ALONE, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
LAUNCHES = [
    ("41 a world of one", ALONE, "columns=2 replicas=1: a world of 1 does not fit"),
    ("42 no size", {"RANK": "0"}, "WORLD_SIZE is not set"),
    ("42 a rank too many", {**PAIR, "RANK": "2"}, "RANK=2: must be less than WORLD_SIZE=2"),
    ("42 no port", {**PAIR, "MASTER_PORT": "x"}, "MASTER_PORT=x: must be a whole number"),
]


@pytest.fixture
def signals_kept() -> Iterator[None]:
    """Restore this process's handler of Ctrl-C, which a rank changes."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("signals_kept")
@pytest.mark.parametrize(("name", "variables", "said"), LAUNCHES, ids=[row[0] for row in LAUNCHES])
def test_wrong_launch_is_one_line(
    place: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    variables: dict[str, str],
    said: str,
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    before = contents(place)
    code, line = outcome("train", [*SMALL, "run_dir=new"], capfd)
    assert code == 5, name
    assert said in line
    assert contents(place) == before


@pytest.mark.usefixtures("place", "signals_kept")
@pytest.mark.parametrize(
    "address", ["127.0.0.1", pytest.param("nohost.invalid", marks=pytest.mark.slow)]
)
def test_address_where_nobody_answers_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for key, value in {**PAIR, "RANK": "1", "MASTER_ADDR": address}.items():
        monkeypatch.setenv(key, value)
    sys.argv = ["modelpar-train", *SMALL, "comm.timeout=2"]
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 5
    line = capfd.readouterr().err.splitlines()[-1]  # torch prints a page before
    assert f"modelpar: rank 1 of 2: cannot join the process group at {address}:9 (" in line


def test_files_that_cannot_be_written_are_reported_before_the_first_step(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "new").mkdir()
    (place / "new" / "checkpoints").symlink_to("nowhere/else")  # root may write anywhere else
    settings = config.read("train", [*SMALL, "columns=1", "steps=2"])
    prepared, mesh = prepare.prepare(settings), Mesh(torch.device("cpu"))
    with pytest.raises(CheckpointError, match="new: cannot be written"):
        runner.train(settings, prepared, mesh, Path("new"))
    monkeypatch.setattr("resource.getrlimit", lambda _: (10**6, 10**6))
    with pytest.raises(LaunchError, match="1000000 bytes in one file; raise ulimit -f"):
        runner.train(settings, prepared, mesh, Path("other"))
    for name in ("new", "other"):
        assert not (place / name / "metrics.jsonl").exists()


def test_a_file_that_is_larger_than_the_system_allows_names_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_large(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("resource.getrlimit", lambda _: (1000, 1000))
    monkeypatch.setattr(files, "atomic_write", too_large)
    with pytest.raises(LaunchError, match=r"out=a\.json: .* 1000 bytes in one file; raise ulimit"):
        files.write_out("a.json", "")
    with pytest.raises(LaunchError, match=r"run: .* 1000 bytes in one"), written(Path("run")):
        too_large()
