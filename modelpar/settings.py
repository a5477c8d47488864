"""All settings with their defaults and the values that are allowed; ``conf/`` holds the groups."""

import math
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Final

from omegaconf import MISSING

from modelpar.bench.contenders import CONTENDERS
from modelpar.net.paper import BASELINES, MOMENTUM, NETS, RATE, SCHEDULES, WEIGHT_DECAY

PRECISIONS: Final = ("float32", "bfloat16", "float64")


def at_least(minimum: float, default: Any = MISSING, *, below: float = math.inf) -> Any:
    """Declare a finite number, ``minimum`` or more; with a tuple as default, a list of them."""
    return _declare(default, minimum=minimum, below=below)


def one_of(*choices: object, default: Any = MISSING) -> Any:
    """Declare one of a few values; with a tuple as default, a list of them."""
    return _declare(default, choices=choices)


def path(default: Any = MISSING, *words: str) -> Any:
    """Declare a path of this machine, see ``config.typed``; ``words`` have their own meaning."""
    return _declare(default, path=words)


def _declare(default: Any, **metadata: Any) -> Any:
    if isinstance(default, tuple):
        metadata |= {"filled": bool(default)}
        return field(default_factory=lambda: [*default], metadata=metadata)
    return field(default=default, metadata=metadata)


def walk(settings: Any, prefix: str = "") -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Yield the dotted key, the field and the value of each setting."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, value


def flatten(settings: Any) -> dict[str, Any]:
    """Return the settings by dotted key."""
    return {key: value for key, _, value in walk(settings)}


@dataclass
class DataSettings:
    """The images, and what depends on them; ``conf/data/*.yaml``."""

    name: str = MISSING
    root: str | None = path(None)  # folder of the images; photos and synthetic need none
    download: bool = False
    image_size: int = at_least(1)  # side of a crop in pixels
    num_classes: int | None = at_least(1, None)  # null: as many as the data has
    epochs: int | None = at_least(1, None)  # null: as many as the run of recipe.schedule had
    evaluate_every: int = at_least(1, 1)  # epochs
    checkpoint_every: int = at_least(0, 0)  # steps; 0: only at the end
    workers: int = at_least(0, 2)


@dataclass
class RecipeSettings:
    """The training rules: one switch for each place where paper and code differ.

    ``conf/recipe/*.yaml`` chooses a side for each recipe.  The first value of each switch is the
    paper's, the second the code's (for ``norm2_input`` run 166's; for ``conv1_padding`` the first
    is torchvision's); the other values are neither's.
    """

    name: str = MISSING
    weight_std: str = one_of("same", "wider_conv3_5")
    norm_alpha: str = one_of("per_term", "per_window")
    norm1_input: str = one_of("rectified", "linear")
    norm2_input: str = one_of("rectified", "linear")
    norms: str = one_of("across", "across_and_within")
    rates: str = one_of("equal", "double_bias")
    schedule: str = one_of(*SCHEDULES)
    decay: str = one_of("all", "weights")
    colour_noise: str = one_of("added", "added_and_scaled", "none")
    crops: str = one_of("per_image", "per_32", "central")
    shuffle: str = one_of("every_epoch", "once")
    conv1_padding: str = one_of("around", "bottom_right")
    lr: float = at_least(0, RATE)  # of the weights; what the schedule multiplies
    bias_drop: str | None = one_of("none", "first", "last", default=None)  # null: the schedule's
    rates_by_layer: dict[str, float] = field(  # what multiplies a layer's rates
        default_factory=dict[str, float], metadata={"minimum": 0, "below": math.inf}
    )
    momentum: float = at_least(0, MOMENTUM)
    weight_decay: float = at_least(0, WEIGHT_DECAY)
    # Differs: neither paper nor code has these rules, and no recipe uses them.
    label_smoothing: float = at_least(0, 0.0, below=1)  # share of a target for all classes alike
    clip: float = at_least(0, 0.0)  # largest norm of a step's gradients; 0: any
    ema: float = at_least(0, 0.0, below=1)  # decay of a moving average of the weights; 0: none


@dataclass
class ModelSettings:
    """Switches of the net, see ``net.plan.Plan``; null: chosen by recipe, data or net."""

    net: str | None = one_of(*NETS, *BASELINES, default=None)
    norm: str | None = one_of(
        "response", "first_only", "within_channel", "batch", "none", default=None
    )
    activation: str | None = one_of("relu", "tanh", "sigmoid", "elu", default=None)
    pool: str | None = one_of("overlapping", "non_overlapping", "average", default=None)
    dropout: float | None = at_least(0, None, below=1)  # share of the units of fc6 and fc7
    conv4_dropout: float | None = at_least(0, None, below=1)  # share of conv4's units
    crossing_at: list[str] | None = None  # layers that read both columns
    num_classes: int | None = at_least(1, None)
    image_size: int | None = at_least(1, None)  # side of a crop in pixels


