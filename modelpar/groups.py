"""Groups of settings, each with the values that are allowed; ``conf/`` holds files of some."""

from dataclasses import dataclass
from typing import Final

from omegaconf import MISSING

from modelpar.declare import at_least, declare, one_of, path
from modelpar.net.paper import (
    BASELINES,
    CAFFE_NORM_K,
    MOMENTUM,
    NETS,
    NORM_K,
    RATE,
    SCHEDULES,
    WEIGHT_DECAY,
)

PRECISIONS: Final = ("float32", "bfloat16", "float64")
# What a default of null stands for.
BY_DATA: Final = "by data"
BY_RECIPE: Final = "by recipe"
BY_NET: Final = "by net"
XDG: Final = "`modelpar` in the XDG cache"


@dataclass
class DataSettings:
    """The images, and what depends on them; ``conf/data/*.yaml``."""

    name: str = declare(MISSING, unset=BY_DATA, means="the data set, see docs/data.md")
    root: str | None = path(None, unit="folder", means="where the images are")
    download: bool = declare(False, means="download the images if the folder does not have them")
    image_size: int = at_least(1, unit="pixels", unset=BY_DATA, means="side of a crop")
    num_classes: int | None = at_least(
        1, None, unset=BY_DATA, means="number of classes; must be the number that the images have"
    )
    epochs: int | None = at_least(
        1,
        None,
        unset=BY_DATA,
        means="length of a run if `epochs` is not set; `null`: as many epochs as the run of "
        "`recipe.schedule` had",
    )
    evaluate_every: int = at_least(
        1, 1, unit="epochs", unset=BY_DATA, means="an evaluation after every such number of epochs"
    )
    checkpoint_every: int = at_least(
        0, 0, unit="steps", unset=BY_DATA, means="default of `checkpoint_every`"
    )
    workers: int = at_least(0, 2, unset=BY_DATA, means="default of `workers`")
    resident: str = one_of(
        "auto",
        "never",
        default="auto",
        means="`auto`: training images that are in memory or in a raw packed store stay on a GPU "
        "if they take at most 1/16 of its free memory; `never`: each batch is copied to it",
    )


@dataclass
class RecipeSettings:
    """The training rules: one switch for each place where paper and code differ.

    ``conf/recipe/*.yaml`` chooses a value of each switch for each recipe.  The order of the values
    is: paper, code of 2012, others.  There are two exceptions: the second value of ``norm2_input``
    is run 166's, and the first of ``conv1_padding`` torchvision's.  The last values of ``norm_k``,
    ``norm1_input``, ``norm2_input`` and ``norms`` are Caffe's.
    """

    name: str = declare(MISSING, unset=BY_RECIPE, means="`paper`, `code2012`, `clean` or `caffe`")
    weight_std: str = one_of(
        "same", "wider_conv3_5", unset=BY_RECIPE, means="standard deviation of the initial weights"
    )
    norm_alpha: str = one_of(
        "per_term",
        "per_window",
        unset=BY_RECIPE,
        means="`per_term`: alpha times the sum of squares, as in the paper; `per_window`: alpha "
        "times their mean over the window, as in torch",
    )
    norm_k: float = one_of(
        NORM_K,
        CAFFE_NORM_K,
        default=NORM_K,
        means="k of the response normalization: the paper's and the code's, or Caffe's",
    )
    norm1_input: str = one_of(
        "rectified", "linear", "pooled", unset=BY_RECIPE, means="what is normalized after conv1"
    )
    norm2_input: str = one_of(
        "rectified", "linear", "pooled", unset=BY_RECIPE, means="what is normalized after conv2"
    )
    norms: str = one_of(
        "across",
        "across_and_within",
        "across_both",
        unset=BY_RECIPE,
        means="`across`: across maps; `across_and_within`: after conv2 also inside each map; "
        "`across_both`: across the maps of both columns",
    )
    rates: str = one_of(
        "equal", "double_bias", unset=BY_RECIPE, means="learning rate of the biases"
    )
    schedule: str = one_of(
        *SCHEDULES,
        unset=BY_RECIPE,
        means="when the learning rates fall and the colour noise ends, see docs/recipes.md",
    )
    decay: str = one_of("all", "weights", unset=BY_RECIPE, means="which parameters decay")
    colour_noise: str = one_of(
        "added",
        "added_and_scaled",
        "none",
        unset=BY_RECIPE,
        means="the colour noise of section 4.1",
    )
    crops: str = one_of(
        "per_image",
        "per_32",
        "central",
        unset=BY_RECIPE,
        means="how often a crop and a flip are drawn",
    )
    shuffle: str = one_of(
        "every_epoch", "once", unset=BY_RECIPE, means="when the images are shuffled"
    )
    conv1_padding: str = one_of(
        "around",
        "bottom_right",
        unset=BY_RECIPE,
        means="where zeros are added so that 224 pixels become 55",
    )
    lr: float = at_least(
        0,
        RATE,
        means="learning rate of the weights, which `recipe.schedule` multiplies (section 5)",
    )
    bias_drop: str | None = one_of(
        "none",
        "first",
        "last",
        default=None,
        unset="by schedule",
        means="drop of the weights' learning rate at which the rate of the biases also falls to "
        "a tenth",
    )
    rates_by_layer: dict[str, float] = at_least(
        0,
        {},
        means="factors of the learning rates of single layers: "
        "`'recipe.rates_by_layer={fc8: 10}'`",
    )
    momentum: float = at_least(0, MOMENTUM, means="momentum of the update (section 5)")
    weight_decay: float = at_least(
        0,
        WEIGHT_DECAY,
        means="weight decay: this share of a parameter, times the learning rate, is subtracted "
        "in each step (section 5)",
    )
    # Differs: neither paper nor code has these rules, and no recipe uses them.
    label_smoothing: float = at_least(
        0,
        0.0,
        below=1,
        means="share of each target that is spread evenly over all classes, as in torch; the "
        "training loss that is shown is of these targets, the test loss is not",
    )
    clip: float = at_least(
        0,
        0.0,
        means="gradient clipping: maximum L2 norm over all parameters of both columns; `0`: no "
        "clipping",
    )
    ema: float = at_least(
        0,
        0.0,
        below=1,
        means="decay of a moving average of the weights, which has its own test error; `0`: none",
    )


