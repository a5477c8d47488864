"""The settings of training and evaluation; ``schemas.py`` has those of the other commands."""

from dataclasses import dataclass, field
from typing import Any

from modelpar import limits
from modelpar.declare import at_least, declare, one_of, path
from modelpar.groups import (
    BY_DATA,
    PRECISIONS,
    XDG,
    CommSettings,
    CrossingSettings,
    DataSettings,
    DebugSettings,
    InitSettings,
    ModelSettings,
    MonitorSettings,
    PublishedSettings,
    RecipeSettings,
)


def run_data(*keys: str, **about: Any) -> Any:
    """Declare ``data`` of a command that uses a run's, or only a few ``keys`` of it."""
    metadata = {"keys": keys, **about}
    return field(
        default_factory=lambda: DataSettings(name="", image_size=1, epochs=1), metadata=metadata
    )


@dataclass
class ProcessSettings:
    """What the commands that start processes have in common."""

    crossing: CrossingSettings = field(default_factory=CrossingSettings)
    comm: CommSettings = field(default_factory=CommSettings)
    device: str = one_of(
        "auto",
        "cpu",
        "cuda",
        default="auto",
        means="`auto`: GPUs if there is one for each process, see docs/settings.md",
    )
    channels_last: bool = declare(
        True, means="`true`: channels_last memory format, `false`: contiguous"
    )
    threads: int | None = at_least(
        1,
        None,
        below=limits.THREADS + 1,
        unset="its share of the cores",
        means="CPU threads of a process",
    )