@dataclass
class InitSettings:
    """Trained weights that a new run starts from, in some of its layers."""

    checkpoint: str | None = path(None)  # RUN_DIR | STEP_DIR | FILE.safetensors, of any training
    layers: list[str] = field(default_factory=list[str])  # conv1 to fc8


@dataclass
class CrossingSettings:
    """How the columns exchange maps."""

    dtype: str | None = one_of(*PRECISIONS, "float16", default=None)  # null: the precision's
    overlap: bool = True  # compute with this column's maps while the peer's are on their way
    chunks: int | None = at_least(1, None)  # of a batch, sent in turn; null: 1 on a GPU, else 2


@dataclass
class CommSettings:
    """Communication between processes."""

    timeout: float = at_least(0.001, 120.0)  # seconds to wait for another process


@dataclass
class MonitorSettings:
    """What a run shows besides metrics.jsonl."""

    progress: bool = True
    tensorboard: bool = True
    wandb: bool = False  # also send TensorBoard's events to Weights & Biases


@dataclass
class PublishedSettings:
    """What was published about an experiment: errors in %, their images and number of views."""

    top1: float | None = None
    top5: float | None = None
    set: str | None = None
    views: int | None = None
    source: str | None = None


@dataclass
class LinkSettings:
    """The network of a benchmark that runs on the two hosts of ``launch/slow_link.sh``."""

    hosts: list[str] = field(default_factory=list[str])  # network namespaces, one per process
    rates: list[float] = at_least(0.001, ())  # Mbit/s to measure at, besides the full rate


def _run_data() -> DataSettings:  # those of a checkpoint's run, or none
    return DataSettings(name="", image_size=1, epochs=1)


@dataclass
class ProcessSettings:
    """What the commands that start processes have in common."""

    crossing: CrossingSettings = field(default_factory=CrossingSettings)
    comm: CommSettings = field(default_factory=CommSettings)
    device: str = one_of("auto", "cpu", "cuda", default="auto")
    channels_last: bool = True  # memory layout of maps
    threads: int | None = at_least(1, None)  # per process; null: its share of the cores


