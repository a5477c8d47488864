"""``modelpar-prepare``: whatever the images are and whenever it stops, the store is the same."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import small_imagenet
import torch
from catalogue import contents
from filelock import FileLock
from PIL import Image

from modelpar import config
from modelpar.errors import CheckpointError, DataError, LaunchError, SettingsError, StoppedError
from modelpar.groups import DataSettings
from modelpar.images import blocks, journal, packing, samples, sets
from modelpar.images.store import open_store
from modelpar.schemas import PrepareSettings

SIZE = 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK", 3)
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(journal, "FREED_WITHIN", 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten training and four test images of two classes."""
    source = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for name in ("ant", "bee"):
            for number in range(count):
                path = tmp_path / "images" / part / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                few = source.integers(0, 256, (3, 3, 3), np.uint8)
                Image.fromarray(few).resize((24, 20)).save(path)
    return tmp_path / "images"


def settings(root: Path, out: str = "out", **how: Any) -> PrepareSettings:
    data = DataSettings(name="imagefolder", root=str(root), image_size=14, epochs=1)
    out = str(root.parent / out)
    made = PrepareSettings(data, out, SIZE, workers=0, progress=False)
    return replace(made, **how)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(kind: type[Exception], what: PrepareSettings) -> str:
    with pytest.raises(kind) as error:
        packing.prepare(what)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- images ---------------------------------------------------------------------------------------


