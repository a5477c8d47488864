"""Images before they are prepared: folders, Kaggle's folders, archives, Parquet files."""

import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_imagenet import (
    BUILD,
    TRAIN,
    WORDS,
    accept,
    by_class,
    in_folders,
    in_parquet,
    tar,
    write,
    write_parquet,
)

from modelpar.errors import DataError
from modelpar.groups import DataSettings
from modelpar.images import archives, sets, sources
from modelpar.images.sources import Item, Items, Source


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def made(layout: str) -> Path:
        BUILD[layout](tmp_path)
        accept(tmp_path, monkeypatch)
        return tmp_path

    return made


def contents(source: Source) -> dict[str, list[tuple[int, bytes]]]:
    return {
        part: [(item.label, sources.read(item)) for item in items]
        for part, items in source.parts.items()
    }


def refused(root: Path, layout: str | None = None) -> str:
    with pytest.raises(DataError) as error:
        sources.open_source(root, layout)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{root}/", "").replace(str(root), "ROOT")


# -- what is read ---------------------------------------------------------------------------------

TESTS = [(0, b"second"), (1, b"first")]  # by label
SHOWN = {"folders": ["n01", "n02"], "parquet": sorted(WORDS.values(), reverse=True)}


@pytest.mark.parametrize("layout", BUILD)
def test_each_layout_has_the_same_images_labels_and_names(
    make: Callable[[str], Path], layout: str
) -> None:
    root = make(layout)
    before = sorted(os.walk(root))
    found = sources.open_source(root)
    assert found.name == layout
    train = [(int(name.startswith("n02")), content) for name, content in sorted(TRAIN.items())]
    assert contents(found) == {
        "train": train,
        "val": TESTS if layout != "parquet" else TESTS[::-1],
    }
    assert found.classes == SHOWN.get(layout, ["tench", "goldfish"])
    assert found.folders == (SHOWN[layout] if layout == "parquet" else ["n01", "n02"])
    assert not found.skipped
    if layout != "parquet":
        assert [item.name for item in found.parts["train"]] == sorted(TRAIN)
    for items in found.parts.values():
        assert len({item.name for item in items}) == len(items)
    assert sorted(os.walk(root)) == before  # a folder that cannot be written is enough


def test_folders_with_a_development_kit_show_its_words(
    tmp_path: Path, make: Callable[[str], Path]
) -> None:
    in_folders(tmp_path)
    (make("archives") / archives.TRAIN).unlink()
    found = sources.open_source(tmp_path)
    assert [found.name, found.classes] == ["folders", ["tench", "goldfish"]]


def test_a_class_that_the_development_kit_lacks_is_refused(
    tmp_path: Path, make: Callable[[str], Path]
) -> None:
    in_folders(tmp_path)
    (make("archives") / archives.TRAIN).unlink()
    for part in ("train", "val"):
        shutil.copytree(tmp_path / part / "n01", tmp_path / part / "n03")
    with pytest.raises(DataError, match=r"val/n03: no class of ImageNet, .*; delete the"):
        sources.open_source(tmp_path)


def test_training_without_a_preparation_unpacks_no_archive(make: Callable[[str], Path]) -> None:
    root = make("archives")
    before = sorted(os.walk(root))
    with pytest.raises(DataError, match="or modelpar-prepare, which reads archives"):
        sets.open_set(DataSettings("imagenet", str(root), image_size=64, epochs=1), root / "cache")
    assert sorted(os.walk(root)) == before