@dataclass
class RankSettings(ProcessSettings):
    """What training and evaluation have in common."""

    data: DataSettings = field(default_factory=DataSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    columns: int = one_of(1, 2, default=2)  # 2: one process per column; 1: the whole net in one
    replicas: int = at_least(1, 1)  # pairs that share the weights and split the batch
    batch_size: int = at_least(1, 128)  # images per pair (section 5)
    views: int = one_of(1, 9, 10, default=1)  # per image of the final evaluation; paper: 10
    share_gpu: bool = False  # let several ranks use one GPU: for tests, it is slow
    precision: str = one_of(*PRECISIONS, default="float32")
    tf32: bool = False  # let a GPU round float32 products
    deterministic: bool = False  # let a GPU use only kernels that always compute the same bits
    workers: int | None = at_least(0, None)  # reading threads per rank; null: data.workers
    on_failure: str = one_of("continue", "stop", default="continue")  # of a job of a sweep
    cache_dir: str | None = path(None)  # null: modelpar in the XDG cache


@dataclass
class TrainSettings(RankSettings):
    """The settings of ``modelpar.train``."""

    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    experiment: str | None = None  # name of the experiment
    control: str | None = None  # name of the experiment that it is compared with
    published: PublishedSettings = field(default_factory=PublishedSettings)
    control_published: PublishedSettings | None = None  # if the control's is of other images
    epochs: int | None = at_least(1, None)  # in total, resumed ones included; null: data.epochs
    steps: int | None = at_least(1, None)  # ends the run before its epochs do
    accumulate: int = at_least(1, 1)  # parts of a batch, computed in turn before its update
    # Differs: runs of 2012 ended by hand.
    early_stopping: int = at_least(0, 0)  # evaluations without a better error; 0: never
    seed: int = at_least(0, 0)
    compile: bool = True  # fuse the operations between products with torch.compile
    cuda_graph: str = one_of("auto", "on", "off", default="auto")  # record a GPU's step once
    run_dir: str | None = path(None)  # null: a new folder for each run
    init: InitSettings = field(default_factory=InitSettings)
    resume: str = path("auto", "auto", "never")  # or the path of a run or step to start from
    checkpoint_every: int | None = at_least(0, None)  # steps; null: data.checkpoint_every
    keep_last: int = at_least(2, 2)  # checkpoints
    keep_every: int = at_least(0, 0)  # keep the checkpoints of multiples of this step; 0: none
    keep_best: bool = True  # keep the checkpoint with the lowest test error
    log_every: int = at_least(1, 1)  # steps
    restarts: int = at_least(0, 0)  # how often the launcher starts again after a lost process


@dataclass
class EvaluateSettings(RankSettings):
    """The settings of ``modelpar.evaluate``."""

    checkpoint: Any = path()  # RUN_DIR | STEP_DIR | FILE.safetensors, or a list of them
    weights: str = one_of("equal", "search", default="equal")  # of the nets in their average
    search_images: int | None = at_least(1, None)  # test images to search on; null: a fifth
    ema: bool = False  # the moving averages of recipe.ema in place of the weights
    out: str | None = path(None)  # FILE.json with the errors, for modelpar-compare
    data: DataSettings = field(default_factory=_run_data)


@dataclass
class BenchmarkSettings(ProcessSettings):
    """The settings of ``modelpar.benchmark``."""

    what: str = one_of("step", "data", default="step")  # a training step, or reading images
    images: int = at_least(256, 1000)  # that are generated for what=data
    # Null: chosen for the device; batches are of all processes together.
    contenders: list[str] | None = _declare(None, choices=CONTENDERS, filled=True)
    precisions: list[str] | None = _declare(None, choices=PRECISIONS, filled=True)
    batch_sizes: list[int] | None = _declare(None, minimum=1, below=math.inf, filled=True)
    image_size: int = at_least(1, 224)  # side of a crop in pixels
    num_classes: int = at_least(1, 1000)
    rounds: int = at_least(1, 3)  # each contender has one turn in each round
    steps: int | None = at_least(1, None)  # measured steps per turn; null: by the device
    breakdown: bool = False  # write a profiler trace of one step of each rank
    out: str = path("benchmark")  # folder of benchmark.json, benchmark.md and trace/
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    link: LinkSettings = field(default_factory=LinkSettings)
    seed: int = at_least(0, 0)
    compile: bool = True


@dataclass
class ExportSettings:
    """The settings of ``modelpar.export``."""

    checkpoint: Any = path()  # RUN_DIR | STEP_DIR | FILE.safetensors, or steps of one training
    ema: bool = False  # the moving average of recipe.ema in place of the weights
    out: str = path()


@dataclass
class CompareSettings:
    """The settings of ``modelpar.compare``."""

    runs: list[str] = _declare(MISSING, filled=True, path=())  # run directories, sweeps, globs
    out: str = path("compare")  # folder of compare.csv and compare.html


@dataclass
class FiguresSettings:
    """The settings of ``modelpar.figures``."""

    checkpoint: str | None = path(None)  # RUN_DIR | STEP_DIR | FILE.safetensors
    runs: list[str] = _declare((), path=())  # for figures 1 and 3, as in compare
    training_images: int = at_least(1, 2000)  # searched for figure 4
    out: str = path("figures")  # folder of the pictures and tables
    data: DataSettings = field(default_factory=_run_data)
    batch_size: int = at_least(1, 128)
    device: str = one_of("auto", "cpu", "cuda", default="auto")
    workers: int | None = at_least(0, None)
    cache_dir: str | None = path(None)


@dataclass
class PrepareSettings:
    """The settings of ``modelpar.prepare``."""

    out: str = path()  # folder of the packed store
    data: DataSettings = field(default_factory=_run_data)
    size: int = at_least(1, 256)  # side of the stored squares in pixels (section 2)
    format: str = one_of("jpeg", "raw", default="jpeg")  # of the stored images
    bad: str = one_of("error", "skip", default="error")  # what an undecodable image is
    max_bad: float = at_least(0, 0.001, below=1)  # share of a part that may be skipped
    verify: bool = False  # read the finished store and compare it with its hashes
    workers: int | None = at_least(0, None)  # processes; null: one per core; 0: this one
    progress: bool = True
    cache_dir: str | None = path(None)  # of downloads


SCHEMAS: Final = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "benchmark": BenchmarkSettings,
    "export": ExportSettings,
    "compare": CompareSettings,
    "figures": FiguresSettings,
    "prepare": PrepareSettings,
}
