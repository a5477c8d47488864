"""The catalogue of bad inputs, and a small data set to spoil.

The numbers in the names are those of a list of common user errors: settings, data, checkpoints.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image


def write_images(root: Path, *, train: int, val: int) -> None:
    """Write noisy images of two classes, dark and light; so many of each class and part."""
    source = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 128, (80, 80, 3), dtype=torch.uint8, generator=source)
                path = root / part / name / f"{number}.png"
                Image.fromarray((noise + 100 * label).numpy()).save(path)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size of each file and the time of its last change.

    Without the lock of a run: filelock 3.30 changes its time when it locks.
    """
    return {
        os.fsdecode(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.name != "lock"
    }


# Name, settings, exit status, part of the error line.
SETTINGS = [
    ("1 unknown key", ["batchsize=4"], 2, "did you mean batch_size?"),
    ("2 not a number", ["recipe.lr=fast"], 2, "recipe.lr"),
    ("2 infinite", ["recipe.lr=inf"], 2, "recipe.lr=inf: use a finite number"),
    ("2 negative", ["recipe.lr=-1"], 2, "recipe.lr=-1"),
    ("3 empty batch", ["batch_size=0"], 2, "batch_size=0: use 1 or more"),
    ("3 batch larger than the data", ["batch_size=640"], 2, "the data has only"),
    ("4 epochs", ["epochs=-3"], 2, "epochs=-3"),
    ("5 classes", ["model.num_classes=3"], 2, "data=imagefolder: has 2 classes, not 3"),
    ("6 columns", ["columns=3"], 2, "columns=3: use one of 1, 2"),
    ("6 one column", ["model.net=one_column"], 2, "one_column: has one column; use columns=1"),
    ("7 dropout", ["model.dropout=1"], 2, "model.dropout=1"),
    ("8 recipe", ["recipe=code2013"], 2, "did you mean code2012?"),
    ("8 precision", ["precision=float16"], 2, "did you mean bfloat16?"),
    ("8 activation", ["model.activation=gelu"], 2, "model.activation=gelu"),
    ("10 a list without -m", ["seed=0,1"], 2, "add -m to sweep"),
    ("11 a new key", ["+momentum=1"], 2, "momentum"),
    ("11 unquoted home folder", ["run_dir=~/x"], 2, """quote it, 'run_dir="~/x"'"""),
    ("12 unset variable", ["data.root=${oc.env:NO_SUCH_ROOT}"], 2, "NO_SUCH_ROOT"),
    ("13 too long", ["run_dir=" + "x" * 300], 2, "File name too long"),
    ("13 below a file", ["run_dir=images/train/dark/0.png/run"], 2, "is a file; use a folder"),
    ("14 another run", ["run_dir=run", "seed=5"], 2, "holds a run with seed=0, not 5"),
    (
        "14 folder of something else",
        ["run_dir=images"],
        2,
        "which is not part of a run; use a new folder",
    ),
    ("14 resume=never", ["run_dir=run", "resume=never"], 2, "resume=never; use a new folder"),
    ("15 keep", ["keep_last=1"], 2, "keep_last=1: use 2 or more"),
    ("15 interval", ["checkpoint_every=-1"], 2, "checkpoint_every=-1"),
    ("16 missing root", ["data.root=nowhere"], 3, "/nowhere: no such folder"),
    ("16 root not given", ["data.root=null"], 3, "use data.root=FOLDER"),
    ("16 empty root", ["data.root=run/log"], 3, "/run/log: no folder train; it "),
    ("31 no checkpoint", ["resume=nowhere"], 4, "no checkpoint there"),
    (
        "34 another net",
        ["run_dir=new", "resume=run", "model.norm=none"],
        4,
        "made with another plan",
    ),
    (
        "34 another precision",
        ["resume=run", "precision=float64"],
        4,
        "made with another precision",
    ),
    ("37 a pickle", ["resume=net.pt"], 4, "may hold a pickle"),
    ("no GPU", ["device=cuda"], 2, "0 GPUs for 2 processes on this host; use device=cpu"),
    ("no GPU to share", ["share_gpu=true"], 2, "needs a GPU, and this host has none"),
]


def add_empty_class(place: Path) -> None:
    (place / "images" / "train" / "none").mkdir()


def add_class_to_val(place: Path) -> None:
    shutil.copytree(place / "images/val/dark", place / "images/val/grey")


def remove_third(place: Path) -> Path:
    """Delete a training image and return its path, for its replacement."""
    path = place / "images/train/dark/3.png"
    path.unlink()
    return path


def write_empty_file(place: Path) -> None:
    remove_third(place).write_bytes(b"")


def write_html(place: Path) -> None:
    remove_third(place).write_text("<html>404</html>")


def truncate(place: Path) -> None:
    content = (place / "images/train/dark/4.png").read_bytes()
    remove_third(place).write_bytes(content[:4000])


def write_90_megapixels(place: Path) -> None:
    Image.new("1", (10_000, 9_000)).save(remove_third(place))


def write_400_megapixels(place: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(remove_third(place))


def write_float_pixels(place: Path) -> None:
    Image.new("F", (80, 80)).save(place / "images/train/dark/big.tiff")


def write_dead_link(place: Path) -> None:
    remove_third(place).symlink_to("nowhere.png")


def write_name_that_is_not_text(place: Path) -> None:
    folder = os.fsencode(place / "images/train/dark")
    with open(folder + b"/a\nb\xff.png", "wb") as file:  # noqa: PTH123 - no text can name it
        file.write(b"no image")


def add_image(place: Path) -> None:
    pixels = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(place / "images/train/dark/new.png")


# Name, function that spoils the images, part of the error line; the exit status is 3.
IMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("17 empty class", add_empty_class, "none"),
    ("18 other classes", add_class_to_val, "the class 'grey' is not in train"),
    ("19 empty file", write_empty_file, "3.png: cannot read image"),
    ("19 HTML", write_html, "3.png: cannot read image"),
    ("19 dead link", write_dead_link, "3.png: cannot be read (No such file"),
    ("20 truncated", truncate, "3.png: cannot read image"),
    ("21 90 megapixels", write_90_megapixels, "10000 x 9000 pixels"),
    ("21 400 megapixels", write_400_megapixels, "3.png: cannot read image"),
    ("23 float pixels", write_float_pixels, "big.tiff: cannot read image (mode F"),
    ("29 name that is not text", write_name_that_is_not_text, ".png: cannot read image"),
    ("30 changed data set", add_image, "run/checkpoints/step-00000002 was trained on"),
]