@pytest.mark.parametrize("inner", ["ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggle_is_found_from_any_of_its_folders(make: Callable[[str], Path], inner: str) -> None:
    root = make("kaggle")
    (root / "ILSVRC/Data/CLS-LOC/val/.listing").touch()
    found = sources.open_source(root / inner)
    assert [found.name, found.classes] == ["kaggle", ["tench", "goldfish"]]
    assert found.skipped.endswith("CLS-LOC: skipped files: 1 in val")


def test_kaggle_with_a_broken_link_is_listed_for_prepare_to_refuse_or_skip(
    make: Callable[[str], Path],
) -> None:
    root = make("kaggle")
    image = next((root / "ILSVRC/Data/CLS-LOC/val").iterdir())
    image.unlink()
    image.symlink_to("nothing")
    sizes = {item.name: item.num_bytes for item in sources.open_source(root).parts["val"]}
    assert sizes[image.name] == 0 < max(sizes.values())


def test_kaggle_after_its_images_were_sorted_is_plain_folders(make: Callable[[str], Path]) -> None:
    place = make("kaggle") / "ILSVRC/Data/CLS-LOC"
    shutil.rmtree(place / "val")
    in_folders(place)
    assert sources.open_source(place).name == "folders"


def test_test_images_stand_for_missing_validation_images(make: Callable[[str], Path]) -> None:
    data = make("parquet") / "data"
    shard = next(data.glob("validation-*"))
    shard.rename(shard.with_name(shard.name.replace("validation", "test")))
    assert len(sources.open_source(data).parts["val"]) == 2


# -- items ----------------------------------------------------------------------------------------


def test_items_are_as_they_were_given_also_after_pickling() -> None:
    given = [
        Item("ant/\udcff\n1.png", 0, "/set/train/ant/\udcff\n1.png", 0, 7),
        Item("bee/2.JPEG", 1, "/set/train.tar", 512, 2**40),
        Item("3", 999, "/set/train.parquet", 3),
    ]
    items: Items = pickle.loads(pickle.dumps(Items(iter(given))))
    assert [*items] == given
    assert [items[-1], *items[:2]] == [given[2], *given[:2]]
    assert [*items.labels] == [0, 1, 999]
    with pytest.raises(IndexError):
        items[3]


def test_a_million_items_would_take_less_than_100_mb() -> None:
    names = (f"n01440764/n01440764_{number}.JPEG" for number in range(10_000))
    items = Items(Item(name, 7, f"/data/train/{name}", 0, 110_000) for name in names)
    assert len(pickle.dumps(items)) < 10_000 * 100


@pytest.mark.parametrize("layout", BUILD)
def test_threads_read_what_one_thread_reads(make: Callable[[str], Path], layout: str) -> None:
    train = sources.open_source(make(layout)).parts["train"]
    expected = [sources.read(item) for item in train]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(sources.read, [*train] * 10)] == expected * 10


# -- an image that is not as it was ---------------------------------------------------------------


def last(root: Path) -> Item:
    return sources.open_source(root).parts["train"][-1]


def not_read(item: Item) -> str:
    with pytest.raises(DataError) as error:
        sources.read(item)
    return str(error.value)


def test_an_image_that_was_changed_or_deleted_is_named(make: Callable[[str], Path]) -> None:
    item = last(make("folders"))
    Path(item.file).write_bytes(b"longer than before")
    said = not_read(item)
    assert said.startswith(f"{item.file}: cannot read image (it has 18 bytes now, and it had 5)")
    Path(item.file).unlink()
    assert not_read(item).startswith(f"{item.file}: cannot read image (No such file or directory)")


def test_an_archive_that_was_cut_names_the_image(make: Callable[[str], Path]) -> None:
    item = last(make("archives"))
    os.truncate(item.file, item.offset + 1)
    assert "img_train.tar: n02/n02_\udcff.JPEG: cannot read image (it has 1" in not_read(item)


def test_a_row_without_bytes_names_the_image(tmp_path: Path) -> None:
    in_parquet(tmp_path)
    write_parquet(tmp_path / "data" / "train-00001-of-00002-def.parquet", [(b"", 0), (None, 1)])
    item = last(tmp_path)
    assert "-def.parquet/1: cannot read image (the row has no bytes)" in not_read(item)


# -- what is refused ------------------------------------------------------------------------------


def test_a_folder_without_any_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    line = refused(tmp_path)
    assert line.startswith("data.root=ROOT: has none of the known layouts; it needs ILSVRC/Data")
    for files in ("train/CLASS/*", archives.TRAIN, "data/train-*.parquet"):
        assert files in line
    assert refused(tmp_path, "folders").endswith("it needs train/CLASS/* and val/CLASS/*")


def test_a_folder_that_is_absent_or_unreadable_is_named(
    make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make("folders")
    with pytest.raises(DataError, match=r"data.root=.*/absent: no such folder; use the folder of"):
        sources.open_source(root / "absent")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", f"{root}/train")

    monkeypatch.setattr(sources, "list_part", denied)
    assert refused(root).startswith("train: cannot be read (Permission denied); make it readable")


def member(name: str, kind: bytes = tarfile.REGTYPE, **pax: dict[str, str]) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.pax_headers = kind, "x", pax.get("pax", {})
    return made


def replace(name: str, content: bytes, root: Path) -> None:
    write(root, {name: content})


def cut(name: str, num_bytes: int, root: Path) -> None:
    path = root / name
    os.truncate(path, path.stat().st_size + num_bytes if num_bytes < 0 else num_bytes)


def remove(name: str, root: Path) -> None:
    for path in root.glob(name):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def train_of(*odd: tarfile.TarInfo, **classes: bytes) -> Callable[[Path], None]:
    """Training images with odd members in n01.tar, or other archives of classes."""
    inner = {f"{folder}.tar": tar(by_class(folder)) for folder in WORDS}
    inner["n01.tar"] = tar(by_class("n01"), *odd)
    inner |= {f"{folder}.tar": content for folder, content in classes.items()}
    return partial(replace, archives.TRAIN, tar(inner))


CLS = "ILSVRC/Data/CLS-LOC"
LEADS, REGULAR = "leads out of the archive", "is no regular file"
EMPTY_CELL = b"ImageId,PredictionString\nx,\n"
CUT = tar({"x": b"x"})[:1024]  # header and content, and no end
BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("folders", partial(remove, "train"), "no folder train; "),
    ("folders", partial(remove, "val"), "no folder val; "),
    ("folders", partial(remove, "val/n01"), "val: one class only, 'n02'"),
    ("folders", partial(replace, "meta.bin", b"x"), "meta.bin: does not hold the names of"),
    # Kaggle
    ("kaggle", partial(remove, f"{CLS}/train"), "no folder train; "),
    ("kaggle", partial(remove, f"{CLS}/val"), "LOC/val: no such folder, and"),
    ("kaggle", partial(remove, CLS), "val: no such folder, and LOC_val_solution.csv"),
    ("kaggle", partial(remove, f"{CLS}/val/val_1.JPEG"), "val_1.JPEG: no such file, and LOC_val"),
    ("kaggle", partial(replace, f"{CLS}/val/x.JPEG", b"x"), "x.JPEG: not in LOC_val_solu"),
    ("kaggle", partial(replace, f"{CLS}/train/n03/x.JPEG", b"x"), "class 'n03' is not in val"),
    ("kaggle", partial(replace, sources.SOLUTION, b"a,b\n1,2\n"), "is not Kaggle's table ('Im"),
    ("kaggle", partial(replace, sources.SOLUTION, EMPTY_CELL), "table (list"),
    ("kaggle", partial(replace, sources.MAPPING, b"n01\n"), "is not Kaggle's list of classes ("),
    # archives
    ("archives", partial(remove, archives.TRAIN), "ILSVRC2012_img_train.tar: no such file"),
    ("archives", partial(remove, archives.VAL), "ILSVRC2012_img_val.tar: no such file"),
    ("archives", partial(remove, archives.KIT), "devkit_t12.tar.gz: no such file; it names"),
    ("archives", partial(cut, archives.KIT, -1), "cannot be unpacked (its MD5 is not that of"),
    ("archives", partial(cut, archives.VAL, 0), "img_val.tar: cannot be read as a tar archive ("),
    ("archives", partial(cut, archives.VAL, 600), "a tar archive (unexpected end of data)"),
    ("archives", partial(cut, archives.VAL, 1024), "a tar archive (its end is missing); download"),
    ("archives", partial(replace, archives.VAL, tar({"a": b"x"})), "1 images, and ILSVRC2012_dev"),
    ("archives", partial(replace, archives.VAL, tar({})), "a tar archive (it has no files)"),
    ("archives", partial(replace, archives.TRAIN, tar({"n01.jpg": b"x"})), "'n01.jpg' is no arch"),
    ("archives", train_of(n03=tar({"x": b"x"})), "the class 'n03' is not in ILSVRC2012_img_val"),
    ("archives", train_of(n02=tar({})), "img_train.tar: n02.tar: cannot be read as a tar archive"),
    ("archives", train_of(n01=CUT), "n01.tar: cannot be read as a"),
    ("archives", train_of(n02=CUT + b"x" * 512), "n02.tar: cannot be read"),
    ("archives", train_of(member("n01_2.JPEG")), "n01.tar: has 'n01_2.JPEG' more than once"),
    ("archives", train_of(member("/etc/passwd")), f"'/etc/passwd' {LEADS}; download it again"),
    ("archives", train_of(member("a/../../b")), f"n01.tar: 'a/../../b' {LEADS}"),
    ("archives", train_of(member("l", tarfile.SYMTYPE)), f"'l' {REGULAR}"),
    ("archives", train_of(member("l", tarfile.LNKTYPE)), f"'l' {REGULAR}"),
    ("archives", train_of(member("d", tarfile.CHRTYPE)), f"'d' {REGULAR}"),
    ("archives", train_of(member("s", tarfile.GNUTYPE_SPARSE)), f"'s' {REGULAR}"),
    ("archives", train_of(member("a", pax={"path": "a\0b"})), f"'a\\x00b' {LEADS}"),
    # Parquet
    ("parquet", partial(remove, "data/train-*"), "data: no train-*-of-*.parquet; download it"),
    ("parquet", partial(remove, "data/validation-*"), "no validation-*-of-*.parquet or test-*"),
    ("parquet", partial(remove, "data/train-00000*"), "data: 1 files train-*-of"),
    ("parquet", partial(replace, "data/train-x-of-2.parquet", b""), "is not named PART-00000-of"),
]


@pytest.mark.parametrize(("layout", "damage", "said"), BAD, ids=[one[2] for one in BAD])
def test_what_is_missing_or_damaged_is_named(
    make: Callable[[str], Path], layout: str, damage: Callable[[Path], None], said: str
) -> None:
    root = make(layout)
    damage(root)
    assert said in refused(root)


SHARD = "data/train-00001-of-00002-def.parquet"
NEEDS = f"{SHARD}: needs a column image with bytes, a column label and the names of its classes ("


@pytest.mark.parametrize(
    ("rows", "change", "said"),
    [
        ([(b"x", 2)], {}, f"{SHARD}: row 0 has the label 2, of 2; download it again"),
        ([(b"x", 0), (b"x", -1)], {}, f"{SHARD}: row 1 has the label -1, of 2"),
        ([(b"x", None), (b"x", 1)], {}, f"{SHARD}: row 0 has the label None, of 2"),
        ([(b"x", 0.5)], {}, f"{SHARD}: the labels cannot be read ("),
        ([(b"x", "a")], {}, f"{SHARD}: the labels cannot be read ("),
        ([(b"x", 0)], {"column": "img"}, NEEDS),
        ([(b"x", 0)], {"names": None}, NEEDS),
        ([(b"x", 0)], {"names": ["ant", "bee"]}, f"{SHARD}: its classes are not those of the"),
    ],
)
def test_a_wrong_row_or_column_is_named(
    tmp_path: Path, rows: list[tuple[bytes, Any]], change: dict[str, Any], said: str
) -> None:
    in_parquet(tmp_path)
    write_parquet(tmp_path / SHARD, [*rows], **change)
    assert refused(tmp_path).startswith(said)


@pytest.mark.parametrize("content", [b"", b"no Parquet file", b"PAR1cutPAR1"])
def test_a_file_that_is_no_parquet_file_is_named(tmp_path: Path, content: bytes) -> None:
    in_parquet(tmp_path)
    (tmp_path / SHARD).write_bytes(content)
    assert refused(tmp_path).startswith(NEEDS)


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "validation"):
        write(tmp_path, {f"data/{part}-00000-of-00001.parquet": b""})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert refused(tmp_path).endswith("needs pyarrow; pip install 'modelpar[parquet]'")
