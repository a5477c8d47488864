"""Folders of images as people have them: hidden, linked, unreadable, one level too deep."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder, folder, imagenet

from modelpar.errors import DataError, SettingsError
from modelpar.groups import DataSettings
from modelpar.images import archives, folders, sets
from modelpar.images.samples import ImageSet


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            picture(tmp_path / "set" / part / name / "0.png")
    return tmp_path / "set"


def opened(root: Path, name: str = "imagefolder", **how: bool) -> ImageSet:
    settings = DataSettings(name=name, root=str(root), image_size=64, epochs=1)
    return sets.open_set(settings, root.parent / "cache", **how)


def refused(root: Path, name: str = "imagefolder") -> str:
    with pytest.raises(DataError) as error:
        opened(root, name)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{root.parent}/", "")


# -- what is skipped ------------------------------------------------------------------------------


def test_hidden_and_other_files_are_skipped_and_counted_by_ending(root: Path) -> None:
    before = opened(root)
    assert not before.skipped
    for name in (".ipynb_checkpoints", "__MACOSX", ".hidden", "$RECYCLE.BIN"):
        for part in ("train", "val"):
            picture(root / part / name / "0-checkpoint.png")
    for name in ("a.gif", "b.GIF", "c.avif", "d.jfif", "LICENSE", "._0.png", ".DS_Store"):
        (root / "train" / "ant" / name).touch()
    (root / "train" / "labels.csv").touch()
    found = opened(root)
    assert found.classes == ["ant", "bee"]
    assert found.fingerprint == before.fingerprint
    assert found.skipped == (
        f"{root}: skipped files: 10 hidden, 2 .gif, 1 .avif, 1 .jfif, "
        "1 outside the class folders, 1 without an ending"
    )


def test_endings_and_archives_are_those_of_torchvision() -> None:
    assert folders.IMG_EXTENSIONS == folder.IMG_EXTENSIONS
    published = {part: name for part, (name, _) in imagenet.ARCHIVE_META.items()}
    ours = {"train": archives.TRAIN, "val": archives.VAL, "devkit": archives.KIT}
    assert (published, imagenet.META_FILE) == (ours, archives.META)


def test_the_launcher_does_not_import_torchvision() -> None:
    """It takes a second, and the ranks import it at the same time."""
    code = (
        "import sys, modelpar\n"
        "from modelpar import config\n"
        "modelpar.load('launch:run')\n"
        "prepare = modelpar.load('training.prepare:prepare')\n"
        "prepare(config.read('train', ['model.image_size=64']), None)\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_order_is_that_of_torchvision(root: Path) -> None:
    for name in ("b/0.png", "a-b/1.png", "a/2.png", "a/z/3.JPG", "9.png", "a.png"):
        picture(root / "train" / "ant" / name)
    ours = folders.list_part(root, "train")
    theirs = ImageFolder(root / "train")
    assert ours.samples == theirs.samples
    assert ours.classes == theirs.classes


def test_linked_folders_and_files_are_read(root: Path) -> None:
    (root / "train" / "cow").symlink_to(root / "val" / "ant")
    (root / "val" / "cow").symlink_to(root / "train" / "ant", target_is_directory=True)
    (root / "train" / "ant" / "1.png").symlink_to(root / "val" / "bee" / "0.png")
    assert [len(opened(root).train), len(opened(root).test)] == [4, 4]


# -- what is refused ------------------------------------------------------------------------------


def loop(root: Path) -> None:
    (root / "train" / "ant" / "again").symlink_to(root.parent)


def dead_folder(root: Path) -> None:
    (root / "train" / "cow").symlink_to(root / "nowhere")


def empty_file(root: Path) -> None:
    (root / "val" / "ant" / "1.png").touch()


def pipe(root: Path) -> None:
    os.mkfifo(root / "val" / "ant" / "1.png")


def only_gif(root: Path) -> None:
    (root / "val" / "ant" / "0.png").rename(root / "val" / "ant" / "0.gif")


def empty_class(root: Path) -> None:
    (root / "train" / "cow").mkdir()


def flat(root: Path) -> None:
    for name in ("ant", "bee"):
        (root / "val" / name / "0.png").rename(root / "val" / f"{name}.png")
        (root / "val" / name).rmdir()


def too_deep(root: Path) -> None:
    for part in ("train", "val"):
        (root / part).rename(root / "part")
        (root / part).mkdir()
        (root / "part").rename(root / part / "images")


def one_class(root: Path) -> None:
    for part in ("train", "val"):
        (root / part / "bee" / "0.png").unlink()
        (root / part / "bee").rmdir()


def valid(root: Path) -> None:
    (root / "val").rename(root / "valid")


def class_of_val(root: Path) -> None:
    picture(root / "val" / "cow" / "0.png")


def unicode_form(root: Path) -> None:
    picture(root / "train" / "caf\u00e9" / "0.png")
    picture(root / "val" / "cafe\u0301" / "0.png")


def upper_case(root: Path) -> None:
    (root / "val" / "bee").rename(root / "val" / "Bee")


def blank(root: Path) -> None:
    (root / "val" / "bee").rename(root / "val" / "bee ")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (loop, "set/train/ant/again/set: links to a folder that contains it; delete the link"),
        (dead_folder, "set/train/cow: cannot be read (No such file"),
        (empty_file, "set/val/ant/1.png: cannot read image (it is empty)"),
        (pipe, "set/val/ant/1.png: cannot read image (it is no regular file)"),
        (only_gif, "set/val/ant: a class without an image (only 1 .gif); images end in .jpg"),
        (empty_class, "set/train/cow: a class without an image (it is empty)"),
        (flat, "set/val: 2 images and no folders of classes; sort them into val/CLASS"),
        (too_deep, "one class only, 'images', which has the folders 'ant', 'bee'; move these up"),
        (one_class, "set/train: one class only, 'ant'; use two or more"),
        (valid, "data.root=set: no folder val; rename its folder 'valid' to val"),
        (class_of_val, "set/val: the class 'cow' is not in train; use the same classes"),
        (unicode_form, r"set/val: the class 'cafe\u0301' is 'caf\xe9' in train, which differs in"),
        (upper_case, "set/val: the class 'Bee' is 'bee' in train, which differs in Unicode"),
        (blank, "set/train: the class 'bee' is 'bee ' in val, which differs in Unicode"),
    ],
)
def test_what_cannot_be_trained_on_is_named(
    root: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(root)
    assert said in refused(root)


@pytest.mark.parametrize("what", ["train/ant/inner", "train/ant", "val", "val/ant/0.png"])
def test_what_may_not_be_read_is_named(
    root: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root everything may be read, so the system's answers are replaced."""
    picture(root / "train/ant/inner/0.png")
    scan, access, closed = os.scandir, os.access, str(root / what)

    def scandir(path: str) -> object:
        if path == closed:
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    assert "ermission denied)" in (line := refused(root))
    assert line.startswith(f"set/{what}: cannot")


