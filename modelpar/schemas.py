"""The settings of each command, by its name."""

from dataclasses import dataclass, field
from typing import Any, Final

from omegaconf import MISSING

from modelpar.bench.contenders import CONTENDERS
from modelpar.declare import at_least, declare, one_of, path
from modelpar.groups import BY_DATA, PRECISIONS, XDG, DataSettings, RecipeSettings
from modelpar.settings import (
    EvaluateSettings,
    ProcessSettings,
    RankSettings,
    TrainSettings,
    run_data,
)

BY_DEVICE: Final = "by device"
PACKABLE: Final = ("imagenet", "imagefolder", "imagenette")


@dataclass
class LinkSettings:
    """The network of a benchmark that runs on the two hosts of ``launch/slow_link.sh``."""

    hosts: list[str] = declare(
        (),
        unit="list",
        means="network namespaces, one for each process; set by `launch/slow_link.sh`",
    )
    rates: list[float] = at_least(
        0.001,
        (),
        unit="list",
        means="Mbit/s to measure at besides the full rate; set by `launch/slow_link.sh`",
    )


@dataclass
class PredictSettings(RankSettings):
    """The settings of ``modelpar.predict``."""

    checkpoint: str = path(unit="path", means="which weights")
    ema: bool = declare(
        False, means="use the moving average of `recipe.ema` in place of the weights"
    )
    images: Any = path(
        as_given=True,
        filled=True,
        unit="path or list of paths",
        means="files, folders with all folders in them, and globs; of folders and globs the files "
        "with the endings of images",
    )
    out: str | None = path(
        None,
        unit="file",
        means="a page that ends in `.html`, or a table that ends in `.csv`; without it the "
        "answers are printed",
    )
    neighbours: int = at_least(
        0,
        0,
        unit="images",
        means="for a page: how many of the nearest training images by fc7 it shows, as in figure "
        "4",
    )
    training_images: int = at_least(
        1, 2000, means="number of training images among which neighbours are searched"
    )
    views: int = one_of(
        1, 9, 10, default=1, means="views per image, whose probabilities are averaged"
    )
    bad: str = one_of(
        "error",
        "skip",
        default="error",
        means="an image that cannot be read ends the command with status 3, or is left out with "
        "one line",
    )
    columns: int = one_of(
        1, 2, default=1, means="`2`: the pair on two processes; one process starts faster"
    )
    data: DataSettings = run_data(
        "root", "download", unset="that of the run", means="the training images for `neighbours`"
    )


@dataclass
class BenchmarkSettings(ProcessSettings):
    """The settings of ``modelpar.benchmark``."""

    what: str = one_of("step", "data", default="step", means="a training step, or reading images")
    contenders: list[str] | None = declare(
        None, choices=CONTENDERS, filled=True, unset=BY_DEVICE, means="what is timed"
    )
    images: int = at_least(
        256, 1000, unit="256 or more", means="images that are generated for `what=data`"
    )
    precisions: list[str] | None = declare(
        None,
        choices=PRECISIONS,
        filled=True,
        unset="by device: `[float32,bfloat16]`, on a GPU `[bfloat16]`",
        means="the precisions of each contender",
    )
    batch_sizes: list[int] | None = at_least(
        1,
        None,
        filled=True,
        unit="list",
        unset="by device: `[128]`, on a GPU `[128,256,512]`",
        means="images per step, of all processes together",
    )
    image_size: int = at_least(1, 224, unit="pixels", means="side of a crop")
    num_classes: int = at_least(1, 1000, means="number of classes")
    rounds: int = at_least(1, 3, means="each contender has one turn in each round")
    steps: int | None = at_least(
        1,
        None,
        unset="by device: `2`, on a GPU `20`",
        means="timed steps of a turn, after one warm-up step, on a GPU six",
    )
    breakdown: bool = declare(
        False,
        means="also write a trace of one step of each process to `trace` in `out`, for "
        "https://ui.perfetto.dev or chrome://tracing",
    )
    out: str = path(
        "benchmark",
        unit="folder",
        means="where `benchmark.json`, `benchmark.md` and the traces are written",
    )
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    link: LinkSettings = field(default_factory=LinkSettings)
    seed: int = at_least(0, 0, means="determines weights and images")
    compile: bool = declare(True, means="as for `modelpar-train`")