@dataclass
class RankSettings(ProcessSettings):
    """What training and evaluation have in common."""

    data: DataSettings = field(default_factory=DataSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    columns: int = one_of(
        1,
        2,
        default=2,
        means="`2`: two columns, one process each; `1`: the whole net in one process",
    )
    replicas: int = at_least(
        1,
        1,
        means="copies of the net with the same weights; each trains on its own part of the global "
        "batch",
    )
    batch_size: int = at_least(
        1, 128, unit="images", means="images per step of one replica (section 5 of the paper)"
    )
    views: int = one_of(
        1,
        9,
        10,
        default=1,
        means="views per image in the evaluation at the end of a run: the central one, ten as in "
        "the paper, or the nine of the code for CIFAR",
    )
    share_gpu: bool = declare(
        False,
        means="let processes share GPUs, to try or to test the split; slower than one process",
    )
    precision: str = one_of(
        *PRECISIONS, default="float32", means="`bfloat16` keeps float32 weights in the optimizer"
    )
    tf32: bool = declare(
        False, means="let a GPU use TF32 in float32 matrix products and convolutions"
    )
    deterministic: bool = declare(
        False,
        means="let a GPU use only kernels that compute the same bits each time, so that a resumed "
        "run ends with the bits of an uninterrupted one; slower. A CPU does so anyway",
    )
    workers: int | None = at_least(
        0,
        None,
        unset=BY_DATA,
        means="threads of each rank that read images ahead; `0`: an image is read when it is used",
    )
    on_failure: str = one_of(
        "continue", "stop", default="continue", means="what a sweep does after a job failed"
    )
    cache_dir: str | None = path(None, unit="folder", unset=XDG, means="mean images and downloads")


@dataclass
class TrainSettings(RankSettings):
    """The settings of ``modelpar.train``."""

    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    experiment: str | None = declare(
        None,
        means="a run or ablation by its name, which sets `control` and `published`; "
        "docs/experiments.md",
    )
    control: str | None = declare(None, means="the experiment that this one is compared with")
    published: PublishedSettings = field(
        default_factory=PublishedSettings,
        metadata={
            "means": "the published error: `published.top1`, `published.top5`, `published.set`, "
            "`published.views`, `published.source`"
        },
    )
    control_published: PublishedSettings | None = declare(
        None, means="the published error of the control, if it was published for other images"
    )
    epochs: int | None = at_least(
        1,
        None,
        unset=BY_DATA,
        means="total number of epochs, counted from the beginning of the run",
    )
    steps: int | None = at_least(
        1, None, means="total number of steps; ends the run before its epochs are over"
    )
    # Differs: runs of 2012 ended by hand.
    early_stopping: int = at_least(
        0,
        0,
        unit="evaluations",
        means="end the run after so many evaluations in a row without a lower top-1 test error; "
        "`0`: never. The same command with a larger number continues it",
    )
    accumulate: int = at_least(
        1,
        1,
        unit="divisor of `batch_size`",
        means="gradient accumulation: number of micro-batches per update. The images, dropout "
        "masks, learning rates and rows of a step are those of the whole batch, so only memory "
        "and rounding change",
    )
    seed: int = at_least(
        0,
        0,
        means="determines weights, order, crops, colours and dropout, the same for one process "
        "and for many",
    )
    compile: bool = declare(
        True,
        means="let torch.compile fuse the operations between the matrix products; the first start "
        "on a machine takes up to half a minute longer",
    )
    cuda_graph: str = one_of(
        "auto",
        "on",
        "off",
        default="auto",
        means="`auto`: a GPU records the training step of a single process as a CUDA graph and "
        "replays it; `on`: also that of a pair, whose exchanges inside a graph were not tested on "
        "two GPUs; needs `compile=true` and float32 or bfloat16; steps with `replicas`, "
        "`accumulate`, `recipe.clip` or `recipe.ema` are not recorded",
    )
    run_dir: str | None = path(
        None,
        unit="folder",
        unset="Hydra's output directory",
        means="one run per folder; without it each start is a new run in `outputs/DATE/TIME`",
    )
    debug: DebugSettings = field(default_factory=DebugSettings)
    init: InitSettings = field(default_factory=InitSettings)
    resume: str = path(
        "auto",
        "auto",
        "never",
        means="`auto`: continue the run found in `run_dir`, or return at once if it is finished; "
        "`never`: refuse a folder that has a run; PATH: continue the same training from that run "
        "or step, in a new `run_dir`",
    )
    checkpoint_every: int | None = at_least(
        0,
        None,
        unit="steps",
        unset=BY_DATA,
        means="how often a checkpoint is saved; `0`: only at the end",
    )
    keep_last: int = at_least(
        2, 2, means="how many of the newest checkpoints are kept, at least 2"
    )
    keep_every: int = at_least(
        0,
        0,
        unit="steps",
        means="also keep the checkpoint of each multiple of this number; `0`: none",
    )
    keep_best: bool = declare(
        True, means="also keep the checkpoint with the lowest top-1 test error"
    )
    log_every: int = at_least(
        1,
        1,
        unit="steps",
        means="steps between two rows of `metrics.jsonl`; the last step has one",
    )
    restarts: int = at_least(
        0,
        0,
        means="how often `modelpar-train` starts a run again that lost a process, see "
        "docs/reliability.md",
    )


@dataclass
class EvaluateSettings(RankSettings):
    """The settings of ``modelpar.evaluate``."""

    checkpoint: Any = path(
        unit="path or list of paths", means="which weights; several nets are also averaged"
    )
    ema: bool = declare(
        False, means="evaluate the moving averages of `recipe.ema` in place of the weights"
    )
    weights: str = one_of(
        "equal",
        "search",
        default="equal",
        means="weights of the nets in their average: all equal, or searched on images that are in "
        "no error",
    )
    search_images: int | None = at_least(
        1,
        None,
        unit="images",
        unset="a fifth",
        means="number of test images on which `weights=search` searches; they count in no error",
    )
    search_root: str | None = path(
        None,
        unit="folder",
        means="`data.root` of other images, on all of which `weights=search` searches",
    )
    views: int = one_of(1, 9, 10, default=1, means="views per image")
    out: str | None = path(
        None,
        unit="file",
        means="where the errors are written as JSON, for `modelpar-compare`; ends in `.json`",
    )
    data: DataSettings = run_data("root", "download", unset="that of the run")