def test_a_root_that_may_not_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_dir(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert refused(root).startswith("set: cannot be read (Permission denied); make it readable")


def test_a_root_beside_the_right_one_is_corrected(root: Path) -> None:
    assert refused(root.parent).endswith(f"no folder train; use data.root={root.parent.name}/set")
    assert refused(root / "train").endswith(f"no folder train; use data.root={root}")


def test_parts_below_the_root_or_of_another_name_are_found(root: Path) -> None:
    kaggle = root.parent / "kaggle/ILSVRC/Data/CLS-LOC"
    shutil.copytree(root, kaggle)
    assert refused(root.parent / "kaggle").endswith("use data.root=kaggle/ILSVRC/Data/CLS-LOC")
    (kaggle / "val").rename(kaggle / "Validation")
    assert refused(kaggle).endswith("no folder val; rename its folder 'Validation' to val")


def test_parts_in_the_folder_of_each_class_are_no_root(root: Path) -> None:
    for name in ("ant", "bee"):
        shutil.copytree(root / "val" / name, root.parent / "inverted" / name / "train")
    line = refused(root.parent / "inverted")
    assert line.endswith("it has 'ant', 'bee'; use a folder with train/CLASS/* and val/CLASS/*")


def test_only_sets_with_a_download_offer_it(root: Path) -> None:
    assert "download" not in refused(root / "nowhere")
    assert "download" not in refused(root / "nowhere", "imagenet")
    assert "or data.download=true" in refused(root / "nowhere", "imagenette")
    for name in ("imagenet", "imagefolder"):
        settings = DataSettings(name=name, download=True, image_size=64, epochs=1)
        with pytest.raises(SettingsError, match=f"data={name} has no download; use data.root="):
            sets.open_set(settings, root)


# -- ImageNet -------------------------------------------------------------------------------------


def test_a_part_of_imagenet_names_the_setting_that_helps(root: Path) -> None:
    settings = DataSettings("imagenet", str(root), image_size=64, num_classes=1000, epochs=1)
    with pytest.raises(SettingsError, match=r"2 classes, not 1000; use model\.num_classes=2"):
        sets.open_set(settings, root)


META = "set/meta.bin: does not hold the names of the classes ("


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", META),
        (b"hello\n", META),
        (b"PK\x03\x04cut", META),
        (b"\x80\x02cos\nsystem\n.", META),
        ([1, 2, 3], META),
        (({"ant": 5, "bee": 6}, []), META),
        (({"ant": (), "bee": ("Bee",)}, []), META),
        (({"ant": "Ant", "bee": "Bee"}, []), META),
        (({"ant": ("Ant",)}, ["ant"]), "set/val/bee: no class of imagenet; delete the folder, or"),
    ],
)
def test_a_wrong_meta_file_is_named(root: Path, content: object, said: str) -> None:
    path = root / "meta.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        sets.torch.save(content, path)
    line = refused(root, "imagenet")
    assert line.startswith(said)
    assert "delete" in line
    assert "weights_only" not in line