@dataclass
class ModelSettings:
    """Switches of the net.  ``net.plan.Plan`` explains them; null: chosen by data or net."""

    net: str | None = one_of(
        *NETS, *BASELINES, default=None, unset="`two_columns`", means="which net"
    )
    norm: str | None = one_of(
        "response",
        "first_only",
        "within_channel",
        "batch",
        "none",
        default=None,
        unset="`response`",
        means="`first_only`: only after conv1; `within_channel`: inside each map only",
    )
    activation: str | None = one_of(
        "relu",
        "tanh",
        "sigmoid",
        "elu",
        default=None,
        unset="`relu`",
        means="what follows each layer but the last",
    )
    pool: str | None = one_of(
        "overlapping",
        "non_overlapping",
        "average",
        default=None,
        unset="`overlapping`",
        means="3 x 3 with stride 2; 2 x 2 with stride 2; the mean of 3 x 3 with stride 2",
    )
    dropout: float | None = at_least(
        0,
        None,
        below=1,
        unset="`0.5`",
        means="share of the units of fc6 and fc7 that is dropped; `0`: no dropout",
    )
    conv4_dropout: float | None = at_least(
        0, None, below=1, unset="`0.0`", means="share of the units of conv4 that is dropped"
    )
    crossing_at: list[str] | None = declare(
        None,
        unit="list",
        unset=BY_NET,
        means="the layers that read both columns, usually `[conv3,fc6,fc7]`; fc8 always does",
    )
    num_classes: int | None = at_least(
        1, None, unset=BY_DATA, means="must be the number of classes that the images have"
    )
    image_size: int | None = at_least(
        1,
        None,
        unit="pixels",
        unset=BY_DATA,
        means="side of a crop, at least 64 (`four_layer`: 6, `torchvision`: 63)",
    )


@dataclass
class InitSettings:
    """Trained weights that a new run starts from, in some of its layers."""

    checkpoint: str | None = path(
        None,
        unit="path",
        means="a run, a step or an exported file from which a new run takes the weights of "
        "`init.layers`; a run that continues does not read it",
    )
    layers: list[str] = declare(
        (),
        unit="list",
        means="layers that start with these weights, for example `[conv1,conv2]`; the others "
        "start as usual, so the number of classes may differ",
    )


@dataclass
class CrossingSettings:
    """How the columns exchange maps."""

    dtype: str | None = one_of(
        *PRECISIONS,
        "float16",
        default=None,
        unset="as `precision`",
        means="number format in which maps and their gradients are sent; in float16 gradients are "
        "multiplied by the batch size while they travel",
    )
    overlap: bool = declare(
        True, means="compute with a column's own maps while the other column's maps travel"
    )
    chunks: int | None = at_least(
        1,
        None,
        unset="2, on GPUs 1",
        means="number of parts of the batch; the maps of one part travel while the next part is "
        "computed",
    )


@dataclass
class CommSettings:
    """Communication between processes."""

    timeout: float = at_least(
        0.001,
        120.0,
        below=1e9,  # torch counts in nanoseconds, in 64 bits
        unit="seconds",
        means="how long a process waits for another before it reports it as lost",
    )


@dataclass
class MonitorSettings:
    """What a run shows besides metrics.jsonl."""

    progress: bool = declare(True, means="show a progress bar")
    tensorboard: bool = declare(True, means="write what TensorBoard shows")
    wandb: bool = declare(
        False, means="also send what TensorBoard gets to Weights & Biases, see docs/tensorboard.md"
    )


@dataclass
class DebugSettings:
    """Ways to look for faults; ``conf/debug/*.yaml``."""

    one_batch: bool = declare(
        False, means="train on the first batch again and again, until the loss is near zero"
    )
    trace: int = at_least(
        0, 0, unit="steps", means="write a trace of so many steps of each rank to `run_dir/trace`"
    )
    dry: bool = declare(False, means="print a table of the layers, and train nothing")


@dataclass
class PublishedSettings:
    """What was published about an experiment."""

    top1: float | None = declare(None, unit="%", means="top-1 error")
    top5: float | None = declare(None, unit="%", means="top-5 error")
    set: str | None = declare(None, means="the images it is of")
    views: int | None = declare(None, means="views per image")
    source: str | None = declare(None, means="where it was published")
