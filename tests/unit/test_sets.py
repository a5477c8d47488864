"""Each data set, on small generated files of the same layout, and on data installed here."""

import errno
import gzip
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

from modelpar.errors import DataError, SettingsError
from modelpar.groups import DataSettings
from modelpar.images import sets
from modelpar.images.order import BatchOrder
from modelpar.images.samples import Resized, as_rgb, square
from modelpar.images.sets import open_set
from modelpar.images.statistics import statistics


def settings(name: str, **how: Any) -> DataSettings:
    return DataSettings(
        **{"name": name, "image_size": 64, "epochs": 1, "checkpoint_every": 0, **how}
    )


def picture(path: Path, size: tuple[int, int] = (90, 70), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(0, 256, (size[1], size[0], 4), dtype=torch.uint8).numpy()
    Image.fromarray(noise, "RGBA").convert(mode).save(path)


def folder(root: Path, classes: Sequence[str] = ("ant", "bee")) -> Path:
    for part in ("train", "val"):
        for name in classes:
            for number in range(2):
                picture(root / part / name / f"{number}.png")
    return root


# -- photos ---------------------------------------------------------------------------------------


def window_of(window: torch.Tensor, cell: torch.Tensor) -> tuple[slice, ...]:
    """Where ``window`` is in ``cell``; fails if it is nowhere."""
    side = window.shape[-1]
    places = cell[0].unfold(0, side, 1).unfold(1, side, 1)
    found = (places == window[0]).flatten(2).all(2).nonzero().tolist()
    return slice(None), *(slice(first, first + side) for first in found[0])


def test_crops_of_caffe_are_from_images_of_its_size_and_others_keep_the_papers_ratio() -> None:
    assert [sets.stored_size(size) for size in (227, 224, 64)] == [256, 256, 73]


@pytest.mark.slow
@pytest.mark.parametrize(("image_size", "side"), [(64, 80), (96, 96)])
def test_test_images_of_photos_are_windows_of_cells_that_are_not_trained_on(
    tmp_path: Path, image_size: int, side: int
) -> None:
    found = open_set(settings("photos", image_size=image_size), tmp_path)
    train, test = found.train, found.test
    assert isinstance(train, sets.InMemory)
    assert isinstance(test, sets.InMemory)
    assert not set(train.rows.tolist()) & set(found.groups)
    assert len(set(train.rows.tolist()) | set(found.groups)) == len(train.pixels) == 419
    assert test.pixels.shape == (14 * 72, 3, side, side)
    for index, cell in enumerate(found.groups):
        window, label = test[index]
        # The cells of a photograph are consecutive.
        before, after = (
            train.labels[rows].tolist() for rows in (train.rows < cell, train.rows > cell)
        )
        assert max(before, default=0) <= label <= min(after, default=13)
        assert torch.equal(window, train.pixels[cell][window_of(window, train.pixels[cell])])
    different = {window.numpy().tobytes() for window in test.pixels}
    assert len(different) == (14 * 72 if side < 96 else len(set(found.groups)))
    assert len(found.classes) == 14
    for part, each in ((train, 160), (test, 72)):
        counts = torch.bincount(part.labels)
        assert counts.tolist() == [each] * 14  # balanced
    image, label = train[0]
    assert image.shape == (3, 96, 96)
    assert image.dtype == torch.uint8
    assert label == 0
    shares = torch.bincount(torch.tensor(found.groups))[sorted(set(found.groups))]
    assert (len(shares), int(shares.min()), int(shares.max())) == (82, 4, 36)  # windows of a cell


# -- folders of images ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
def test_image_folders_are_read(tmp_path: Path, name: str) -> None:
    found = open_set(settings(name, root=str(folder(tmp_path))), tmp_path)
    assert list(found.classes) == ["ant", "bee"]
    assert (len(found.train), len(found.test)) == (4, 4)
    image, label = found.test[3]
    assert image.shape == (3, 73, 73)  # 64 * 256 / 224
    assert label == 1


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    root = folder(tmp_path)
    suffix = "jpg" if mode == "CMYK" else "png"
    picture(root / "train" / "ant" / f"a.{suffix}", mode=mode)
    found = open_set(settings("imagefolder", root=str(root)), tmp_path)
    assert all(found.train[index][0].shape == (3, 73, 73) for index in range(len(found.train)))


@pytest.mark.parametrize("size", [(1, 1), (500, 33), (33, 500)])
def test_images_of_any_size_become_a_central_square(tmp_path: Path, size: tuple[int, int]) -> None:
    root = folder(tmp_path)
    picture(root / "train" / "ant" / "a.png", size)
    found = open_set(settings("imagefolder", root=str(root)), tmp_path)
    assert {found.train[index][0].shape[1:] for index in range(5)} == {(73, 73)}


@pytest.mark.parametrize("size", [(300, 200), (120, 500), (73, 73), (80, 73), (40, 25), (311, 74)])
def test_images_are_scaled_as_by_pillow_to_one_level(size: tuple[int, int]) -> None:
    """The short side is scaled to 73 pixels, then the central square is cut."""
    coarse = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8)
    image = Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC)
    scaled = [73 * side // min(size) for side in size]
    left, top = (round((side - 73) / 2) for side in scaled)
    expected = image.resize(scaled, Image.Resampling.BILINEAR)
    expected = pil_to_tensor(expected.crop((left, top, left + 73, top + 73))).int()
    differences = (square(image, 73).int() - expected).abs()
    assert differences.max() <= 1
    assert (differences > 0).float().mean() < 0.05


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P"])
@pytest.mark.parametrize("size", [(65000, 1), (3, 65000)])
def test_a_very_long_image_is_cut_before_it_is_scaled(size: tuple[int, int], mode: str) -> None:
    """Scaled whole to a short side of 73 pixels it would have up to 4.7 million rows."""
    rgb = as_rgb(Image.new(mode, size))
    assert sorted(rgb.size) == [min(size), 16 * min(size)]
    short, long = sorted(size)
    ramp = torch.arange(long) * 256 // long  # 128 in the middle
    pixels = ramp.to(torch.uint8).expand(short, long)
    image = Image.fromarray((pixels if size[0] == long else pixels.T).numpy())
    found = Resized(lambda _: image, [0], 73).image(0)
    assert found.shape == (3, 73, 73)
    assert set(found.unique().tolist()) <= {127, 128}


@pytest.mark.parametrize("raised", [KeyError, MemoryError, struct.error, EOFError, RuntimeError])
def test_whatever_a_decoder_raises_names_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: type[Exception]
) -> None:
    found = open_set(settings("imagefolder", root=str(folder(tmp_path))), tmp_path)

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match=rf"0\.png: cannot read image \({raised.__name__}\); fix"):
        _ = found.train[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_one_line_while_statistics_are_computed(
    tmp_path: Path, workers: int
) -> None:
    root = folder(tmp_path)
    (root / "train" / "ant" / "broken.png").write_bytes(b"no image")
    found = open_set(settings("imagefolder", root=str(root)), tmp_path)
    with pytest.raises(DataError, match=r"^\S*broken\.png: cannot read image .*delete it$"):
        statistics(found, tmp_path, workers)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x89PNG\r\n\x1a\n cut"])
def test_damaged_image_is_named(tmp_path: Path, content: bytes) -> None:
    root = folder(tmp_path)
    (root / "train" / "ant" / "broken.png").write_bytes(content)
    found = open_set(settings("imagefolder", root=str(root)), tmp_path)
    with pytest.raises(DataError, match=r"broken\.png: cannot read image"):
        _ = [found.train[index] for index in range(len(found.train))]


@pytest.mark.parametrize("name", ["imagefolder", "imagenet", "imagenette", "cifar10"])
def test_missing_root_is_named_with_the_fix(tmp_path: Path, name: str) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(DataError, match=r"data\.root=.*nowhere: no such folder"):
        open_set(settings(name, root=str(missing)), tmp_path / "cache")
    with pytest.raises(DataError, match=r"use data\.root=FOLDER"):
        open_set(settings(name), tmp_path / "cache")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="empty"):
        open_set(settings(name, root=str(empty)), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["photos", "synthetic"])