def test_a_damaged_development_kit_is_named(root: Path) -> None:
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_text("x")
    assert "devkit_t12.tar.gz: cannot be unpacked (" in (line := refused(root, "imagenet"))
    assert "or move it away to use plain folders" in line


def test_imagenet_shows_names_and_is_identified_by_folders(root: Path) -> None:
    sets.torch.save(({"ant": ("Ant", "x"), "bee": ("Bee",)}, ["ant"]), root / "meta.bin")
    found = opened(root, "imagenet")
    assert list(found.classes) == ["Ant", "Bee"]
    assert found.class_ids == ["ant", "bee"] == opened(root).class_ids


# -- classes of a net -----------------------------------------------------------------------------


def test_val_alone_is_enough_without_training_images(root: Path) -> None:
    for path in (root / "train").rglob("*.png"):
        path.unlink()
    found = opened(root, train=False)
    assert [len(found.train), len(found.test)] == [0, 2]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (["a", "b"], ["a", "b"], None),
        (["a", "c"], ["a", "b"], (1, "'c'", "'b'")),
        (["b", "a"], ["a", "b"], (0, "'b'", "'a'")),
        (["a"], ["a", "b"], (1, "absent", "'b'")),
        (["e\u0301"], ["\u00e9"], (0, r"'e\u0301'", r"'\xe9'")),
    ],
)
def test_the_first_difference_of_classes(
    ours: list[str], theirs: list[str], expected: tuple[int, str, str] | None
) -> None:
    assert folders.first_difference(ours, theirs) == expected


def test_files_folders_and_globs_name_each_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "deep/er/c.JPG", "deep/.hidden.png", "deep/notes.txt", "[1].png"):
        picture(tmp_path / "photos" / "x.png")
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "x.png").rename(path)

    def found(*patterns: str) -> list[str]:
        return folders.find_images(patterns)

    everything = ["photos/[1].png", "photos/b.png", "photos/deep/er/c.JPG"]
    assert found("photos") == everything
    assert found("photos/b.png", "photos/*") == [everything[1], everything[0], everything[2]]
    assert found("photos/[1].png") == everything[:1]  # is a name, although it could be a glob
    assert found("photos/deep/notes.txt") == ["photos/deep/notes.txt"]  # was asked for
    assert found("**/*.JPG") == everything[2:]
    for pattern in ("photos/deep/*.png", "photos/?.txt", "nowhere"):
        with pytest.raises(
            DataError, match=r"use files, or folders and globs with names that end"
        ):
            found("photos", pattern)
    (tmp_path / "photos/deep/loop").symlink_to(tmp_path / "photos")
    with pytest.raises(DataError, match="links to a folder that contains it"):
        found("photos")
