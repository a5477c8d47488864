"""A small ImageNet, with odd names, in each layout that can be prepared."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import imagenet

from modelpar.images import archives, sources

# In the order of ImageNet's own numbers, which is not that of the folders.
WORDS = {"n02": "goldfish, Carassius auratus", "n01": "tench, Tinca tinca"}
TRAIN = {
    "n01/n01_10.JPEG": b"ten",
    "n01/n01_2.JPEG": b"two",
    "n01/n01_new\nline.JPEG": b"odd",
    "n02/n02_\udcff.JPEG": b"bytes",  # not UTF-8
}
VAL = {"val_1.JPEG": ("n02", b"first"), "val_2.JPEG": ("n01", b"second")}


def write(root: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def tar(files: Mapping[str, bytes], *odd: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", encoding="utf-8") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in odd:
            archive.addfile(member)
    return stream.getvalue()


def by_class(folder: str) -> dict[str, bytes]:
    """The training images of a class, not in the order of their names."""
    found = {name: content for name, content in TRAIN.items() if name.startswith(folder)}
    return {Path(name).name: found[name] for name in sorted(found, reverse=True)}


# -- a small ImageNet in each layout --------------------------------------------------------------


def in_folders(root: Path) -> None:
    write(root / "train", TRAIN)
    write(root / "val", {f"{folder}/{name}": content for name, (folder, content) in VAL.items()})


def at_kaggle(root: Path) -> None:
    place = root / "ILSVRC" / "Data" / "CLS-LOC"
    write(place / "train", TRAIN)
    write(place / "val", {name: content for name, (_, content) in VAL.items()})
    lines = [f"{Path(name).stem},{folder} 1 2 3 4 " for name, (folder, _) in VAL.items()]
    lines = ["ImageId,PredictionString", *lines, ""]
    (root / sources.SOLUTION).write_text("\n".join(lines))
    words = [f"{folder} {words}\n" for folder, words in sorted(WORDS.items())]
    (root / sources.MAPPING).write_text("".join(words))


def in_archives(root: Path) -> None:
    inner = {f"{folder}.tar": tar(by_class(folder)) for folder in WORDS}
    (root / archives.TRAIN).write_bytes(tar(inner))
    newest_first = sorted(VAL.items(), reverse=True)
    (root / archives.VAL).write_bytes(
        tar({f"./{name}": content for name, (_, content) in newest_first})
    )
    numbers = {folder: number for number, folder in enumerate(WORDS, 1)}
    synsets = [(numbers[folder], folder, words, "", 0) for folder, words in WORDS.items()]
    synsets.append((3, "n00", "fish", "", 2))  # has children: no class
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("n", "O")]
    matrix = io.BytesIO()
    savemat(matrix, {"synsets": np.array(synsets, kinds)})
    truth = "".join(f"{numbers[folder]}\n" for folder, _ in VAL.values())
    data = "ILSVRC2012_devkit_t12/data"
    with tarfile.open(root / archives.KIT, "w:gz") as kit:
        for name, content in (
            ("meta.mat", matrix.getvalue()),
            ("ILSVRC2012_validation_ground_truth.txt", truth.encode()),
        ):
            member = tarfile.TarInfo(f"{data}/{name}")
            member.size = len(content)
            kit.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, rows: list[tuple[bytes | None, Any]], **change: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    names = [WORDS[folder] for folder in sorted(WORDS)]
    features = {"label": {"names": change.get("names", names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    images = [{"bytes": content, "path": None} for content, _ in rows]
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    columns = {
        change.get("column", "image"): arrow.array(images, kind),
        "label": arrow.array([label for _, label in rows]),
    }
    table = arrow.table(columns).replace_schema_metadata(metadata)
    path.parent.mkdir(exist_ok=True)
    import_module("pyarrow.parquet").write_table(table, path, row_group_size=2)


def in_parquet(root: Path) -> None:
    rows: list[tuple[bytes | None, Any]] = [
        (content, int(name.startswith("n02"))) for name, content in TRAIN.items()
    ]
    write_parquet(root / "data" / "train-00000-of-00002-abc.parquet", rows[:3])
    write_parquet(root / "data" / "train-00001-of-00002-def.parquet", rows[3:])
    tests = [(content, int(folder == "n02")) for folder, content in VAL.values()]
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", [*tests])


BUILD = {
    "folders": in_folders,
    "kaggle": at_kaggle,
    "archives": in_archives,
    "parquet": in_parquet,
}


def accept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take our archives for the published ones."""
    for part, (name, _) in [*imagenet.ARCHIVE_META.items()]:
        if (path := root / name).exists():
            digest = hashlib.md5(path.read_bytes()).hexdigest()
            monkeypatch.setitem(imagenet.ARCHIVE_META, part, (name, digest))