def test_a_folder_that_a_set_would_not_read_is_refused(tmp_path: Path, name: str) -> None:
    settings = DataSettings(name, image_size=64, root=str(tmp_path))
    with pytest.raises(SettingsError, match=f"data={name} reads no folder; use data=imagefolder"):
        open_set(settings, tmp_path)


def test_wrong_number_of_classes_is_an_error(tmp_path: Path) -> None:
    root = str(folder(tmp_path))
    with pytest.raises(SettingsError, match=r"has 2 classes, not 5; use model\.num_classes=2"):
        open_set(settings("imagefolder", root=root, num_classes=5), tmp_path)


def test_unknown_data_set_suggests_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean photos"):
        open_set(settings("photo"), tmp_path)


def test_fingerprint_changes_with_the_images(tmp_path: Path) -> None:
    root = folder(tmp_path)
    before = open_set(settings("imagefolder", root=str(root)), tmp_path).fingerprint
    assert open_set(settings("imagefolder", root=str(root)), tmp_path).fingerprint == before
    picture(root / "train" / "bee" / "0.png", (91, 70))  # the same name, another size
    after = open_set(settings("imagefolder", root=str(root)), tmp_path).fingerprint
    assert after != before
    picture(root / "train" / "bee" / "more.png")
    assert open_set(settings("imagefolder", root=str(root)), tmp_path).fingerprint != after


