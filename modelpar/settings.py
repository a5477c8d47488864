"""The typed schema of the whole configuration: every setting there is, and its default."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Final, NoReturn

from omegaconf import MISSING

from modelpar.errors import SettingsError


def at_least(minimum: float, default: Any = MISSING) -> Any:
    """Declare a finite number that is ``minimum`` or more, or a list of such numbers."""
    return field(default=default, metadata={"minimum": minimum})


def one_of(*choices: object, default: Any = MISSING) -> Any:
    """Declare one of a few values, or a list of them."""
    return field(default=default, metadata={"choices": choices})


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


def check(settings: Any, prefix: str = "") -> None:
    """Raise SettingsError for the first value that its field does not allow."""
    for key, entry, value in walk(settings, prefix):
        choices, minimum = entry.metadata.get("choices"), entry.metadata.get("minimum")
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is None:
                continue
            if choices and one not in choices:
                refuse_choice(key, one, choices)
            if minimum is not None and not (math.isfinite(one) and one >= minimum):
                raise SettingsError(f"{key}={one}: use a finite number, {minimum} or more")


def refuse_choice(key: str, value: object, choices: Iterable[object]) -> NoReturn:
    """Raise SettingsError that names the key, the value, the nearest choice and all of them."""
    names = [str(choice) for choice in choices]
    near = get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise SettingsError(f"{key}={value}: {hint}use one of {', '.join(names)}")


@dataclass
class DataSettings:
    """Which images, and what follows from them; ``conf/data/*.yaml``."""

    name: str = MISSING
    root: str | None = None  # folder of the images; photos and synthetic need none
    download: bool = False
    image_size: int = MISSING  # side of a crop in pixels
    num_classes: int | None = None  # None: as many as the data has
    epochs: int = MISSING
    evaluate_every: int = 1  # epochs
    checkpoint_every: int = 0  # steps; 0: only at the end
    workers: int = 2


@dataclass
class RecipeSettings:
    """The named switches between paper and code; ``conf/recipe/*.yaml``, ``net/paper.py``."""

    name: str = MISSING
    weight_std: str = MISSING
    norm_alpha: str = MISSING
    norm1_input: str = MISSING
    norm2_input: str = MISSING
    norms: str = MISSING
    rates: str = MISSING
    schedule: str = MISSING
    decay: str = MISSING
    colour_noise: str = MISSING
    crops: str = MISSING
    shuffle: str = MISSING
    conv1_padding: str = MISSING
    lr: float = 0.01  # first learning rate of the weights (section 5)
    momentum: float = 0.9  # section 5
    weight_decay: float = 5e-4  # section 5


@dataclass
class ModelSettings:
    """The net's own switches, see ``net.paper.Plan``; None: as recipe and data have it."""

    net: str | None = None
    norm: str | None = None
    activation: str | None = None
    pool: str | None = None
    dropout: float | None = None
    conv4_dropout: float | None = None
    crossing_at: list[str] | None = None
    num_classes: int | None = None
    image_size: int | None = None


@dataclass
class CrossingSettings:
    """How maps travel between the columns."""

    dtype: str | None = None  # None: the precision's own
    overlap: bool = True  # compute the own half while the peer's travels
    chunks: int = 2  # parts of the batch; the maps of one travel while the next is computed


@dataclass
class CommSettings:
    """How processes talk to each other."""

    timeout: float = 120.0  # s that one waits for another
    check: bool = False  # compare each collective before it runs: slow, to find a bug


@dataclass
class MonitorSettings:
    """What a run shows of itself besides metrics.jsonl."""

    progress: bool = True
    tensorboard: bool = True


@dataclass
class PublishedSettings:
    """What was published of an experiment: errors in %, on which images, with how many views."""

    top1: float | None = None
    top5: float | None = None
    set: str | None = None
    views: int | None = None
    source: str | None = None


@dataclass
class TrainSettings:
    """``conf/train.yaml``: everything that ``modelpar.train`` can be told."""

    data: DataSettings = field(default_factory=DataSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    crossing: CrossingSettings = field(default_factory=CrossingSettings)
    comm: CommSettings = field(default_factory=CommSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    experiment: str | None = None  # its own name, and what it is to be compared with
    control: str | None = None
    published: PublishedSettings = field(default_factory=PublishedSettings)
    control_published: PublishedSettings | None = None  # where the control's is of other images
    columns: int = 2
    replicas: int = 1
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 128  # images a pair
    views: int = 1  # of the evaluation that ends a run
    seed: int = 0
    precision: str = "float32"
    device: str = "auto"
    compile: bool = True
    channels_last: bool = True
    threads: int | None = None  # a rank; None: its share of the cores
    tf32: bool = False
    run_dir: str | None = None
    resume: str = "auto"
    checkpoint_every: int | None = None  # steps; None: by data
    keep_last: int = 2
    keep_every: int = 0  # steps; 0: none for that
    keep_best: bool = True
    workers: int | None = None  # loader processes a rank; None: by data
    log_every: int = 1  # steps
    restarts: int = 0
    on_failure: str = "continue"  # of a job of a sweep
    cache_dir: str | None = None


@dataclass
class EvaluateSettings:
    """``conf/evaluate.yaml``: everything that ``modelpar.evaluate`` can be told."""

    checkpoint: str = MISSING  # RUN_DIR | STEP_DIR | FILE.safetensors
    views: int = 1
    data: DataSettings = field(default_factory=lambda: DataSettings("", image_size=0, epochs=1))
    crossing: CrossingSettings = field(default_factory=CrossingSettings)
    comm: CommSettings = field(default_factory=CommSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    columns: int = 2
    replicas: int = 1
    batch_size: int = 128
    precision: str = "float32"
    device: str = "auto"
    channels_last: bool = True
    threads: int | None = None
    tf32: bool = False
    workers: int | None = None
    on_failure: str = "continue"
    cache_dir: str | None = None


@dataclass
class LinkSettings:
    """The wire of a benchmark, where it runs on two hosts made by ``launch/slow_link.sh``."""

    hosts: list[str] = field(default_factory=list[str])  # network namespaces, one a process
    rates: list[float] = field(default_factory=list[float])  # Mbit/s to measure at beside full


@dataclass
class BenchmarkSettings:
    """``conf/benchmark.yaml``: everything that ``modelpar.benchmark`` can be told."""

    contenders: list[str] = MISSING
    precisions: list[str] = MISSING
    batch_sizes: list[int] = MISSING
    image_size: int = 224
    num_classes: int = 1000
    rounds: int = 3
    steps: int = 2  # of each contender in each round
    breakdown: bool = True
    out: str = "benchmark"
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    crossing: CrossingSettings = field(default_factory=CrossingSettings)
    comm: CommSettings = field(default_factory=CommSettings)
    link: LinkSettings = field(default_factory=LinkSettings)
    seed: int = 0
    device: str = "auto"
    compile: bool = True
    channels_last: bool = True
    threads: int | None = None


@dataclass
class ExportSettings:
    """``conf/export.yaml``: everything that ``modelpar.export`` can be told."""

    checkpoint: str = MISSING
    out: str = MISSING


@dataclass
class CompareSettings:
    """``conf/compare.yaml``: everything that ``modelpar.compare`` can be told."""

    runs: list[str] = MISSING  # run directories, sweeps of them, globs
    out: str = MISSING


@dataclass
class FiguresSettings:
    """``conf/figures.yaml``: everything that ``modelpar.figures`` can be told."""

    checkpoint: str | None = None  # RUN_DIR | STEP_DIR | FILE.safetensors
    runs: list[str] = field(default_factory=list[str])  # for figures 1 and 3, as in compare
    training_images: int = 2000  # looked at for figure 4
    out: str = MISSING
    data: DataSettings = field(default_factory=lambda: DataSettings("", image_size=0, epochs=1))
    batch_size: int = 128
    device: str = "auto"
    workers: int | None = None
    cache_dir: str | None = None


SCHEMAS: Final = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "benchmark": BenchmarkSettings,
    "export": ExportSettings,
    "compare": CompareSettings,
    "figures": FiguresSettings,
}
PRECISIONS: Final = ("float32", "bfloat16", "float64")
WIRE_DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
DEVICES: Final = ("auto", "cpu", "cuda")
VIEWS: Final = (1, 10)
ON_FAILURE: Final = ("continue", "stop")
CONTENDERS: Final = ("plain", "layers", "ddp", "tensor_parallel", "in_turn", "pair")
HOSTS: Final = 2  # that slow_link.sh makes