def encoded(image: Image.Image, form: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(noise, "RGBA")
    return Image.new(mode, size, 1 << 15) if mode == "I;16" else image.convert(mode)


def ycck() -> bytes:
    """A JPEG file of four components whose Adobe marker says YCCK."""
    content = bytearray(encoded(picture("CMYK"), "JPEG"))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def transparent() -> bytes:
    return encoded(picture().quantize(8), "PNG", transparency=0)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: to be turned by 90 degrees
    return encoded(picture(), "JPEG", exif=exif)


GOOD: dict[str, bytes] = {
    "cmyk.jpg": encoded(picture("CMYK"), "JPEG"),
    "ycck.jpg": ycck(),
    "png named.jpg": encoded(picture(), "PNG"),
    "palette.png": transparent(),
    "deep.png": encoded(picture("I;16"), "PNG"),
    "rgba.png": encoded(picture("RGBA"), "PNG"),
    "grey with alpha.png": encoded(picture("LA"), "PNG"),
    "bits.png": encoded(picture("1"), "PNG"),
    "animated.webp": encoded(picture(), "WEBP", save_all=True, append_images=[picture()]),
    "gif named.png": encoded(picture("P"), "GIF", save_all=True, append_images=[picture("L")]),
    "one pixel.png": encoded(picture(size=(1, 1)), "PNG"),
    "one pixel high.png": encoded(picture(size=(300, 1)), "PNG"),
    "rotated.jpg": rotated(),
    "comment.jpg": encoded(picture(), "JPEG", comment=b"a comment"),
    "line\nbreak 'quoted' \u00fc.jpg": encoded(picture(), "JPEG"),
    os.fsdecode(b"no utf-8 \xff.jpg"): encoded(picture(), "JPEG"),
}


def test_images_of_every_kind_are_those_that_folders_give(root: Path) -> None:
    for name, content in GOOD.items():
        (root / "train" / "bee" / name).write_bytes(content)
    packing.prepare(settings(root, format="raw"))
    found = open_store(root.parent / "out")
    train, names = found.part("train"), found.names("train")
    assert {os.path.basename(name) for name in names} >= GOOD.keys()  # noqa: PTH119 - text
    first = samples.Resized(lambda row: root / "train" / names[row], [0] * len(names), SIZE)
    for row, name in enumerate(names):
        assert torch.equal(train[row][0], first[row][0]), name


def damaged() -> bytes:
    """A JPEG file that libjpeg decodes with a warning."""
    content = bytearray(encoded(picture(size=(200, 200)), "JPEG"))
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        *(encoded(picture(size=(59, 41)), "JPEG", subsampling=kind) for kind in range(3)),
        encoded(picture(size=(59, 41)), "JPEG", progressive=True),
        encoded(picture("L"), "JPEG"),
        encoded(picture(), "MPO", save_all=True, append_images=[picture("L").convert("RGB")]),
        encoded(picture(size=(300, 1)), "JPEG"),
        damaged(),
    ],
    ids=["4:4:4", "4:2:2", "4:2:0", "progressive", "grey", "MPO", "long", "damaged"],
)
def test_simplejpeg_and_pillow_decode_the_same_pixels(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    fast = samples.square(Image.open(io.BytesIO(content)), SIZE)
    monkeypatch.setattr(samples, "simplejpeg", None)
    assert torch.equal(samples.square(Image.open(io.BytesIO(content)), SIZE), fast)


def test_an_image_that_was_changed_after_it_was_opened_is_the_changed_one() -> None:
    with Image.open(io.BytesIO(encoded(picture(size=(59, 41)), "JPEG"))) as opened:
        before = samples.square(opened, SIZE)
        opened.paste((0, 0, 0), (0, 0, 59, 41))
        assert before.any()
        assert not samples.square(opened, SIZE).any()


@pytest.mark.parametrize("layout", small_imagenet.BUILD)
def test_each_layout_becomes_a_store_of_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    images = [encoded(Image.new("RGB", (20, 24), (40 * n, 9, 9)), "PNG") for n in range(6)]
    train, val = small_imagenet.TRAIN, small_imagenet.VAL
    assert len(train) + len(val) <= len(images)
    train = dict(zip(train, images, strict=False))
    val = {name: (val[name][0], content) for name, content in zip(val, images[::-1], strict=False)}
    monkeypatch.setattr(small_imagenet, "TRAIN", train)
    monkeypatch.setattr(small_imagenet, "VAL", val)
    (root := tmp_path / "images").mkdir()
    small_imagenet.BUILD[layout](root)
    small_imagenet.accept(root, monkeypatch)
    packing.prepare(settings(root, format="raw"))
    made = sets.open_set(DataSettings("packed", str(tmp_path / "out"), image_size=14), tmp_path)
    found = [
        sorted((label, int(image[0, 0, 0])) for image, label in part)
        for part in (made.train, made.test)
    ]
    wanted = [(int("n02" in name), 40 * images.index(each)) for name, each in train.items()]
    assert found[0] == sorted(wanted)
    wanted = [(int(folder == "n02"), 40 * images.index(each)) for folder, each in val.values()]
    assert found[1] == sorted(wanted)


def test_jpeg_files_keep_nothing_but_the_pixels(root: Path) -> None:
    for name in ("rotated.jpg", "comment.jpg"):
        (root / "train" / "bee" / name).write_bytes(GOOD[name])
    packing.prepare(settings(root))
    stored = (root.parent / "out" / "train.images").read_bytes()
    assert b"Exif" not in stored
    assert b"a comment" not in stored


def bomb() -> bytes:
    content = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    content[18:26] = (200_000).to_bytes(4, "little") * 2
    return bytes(content)


BAD: dict[str, tuple[bytes, str]] = {
    "truncated": (encoded(picture(size=(200, 200)), "JPEG")[:-9000], "truncated"),
    "html": (b"<html><body>404 Not Found</body></html>", "cannot identify image file"),
    "zeros": (bytes(1000), "cannot identify image file"),
    "bomb": (bomb(), "exceeds limit of|more than 89478485"),
    "32 bits": (encoded(Image.new("F", (8, 8)), "TIFF"), "mode F, 32 bits per pixel"),
    "png": (encoded(picture(), "PNG")[:60] + bytes(100), "broken PNG file|bad header checksum|."),
}


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_decoded_is_named_or_skipped(root: Path, name: str) -> None:
    content, said = BAD[name]
    (bad := root / "train" / "ant" / "2.jpg").write_bytes(content)
    line = refused(DataError, settings(root))
    assert str(bad) in line
    assert "fix or delete it, or use bad=skip" in line
    assert "BytesIO" not in line
    packing.prepare(settings(root, bad="skip", max_bad=0.1))
    found = open_store(root.parent / "out")
    assert (len(found.part("train")), len(found.part("val")), found.skipped) == (9, 4, 1)
    assert "ant/2.jpg" not in found.names("train")
    row = (root.parent / "out" / "skipped.txt").read_text().split("\t")
    assert row[:2] == ["train", "'ant/2.jpg'"]
    assert re.search(said, row[2])
    images = sets.open_set(DataSettings("packed", found.root.as_posix(), image_size=14), root)
    assert images.skipped == f"{found.root / 'skipped.txt'}: 1 images that could not be decoded"


@pytest.mark.parametrize(
    "make",
    [Path.touch, os.mkfifo, lambda path: path.symlink_to("nothing")],
    ids=["empty", "pipe", "broken link"],
)
def test_a_file_that_cannot_be_read_is_named_or_skipped(
    root: Path, make: Callable[[Path], None]
) -> None:
    (bad := root / "train" / "ant" / "2.jpg").unlink()
    make(bad)
    said = f"{bad}: cannot read image (it is empty or cannot be opened); fix or delete it, or use"
    assert said in refused(DataError, settings(root))
    packing.prepare(settings(root, bad="skip", max_bad=0.1))
    assert "ant/2.jpg" not in open_store(root.parent / "out").names("train")


def test_too_many_bad_images_are_an_error_also_when_it_continues(root: Path) -> None:
    for number in (0, 4):
        (root / "train" / "ant" / f"{number}.jpg").write_bytes(b"no image")
    said = "1 of 10 images of train cannot be decoded, the last because: cannot identify"
    assert said in refused(DataError, settings(root, bad="skip", max_bad=0.05))
    said = "2 of 10 images of train cannot be decoded"
    assert said in refused(DataError, settings(root, bad="skip", max_bad=0.1))
    assert "1 of 10 images" in refused(DataError, settings(root))  # the first block has one
    packing.prepare(settings(root, bad="skip", max_bad=0.2))
    assert open_store(root.parent / "out").skipped == 2


def test_an_image_that_changes_while_it_is_read_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pack = root / "val" / "bee" / "1.jpg", blocks.pack

    def change(task: blocks.Task) -> Any:
        path.write_bytes(GOOD["cmyk.jpg"])
        return pack(task)

    monkeypatch.setattr(blocks, "pack", change)
    line = refused(DataError, settings(root, bad="skip", max_bad=0.9))
    assert str(path) in line
    assert "bytes now, and it had" in line


# -- stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_it_continues_after_every_block_with_the_same_bytes(
    root: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    (root / "train" / "ant" / "2.jpg").write_bytes(b"no image")
    how = {"format": form, "bad": "skip", "max_bad": 0.1}
    packing.prepare(settings(root, "whole", **how))
    whole, add, out = files(root.parent / "whole"), journal.Journal.add, root.parent / "out"
    left = 0

    def stop(self: journal.Journal, *block: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:  # in the middle of a write
            self.files["train.images"].write(b"a part of a block")
            self.files["journal.jsonl"].write(b'{"part": "tr')
            raise KeyboardInterrupt
        add(self, *block)

    monkeypatch.setattr(journal.Journal, "add", stop)
    for written in (0, 1, 1, 1, 1, 1):  # of six blocks, four of train and two of val
        left = written
        with pytest.raises(KeyboardInterrupt):
            packing.prepare(settings(root, **how))
        (out / ".manifest.json.1.part").write_bytes(b"of a write that was stopped")
    left = 9
    packing.prepare(settings(root, **how))
    assert files(out) == whole


def test_a_stop_before_the_sums_are_written_loses_that_commit(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing.prepare(settings(root, "whole"))
    save, out = journal.Journal._save, root.parent / "out"

    def stop(self: journal.Journal) -> None:
        if self.committed == 2:
            raise KeyboardInterrupt
        save(self)

    monkeypatch.setattr(journal.Journal, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        packing.prepare(settings(root))
    monkeypatch.undo()
    monkeypatch.setattr(packing, "BLOCK", 3)
    packing.prepare(settings(root))
    assert files(out) == files(root.parent / "whole")


def test_a_stop_while_the_store_is_finished_loses_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing.prepare(settings(root, "whole"))
    for name in ("write_manifest", "delete_journal"):
        with monkeypatch.context() as patch:
            patch.setattr(packing, name, lambda _: os.kill(0, 0) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                packing.prepare(settings(root))
    packing.prepare(settings(root))
    found = files(root.parent / "out")
    assert {name: found[name] for name in files(root.parent / "whole")} == files(
        root.parent / "whole"
    )


def test_a_signal_stops_it_after_the_block(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = blocks.pack

    def stopped(task: blocks.Task) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return pack(task)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "pack", stopped)
        line = refused(StoppedError, settings(root))
    assert line == "stopped by SIGTERM: 3 of 14 images are prepared; the same command continues"
    packing.prepare(settings(root))
    packing.prepare(settings(root, "whole"))
    assert files(root.parent / "out") == files(root.parent / "whole")


def test_a_full_disk_is_one_line_and_the_store_continues(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    packing.prepare(settings(root, "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = refused(CheckpointError, settings(root))
    assert f"out={root.parent / 'out'}: No space left on device; free some space" in line
    packing.prepare(settings(root))
    assert files(root.parent / "out") == files(root.parent / "whole")


def test_space_for_pixels_is_checked_at_the_start(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 14 * 3 * SIZE**2})
    monkeypatch.setattr("modelpar.files.shutil.disk_usage", lambda _: free)
    assert "use another out" in refused(CheckpointError, settings(root, format="raw"))
    packing.prepare(settings(root))  # the size of JPEG files is not known before


def test_a_bad_image_may_be_deleted_while_the_store_is_unfinished(root: Path) -> None:
    (bad := root / "train" / "bee" / "4.jpg").write_bytes(b"no image")
    assert "4.jpg" in refused(DataError, settings(root))
    assert (root.parent / "out" / "train.images").stat().st_size
    bad.unlink()
    packing.prepare(settings(root))
    packing.prepare(settings(root, "whole"))
    assert files(root.parent / "out") == files(root.parent / "whole")


# -- the folder -----------------------------------------------------------------------------------


@pytest.fixture
def begun(root: Path) -> Path:
    """A store whose first block is committed."""
    (bad := root / "train" / "ant" / "3.jpg").rename(root.parent / "kept.jpg")
    bad.write_bytes(b"no image")
    refused(DataError, settings(root))
    (root.parent / "kept.jpg").rename(bad)
    return root


def test_an_unfinished_store_continues_with_the_same_settings_only(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(begun.parent / "out")
    said = "was begun with format=jpeg, not raw; use another folder, or the images"
    assert said in refused(SettingsError, settings(begun, format="raw"))
    assert "was begun with size=16, not 20" in refused(SettingsError, settings(begun, size=20))
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "2.0")
        assert "was begun with torch=" in refused(SettingsError, settings(begun))
    (begun / "train" / "ant" / "0.jpg").write_bytes(GOOD["cmyk.jpg"])
    assert "was begun with other images" in refused(SettingsError, settings(begun))
    assert contents(begun.parent / "out") == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("journal.jsonl", b"{", "journal.jsonl: damaged"),
        ("sums.safetensors", b"", "out: damaged"),
        ("train.images", b"", "out: damaged .train.images is too short"),
    ],
)
def test_a_damaged_journal_is_named(begun: Path, name: str, content: bytes, said: str) -> None:
    (begun.parent / "out" / name).write_bytes(content)
    assert re.search(said, refused(DataError, settings(begun)))


def test_a_finished_store_is_left_as_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packing.prepare(settings(root))
    before, said = contents(root.parent / "out"), capsys.readouterr().out
    packing.prepare(settings(root, verify=True))
    packing.prepare(config.read("prepare", [f"out={root.parent / 'out'}", "verify=true"]))
    assert contents(root.parent / "out") == before
    assert capsys.readouterr().out == 2 * said
    assert "out: 10 + 4 images, 0 MB; train with modelpar-train data=packed data.root=" in said
    assert "holds a store with size=16, not 8" in refused(SettingsError, settings(root, size=8))
    (root / "val" / "bee" / "5.jpg").write_bytes(GOOD["cmyk.jpg"])
    assert "holds a store with other images" in refused(SettingsError, settings(root))


def test_a_store_is_verified_without_its_images(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"out={root.parent / 'out'}", "verify=true", "progress=false"]
    alone = config.read("prepare", words)
    assert f"out={root.parent / 'out'}: has no packed store" in refused(DataError, alone)
    packing.prepare(settings(root))
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)  # as if it were another's
    alone = config.read("prepare", words)
    store = root.parent / "out" / "val.images"
    store.write_bytes(store.read_bytes()[:-1] + b"?")
    assert "which are images 3 to 3, have changed" in refused(DataError, alone)


def test_a_folder_with_something_else_is_refused(root: Path) -> None:
    before = contents(root)
    assert "holds 'train'; use a new folder" in refused(SettingsError, settings(root, "images"))
    assert contents(root) == before


def test_two_preparations_do_not_share_a_folder(root: Path) -> None:
    (out := root.parent / "out").mkdir()
    with FileLock(out / "lock"):
        line = refused(CheckpointError, settings(root))
    assert f"out={out}: in use by another modelpar-prepare" in line


def test_only_images_on_the_disk_are_prepared(root: Path) -> None:
    assert "data=photos: nothing to prepare" in refused(
        SettingsError, replace(settings(root), data=DataSettings("photos"))
    )
    words = [f"out={root.parent / 'out'}", "data=imagenet", f"data.root={root}"]
    line = refused(SettingsError, config.read("prepare", words))
    assert "data=imagenet: has 2 classes, not 1000; use data.num_classes=2" in line
    assert "nothing to prepare" in refused(SettingsError, config.read("prepare", words[:1]))
    assert not (root.parent / "out").exists()


def test_imagenette_has_the_names_of_its_classes(root: Path) -> None:
    for part in ("train", "val"):
        for name, folder in (("ant", "n01440764"), ("bee", "n02102040")):
            (root / part / name).rename(root / part / folder)
    root.rename(root.parent / "imagenette2-320")
    data = DataSettings("imagenette", str(root.parent))
    packing.prepare(replace(settings(root), data=data))
    found = open_store(root.parent / "out")
    assert found.classes == ["tench", "English springer"]
    assert found.folders == ["n01440764", "n02102040"]


# -- processes ------------------------------------------------------------------------------------


class Fatal:
    """An item that ends the worker that it is sent to."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    task = blocks.Task("val", cast("Any", [Fatal()]), SIZE, "raw", skip=True)
    with pytest.raises(LaunchError, match="a worker process was killed, probably out of memory"):
        list(blocks.packed(iter([task]), 1, tmp_path))


@pytest.mark.slow
def test_however_workers_and_their_parent_end_the_bytes_are_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for copy in range(2000):
        os.link(root / "train" / "ant" / "0.jpg", root / "train" / "ant" / f"copy{copy}.jpg")
    out = root.parent / "out"
    words = [f"data.root={root}", "data=imagefolder", f"out={out}", "format=raw", "size=128"]
    command = [sys.executable, "-m", "modelpar.prepare", *words, "workers=2", "progress=false"]
    pixels = out / "train.images"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        before = pixels.stat().st_size if pixels.exists() else 0
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as run:
            end = time.monotonic() + 60
            while not pixels.exists() or pixels.stat().st_size <= before:
                assert time.monotonic() < end
                time.sleep(0.005)
            os.killpg(run.pid, number)  # as a terminal does: its workers get the signal, too
            _, said = run.communicate(timeout=60)
        killed = number == signal.SIGKILL
        assert run.returncode == (-number if killed else StoppedError.status)
        stopped = "images are prepared; the same command continues"
        assert [stopped in line for line in said.splitlines()] == [True] * (not killed)
        assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True)
    monkeypatch.setattr(packing, "BLOCK", blocks.BLOCK)
    packing.prepare(settings(root, "whole", size=128, format="raw"))
    assert files(out) == files(root.parent / "whole")