# -- torchvision's layouts ------------------------------------------------------------------------


def test_a_download_that_is_stopped_leaves_no_part_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision takes a folder of the right name for all images."""
    how = settings("imagenette", root=str(tmp_path / "new"), download=True)
    fails = True

    def extract(_url: str, root: Path, **_: Any) -> None:
        for part in ("train", "val"):
            for name in list(vars(datasets.Imagenette)["_WNID_TO_CLASS"])[: 2 if fails else None]:
                folder = Path(root, "imagenette2-320", part, name)
                folder.mkdir(parents=True)
                Image.new("RGB", (80, 80)).save(folder / "0.jpeg")
        if fails:
            raise error

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", extract)
    error: OSError = ConnectionError("no network")
    with pytest.raises(
        DataError, match=r"imagenette2-320 into .* \(no network\); check the network"
    ):
        open_set(how, tmp_path)
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):  # its status is that of a full disk
        open_set(how, tmp_path)
    fails = False
    assert len(open_set(how, tmp_path).classes) == 10


def test_cifar10_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / datasets.CIFAR10.base_folder
    base.mkdir()
    pixels = torch.randint(0, 256, (4, 3072), dtype=torch.uint8).numpy()
    batch = {"data": pixels, "labels": [0, 1, 2, 9]}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        (base / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {number}" for number in range(10)]}
    (base / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    found = open_set(settings("cifar10", root=str(tmp_path)), tmp_path)
    assert (len(found.train), len(found.test)) == (20, 4)
    assert found.train[3][0].shape == (3, 73, 73)
    assert found.train[3][1] == 9


def test_imagenette_is_read(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for wnid in datasets.Imagenette._WNID_TO_CLASS:
            picture(tmp_path / "imagenette2-320" / part / wnid / "0.JPEG")
    found = open_set(settings("imagenette", root=str(tmp_path)), tmp_path)
    assert (len(found.train), len(found.test)) == (10, 10)
    assert "tench" in found.classes
    assert found.train[9][1] == 9


def test_imagenet_in_torchvisions_layout(tmp_path: Path) -> None:
    wnids = {"n01": ("tench", "Tinca"), "n02": ("goldfish",)}
    for part in ("train", "val"):
        for wnid in wnids:
            picture(tmp_path / part / wnid / "0.JPEG")
    torch.save((wnids, ["n01", "n02"]), tmp_path / "meta.bin")
    found = open_set(settings("imagenet", root=str(tmp_path)), tmp_path)
    assert list(found.classes) == ["tench", "goldfish"]


# -- Fashion-MNIST --------------------------------------------------------------------------------


def idx(values: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.numpy().tobytes()


def write_fashion(root: Path, count: int = 6) -> Path:
    for part in ("train", "t10k"):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return root


def test_fashion_mnist_in_debians_layout(tmp_path: Path) -> None:
    found = open_set(settings("fashion_mnist", root=str(write_fashion(tmp_path))), tmp_path)
    assert (len(found.train), len(found.test)) == (6, 6)
    image, label = found.train[5]
    assert image.shape == (3, 73, 73)
    assert torch.equal(image[0], image[2])  # grey is repeated
    assert label == 5
    assert "Sneaker" in found.classes


def test_fashion_mnist_in_torchvisions_layout(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in write_fashion(raw).glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    found = open_set(settings("fashion_mnist", root=str(tmp_path)), tmp_path)
    assert (len(found.train), len(found.test)) == (6, 6)


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_damaged_idx_file_is_named(tmp_path: Path, damage: str) -> None:
    path = write_fashion(tmp_path) / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    damaged = {"cut": content[:-40], "flip": content, "other": b"<html>"}
    path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot read IDX"):
        open_set(settings("fashion_mnist", root=str(tmp_path)), tmp_path)


@pytest.mark.skipif(
    not sets.DEBIAN_FASHION_MNIST.is_dir(),
    reason="Debian's dataset-fashion-mnist is not installed",
)
def test_installed_debian_package_is_read(tmp_path: Path) -> None:
    found = open_set(settings("fashion_mnist"), tmp_path)
    assert (len(found.train), len(found.test)) == (60_000, 10_000)


# -- synthetic, statistics ------------------------------------------------------------------------


def test_synthetic_repeats_one_batch(tmp_path: Path) -> None:
    found = open_set(settings("synthetic", num_classes=7), tmp_path, seed=3)
    assert len(found.train) == 1000 * 128
    assert len(found.classes) == 7
    first = [*BatchOrder(len(found.train), 128, 3, shuffle="never").batches(0)][:3]
    assert not found.may_shuffle
    for batch in first[1:]:
        assert all(
            torch.equal(found.train[one][0], found.train[other][0])
            for one, other in zip(first[0], batch, strict=True)
        )
    mean = statistics(found, tmp_path).mean  # from one pass over the batch
    assert torch.allclose(mean, found.test.pixels.float().mean(0), atol=1e-3)  # type: ignore[attr-defined]
    other = open_set(settings("synthetic", num_classes=7), tmp_path, seed=4)
    assert not torch.equal(found.train[0][0], other.train[0][0])


def test_statistics_are_computed_from_the_training_images_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_set(settings("photos"), tmp_path)
    computed = statistics(found, tmp_path)
    images = torch.stack([found.train[index][0] for index in range(len(found.train))]).double()
    assert torch.allclose(computed.mean.double(), images.mean(0), atol=1e-3)
    pixels = images.transpose(0, 1).flatten(1)
    covariance = torch.cov(pixels, correction=0)
    rebuilt = (
        computed.axes.double().T @ torch.diag(computed.std.double() ** 2) @ computed.axes.double()
    )
    assert torch.allclose(rebuilt, covariance, rtol=1e-4, atol=1e-2)
    assert computed.std[0] > computed.std[1] > computed.std[2]
    monkeypatch.setattr(
        "modelpar.images.statistics._compute", lambda *_: pytest.fail("computed twice")
    )
    again = statistics(found, tmp_path)
    assert torch.equal(again.mean, computed.mean)
    (cached,) = (tmp_path / "statistics").glob("*.safetensors")
    cached.write_bytes(b"damaged")
    with pytest.raises(DataError, match="damaged"):
        statistics(found, tmp_path)