@dataclass
class ExportSettings:
    """The settings of ``modelpar.export``."""

    checkpoint: Any = path(
        unit="path or list of paths",
        means="which weights; of several steps of one training their mean",
    )
    ema: bool = declare(
        False, means="export the moving average of `recipe.ema` in place of the weights"
    )
    out: str = path(
        unit="file",
        means="name of the file, which must end in `.safetensors`, `.onnx` or `.pt2`",
    )
    opset: int | None = at_least(
        1, None, unit="number", unset="torch's own", means="operator set of an ONNX file"
    )


@dataclass
class ConvertSettings:
    """The settings of ``modelpar.convert``."""

    source: Any = path(
        unit="file, or two",
        means="the weights; state dicts may be of one column each, `[FILE,FILE]`, column 0 first",
    )
    out: str = path(
        unit="file",
        means="name of the file, which must end in `.safetensors`; every command that takes a "
        "checkpoint takes it",
    )
    recipe: RecipeSettings | None = declare(
        None,
        choices=("paper", "code2012", "clean", "caffe"),
        unset="by the file",
        means="what the net computes; required for state dicts of our nets",
    )
    mean: str | None = path(
        None,
        unit="file",
        unset="by the format",
        means="mean image that is subtracted: `.binaryproto`, `.npy` (3, T, T), mean colour as "
        "`.npy` (3,), or cuda-convnet's `batches.meta`",
    )


@dataclass
class CompareSettings:
    """The settings of ``modelpar.compare``."""

    runs: list[str] = declare(
        MISSING,
        filled=True,
        path=(),
        unit="list",
        means="run directories, sweeps of them, globs such as `'runs/*'`, or files of "
        "`modelpar-evaluate out=FILE.json`",
    )
    out: str = path("compare", unit="folder", means="where the files are written")


@dataclass
class FiguresSettings:
    """The settings of ``modelpar.figures``."""

    checkpoint: str | None = path(
        None,
        unit="path",
        means="the net for figures 3 and 4: a run (its newest step), the folder of a step, or an "
        "exported file",
    )
    runs: list[str] = declare(
        (),
        path=(),
        unit="list",
        means="run directories, sweeps of them, or globs, for figures 1 and 3",
    )
    training_images: int = at_least(
        1, 2000, means="number of training images that are searched for figure 4"
    )
    out: str = path("figures", unit="folder", means="where the files are written")
    data: DataSettings = run_data("root", "download", unset="that of the run")
    batch_size: int = at_least(1, 128, unit="images", means="images that are computed at once")
    device: str = one_of(
        "auto", "cpu", "cuda", default="auto", means="`auto`: a GPU if there is one"
    )
    workers: int | None = at_least(0, None, unset=BY_DATA, means="threads that read images ahead")
    cache_dir: str | None = path(None, unit="folder", unset=XDG, means="mean images and downloads")


@dataclass
class PrepareSettings:
    """The settings of ``modelpar.prepare``."""

    data: DataSettings = run_data(
        "root", "download", "num_classes", choices=PACKABLE, unset="required", means="the images"
    )
    out: str = path(
        unit="folder", means="the store; the same command continues one that is not finished"
    )
    size: int = at_least(1, 256, unit="pixels", means="side of the stored squares (section 2)")
    format: str = one_of(
        "jpeg", "raw", default="jpeg", means="JPEG files of quality 95, or pixels"
    )
    bad: str = one_of(
        "error", "skip", default="error", means="what happens to images that cannot be decoded"
    )
    max_bad: float = at_least(
        0, 0.001, below=1, means="share of the images of `train` and of `val` that may be skipped"
    )
    verify: bool = declare(
        False, means="read the finished store and compare it with its hashes; needs no `data`"
    )
    workers: int | None = at_least(
        0, None, unset="all cores", means="processes that decode; `0`: this one"
    )
    progress: bool = declare(True, means="show a progress bar")
    cache_dir: str | None = path(None, unit="folder", unset=XDG, means="downloads")

    @property
    def only_verifies(self) -> bool:
        """Whether a finished store is only read; its images may no longer be there."""
        return self.verify and not self.data.name


SCHEMAS: Final = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "predict": PredictSettings,
    "benchmark": BenchmarkSettings,
    "export": ExportSettings,
    "convert": ConvertSettings,
    "compare": CompareSettings,
    "figures": FiguresSettings,
    "prepare": PrepareSettings,
}
