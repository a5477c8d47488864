"""A packed store gives the images of its source, and says where it is damaged."""

import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modelpar.errors import DataError, SettingsError
from modelpar.groups import DataSettings
from modelpar.images import packing, samples
from modelpar.images.samples import ImageSet, InMemory
from modelpar.images.sets import open_set
from modelpar.images.statistics import statistics
from modelpar.images.store import open_store, verify
from modelpar.schemas import PrepareSettings

SIZE = 32  # stored, for crops of 28 pixels
FORMATS = ["raw", "jpeg"]


def data(name: str, root: Path, **how: Any) -> DataSettings:
    return DataSettings(**{"name": name, "root": str(root), "image_size": 28, "epochs": 1, **how})


def opened(name: str, root: Path, **how: Any) -> ImageSet:
    return open_set(data(name, root, **how), root / "cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two classes, and both kinds of stores of them in blocks of three."""
    place = tmp_path_factory.mktemp("store")
    source = torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                few = torch.randint(0, 160, (4, 4, 3), dtype=torch.uint8, generator=source)
                image = Image.fromarray((few + 80 * label).numpy()).resize((48, 40 + number))
                path = place / "images" / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK", 3)
        for form in FORMATS:
            settings = PrepareSettings(
                data("imagefolder", place / "images"), str(place / form), SIZE, form
            )
            settings.workers, settings.progress = 0, False
            packing.prepare(settings)
    return place


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a store, to spoil."""
    return lambda form: Path(shutil.copytree(made / form, tmp_path / form))


def test_a_raw_store_has_the_pixels_and_the_statistics_of_its_source(made: Path) -> None:
    first, packed = opened("imagefolder", made / "images"), opened("packed", made / "raw")
    for ours, theirs in ((packed.train, first.train), (packed.test, first.test)):
        assert len(ours) == len(theirs)
        for (image, label), (pixels, wanted) in zip(ours, theirs, strict=True):
            assert torch.equal(image, pixels)
            assert label == wanted
    assert (packed.class_ids, packed.classes) == (first.class_ids, first.classes)
    assert packed.stored_size == SIZE
    measured = vars(statistics(first, made / "cache"))
    for key, value in vars(statistics(packed, made / "nowhere")).items():
        assert torch.equal(value, measured[key]), key
    assert not (made / "nowhere").exists()  # nothing was measured


def test_the_statistics_are_those_of_a_slow_reference(made: Path) -> None:
    images = opened("imagefolder", made / "images").train
    pixels = np.stack([image.numpy() for image, _ in images]).astype(np.float64)
    covariance = np.cov(pixels.transpose(1, 0, 2, 3).reshape(3, -1), bias=True)
    for form in FORMATS:  # both are measured before an image becomes a JPEG file
        found = load_file(made / form / "statistics.safetensors")
        np.testing.assert_allclose(found["covariance"], covariance, rtol=1e-11)
        np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-7)
        values, axes = np.linalg.eigh(covariance)
        np.testing.assert_allclose(found["std"], np.sqrt(values[::-1]), rtol=1e-6)
        along = np.abs((found["axes"].double().numpy() * axes.T[::-1]).sum(1))
        np.testing.assert_allclose(along, 1, rtol=1e-6)  # an axis has no sign


def test_a_jpeg_store_has_almost_the_pixels_of_its_source(made: Path) -> None:
    first, packed = opened("imagefolder", made / "images"), opened("packed", made / "jpeg")
    for (image, label), (pixels, wanted) in zip(packed.train, first.train, strict=True):
        assert (image.int() - pixels.int()).abs().float().mean() < 2
        assert label == wanted


def test_simplejpeg_and_pillow_read_the_same_store(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    fast = [image for image, _ in open_store(made / "jpeg").part("train")]
    monkeypatch.setattr(samples, "simplejpeg", None)
    slow = [image for image, _ in open_store(made / "jpeg").part("train")]
    assert all(torch.equal(one, other) for one, other in zip(fast, slow, strict=True))


@pytest.mark.parametrize("form", FORMATS)
def test_threads_read_the_same_images(made: Path, form: str) -> None:
    images = open_store(made / form).part("train")
    rows = [*range(len(images))] * 20
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(images.image, rows))
    assert all(torch.equal(read[place], images.image(row)) for place, row in enumerate(rows))


def test_a_store_of_raw_pixels_is_mapped_without_a_warning(made: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = open_store(made / "raw").part("train")
    assert isinstance(images, InMemory)
    assert images.pixels.shape == (8, 3, SIZE, SIZE)


def test_fingerprints_of_both_formats_differ(made: Path) -> None:
    raw, jpeg = (open_store(made / form) for form in FORMATS)
    assert raw.fingerprint != jpeg.fingerprint
    assert raw.names("val") == ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"]


def test_settings_that_do_not_fit_a_store_are_refused(made: Path) -> None:
    with pytest.raises(SettingsError, match="is stored at 32 pixels; use 32 or less"):
        opened("packed", made / "raw", image_size=33)
    with pytest.raises(SettingsError, match="data=packed has no download"):
        opened("packed", made / "raw", download=True)
    with pytest.raises(SettingsError, match="has 2 classes, not 3"):
        opened("packed", made / "raw", num_classes=3)


# -- damage ---------------------------------------------------------------------------------------


def change(**fields: Any) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def cut(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-2])


def flip(name: str, place: int = -1) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        content[place] ^= 255
        (root / name).write_bytes(content)

    return spoil


def unfinished(root: Path) -> None:
    (root / "manifest.json").rename(root / "journal.jsonl")


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, "jpeg: no such folder"),
    (lambda root: (root / "manifest.json").unlink(), "jpeg: has no packed store"),
    (unfinished, "is not finished; run the same modelpar-prepare again"),
    (change(format="tar"), "manifest.json: damaged .no modelpar packed store."),
    (change(version=2), "has version 2 of the format, and this modelpar reads 1"),
    (change(parts=None), "manifest.json: damaged"),
    (cut("manifest.json"), "manifest.json: damaged"),
    (cut("train.images"), r"train.images: has \d+ bytes and not \d+"),
    (cut("val.labels.npy"), "val.labels.npy: has 158 bytes and not 160"),
    (lambda root: (root / "val.names").unlink(), "val.names: is missing"),
    (flip("train.labels.npy"), "train.labels.npy: damaged .not the labels of its images"),
    (flip("train.labels.npy", 0), "train.labels.npy: damaged"),
    (flip("train.offsets.npy"), "train.offsets.npy: damaged .not the places of its images"),
    (flip("statistics.safetensors", 0), "statistics.safetensors: damaged"),
]


@pytest.mark.parametrize(("spoil", "said"), DAMAGES, ids=[said for _, said in DAMAGES])
def test_a_damaged_store_is_refused_in_one_line(
    copy: Callable[[str], Path], spoil: Callable[[Path], Any], said: str
) -> None:
    spoil(root := copy("jpeg"))
    with pytest.raises(DataError, match=said) as error:
        opened("packed", root)
    assert "\n" not in str(error.value)
    assert str(root) in str(error.value)


@pytest.mark.parametrize("fast", [True, False])
def test_a_damaged_image_is_named(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, *, fast: bool
) -> None:
    if fast:
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(samples, "simplejpeg", None)
    flip("val.images", 0)(root := copy("jpeg"))
    images = open_store(root).part("val")
    images.image(1)
    with pytest.raises(DataError, match=r"image 0 of val, 'ant/0.png', cannot be read") as error:
        images.image(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train.images", "bytes 9216 to 18431, which are images 3 to 5, have changed"),
        ("val.labels.npy", "val.labels.npy: has changed"),
    ],
)
def test_verify_names_the_block_that_has_changed(
    copy: Callable[[str], Path], name: str, said: str
) -> None:
    root = copy("raw")
    verify(open_store(root))
    flip(name, 12000 if name == "train.images" else 130)(root)
    with pytest.raises(DataError, match=said):
        verify(open_store(root))
