"""The numbers of the paper and of the code its authors ran in 2012, as one frozen table.

Paper: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", NIPS 2012; "section" and "table" refer to it.  Code: the authors' source as the
Computer History Museum released it; "run N" is the training its ``layer-params-N.cfg`` logs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final


@dataclass(frozen=True)
class Layer:
    """One layer as one column holds it (section 3.5; biases section 5; std run 145)."""

    outputs: int  # kernels or units of one column
    bias: float  # initial bias: 1 in conv2, conv4, conv5 and the hidden units, 0 elsewhere
    code_std: float  # standard deviation of the initial weights in the code
    kernel: int = 0  # side of the kernel in pixels; 0: fully connected
    stride: int = 1
    padding: int = 0
    decay: float = 1.0  # what multiplies the recipe's weight decay


_ROWS: Final = {
    "conv1": Layer(48, bias=0.0, code_std=0.01, kernel=11, stride=4),
    "conv2": Layer(128, bias=1.0, code_std=0.01, kernel=5, padding=2),
    "conv3": Layer(192, bias=0.0, code_std=0.03, kernel=3, padding=1),
    "conv4": Layer(192, bias=1.0, code_std=0.03, kernel=3, padding=1),
    "conv5": Layer(128, bias=1.0, code_std=0.03, kernel=3, padding=1),
    "conv6": Layer(128, bias=1.0, code_std=0.03, kernel=3, padding=1),  # after pool 5; run 146's
    "fc6": Layer(2048, bias=1.0, code_std=0.01),
    "fc7": Layer(2048, bias=1.0, code_std=0.01),
    "fc8": Layer(1000, bias=0.0, code_std=0.01),
}


def _net(*without: str, **outputs: int) -> MappingProxyType[str, Layer]:
    """Return all layers but some, with other ``outputs`` of a column."""
    return MappingProxyType(
        {
            name: replace(row, outputs=outputs.get(name, row.outputs))
            for name, row in _ROWS.items()
            if name not in without
        }
    )


LAYERS: Final = _net("conv6")  # the paper's
COLUMNS: Final = 2


def _four_layers(local3: int, fc_decay: float) -> MappingProxyType[str, Layer]:
    """Return a CIFAR-10 net of cuda-convnet's example files; fc10 has a unit for each class."""
    return MappingProxyType(
        {
            "conv1": Layer(64, bias=0.0, code_std=1e-4, kernel=5, padding=2, decay=0.0),
            "conv2": Layer(64, bias=0.0, code_std=0.01, kernel=5, padding=2, decay=0.0),
            "local3": Layer(local3, bias=0.0, code_std=0.04, kernel=3, padding=1),
            "local4": Layer(32, bias=0.0, code_std=0.04, kernel=3, padding=1),
            "fc10": Layer(10, bias=0.0, code_std=0.01, decay=fc_decay),
        }
    )


# The four-layer nets of section 3.3 by their norm; their files decay at .004, fc10 of the second
# at .01.  No file of figure 1's net was released; it is taken to be the first.
FOUR_LAYERS: Final = MappingProxyType(
    {
        "none": _four_layers(local3=32, fc_decay=1.0),  # layers-conv-local-13pct.cfg
        "response": _four_layers(local3=64, fc_decay=2.5),  # layers-cifar10-11pct.cfg
    }
)

# The paper's net and the variants it was compared with, by the layers of one column.
NETS: Final = MappingProxyType(
    {
        "two_columns": LAYERS,  # run 145
        "one_column": _net("conv6", conv5=256, fc6=4096, fc7=4096),  # run 145-half: one alone
        "no_crossing": _net("conv6", conv2=160, fc6=4096),  # run 150: wider, without crossings
        "conv6": _net(),  # run 146
        "drop_conv3": _net("conv3", "conv6"),  # section 7: without one of the middle layers
        "drop_conv4": _net("conv4", "conv6"),
    }
)

# The values of switches that the baselines without columns accept; the first is the default.
BASELINES: Final[Mapping[str, Mapping[str, tuple[Any, ...]]]] = MappingProxyType(
    {
        "four_layer": {
            "norm": ("response", "none"),
            "pool": ("overlapping",),
            "dropout": (0.0,),
            "conv4_dropout": (0.0,),
            "crossing_at": ((),),
        },
        "torchvision": {
            "norm": ("none",),
            "activation": ("relu",),
            "pool": ("overlapping",),
            "conv4_dropout": (0.0,),
            "crossing_at": ((),),
        },
    }
)
CROSSINGS: Final = ("conv3", "fc6", "fc7")  # the layers that read both columns; fc8 always does
OWN_CROSSINGS: Final = MappingProxyType(  # of the nets that exchange maps elsewhere
    {
        "no_crossing": (),  # run 150
        "conv6": ("conv3", "conv6", "fc6", "fc7"),  # run 146
        "drop_conv3": ("conv4", "fc6", "fc7"),  # what then reads pool 2
    }
)
PAPER_STD: Final = 0.01  # section 5: every layer

NUM_CLASSES: Final = 1000  # section 2
IMAGE_SIZE: Final = 224  # section 4.1: side of a crop in pixels
MIN_IMAGE_SIZE: Final = 64  # pixels; pool 5 still has one full window (from 52 on), as tested
MIN_IMAGE_SIZES: Final = MappingProxyType(
    {"four_layer": 6, "torchvision": 63}  # pool 2 has a full window; torchvision's documentation
)

NORM_SIZE: Final = 5  # section 3.3: n, neighbouring maps
NORM_ALPHA: Final = 1e-4  # section 3.3: alpha; the code divides it by n (run 145, cmrnorm)
NORM_BETA: Final = 0.75  # section 3.3
NORM_K: Final = 2.0  # section 3.3; run 145: minDiv
CAFFE_NORM_K: Final = 1.0  # caffe.proto, LRNParameter, which Caffe's AlexNets leave as it is
WITHIN_SIZE: Final = 5  # run 145, rnorm: side of the window in pixels
WITHIN_ALPHA: Final = 1e-3  # run 145, rnorm: divided by the window's 25 pixels
WITHIN_BETA: Final = 0.75  # run 145, rnorm
WITHIN_K: Final = 1.0  # run 145, rnorm
FOUR_LAYER_NORM_SIZE: Final = 9  # layers-cifar10-11pct.cfg, cmrnorm: neighbouring maps
FOUR_LAYER_NORM_ALPHA: Final = 1e-3  # the same: divided by the 9 maps
FOUR_LAYER_NORM_K: Final = 1.0  # the same: minDiv as cmrnorm has it by itself
DROPOUT: Final = 0.5  # section 4.2
TORCHVISION_STD: Final = (0.229, 0.224, 0.225)  # torchvision's models: of pixels 0-1, RGB

MOMENTUM: Final = 0.9  # section 5
WEIGHT_DECAY: Final = 5e-4  # section 5
RATE: Final = 0.01  # section 5: first learning rate of the weights
BIAS_RATIO: Final = 2.0  # the code: the biases' first rate is .02

COLOUR_NOISE: Final = 0.1  # section 4.1: standard deviation of the three draws
RATE_DIVISOR: Final = 10.0  # section 5
PLATEAU_DROPS: Final = 3  # section 5: the rate was divided three times

# Table 2: averaged nets, top-1 and top-5 error in % on the validation images of ILSVRC-2012, ten
# views.  "*": two of the seven had been trained on the Fall 2011 release.
AVERAGES: Final = (("5 CNNs", 38.1, 16.4), ("7 CNNs*", 36.7, 15.4))


Changes = Mapping[float, float]  # what multiplies a first value from an epoch on, counted from 0


@dataclass(frozen=True)
class PublishedSchedule:
    """Learning rates and colour noise over a published run of ``length`` epochs.

    Each mapping has what multiplies a first value from an epoch on, counted from 0; before its
    first epoch that is 1.  The first values are .01 for ``weights``, .02 for ``biases`` and .1 for
    ``noise`` (None: run 145's, in proportion).  ``own`` has the parameters that depart from
    these; its conv1 is a net's first layer, its fc8 the last.  0: the parameter does not change.
    """

    length: int
    weights: Changes = field(default_factory=dict[float, float])
    biases: Changes = field(default_factory=dict[float, float])
    own: Mapping[str, Changes] = field(default_factory=dict[str, Changes])
    noise: Changes | None = None

    @property
    def takes_bias_drop(self) -> bool:
        """Whether ``recipe.bias_drop`` fits: few drops, and biases that all fall together."""
        drops = [start for start in self.weights if start > 0]
        others = [name for name in self.own if name.endswith(".bias") and name != "conv1.bias"]
        return 0 < len(drops) < self.length - 1 and not others


def _tenths(*epochs: float) -> Changes:
    """Return a tenth of the rate at each of ``epochs``."""
    return {epoch: 10.0**-count for count, epoch in enumerate(epochs, 1)}


def _conv1(frozen: int, slow: int | None = None) -> Mapping[str, Changes]:
    """Return the rates of a conv1 that is frozen, and before that from ``slow`` on has 1e-5.

    Notes name epochs for the weights only.  The rates of the bias are from files: 0 where conv1
    is frozen, .002 in run 149, which stopped while conv1 was slow.
    """
    if slow is None:
        return {"conv1.weight": {frozen: 0.0}, "conv1.bias": {frozen: 0.0}}
    return {"conv1.weight": {slow: 1e-3, frozen: 0.0}, "conv1.bias": {slow: 0.1, frozen: 0.0}}


def _new(until: int, *layers: str) -> Mapping[str, Changes]:
    """Return ten times the rate of others for new ``layers`` up to an epoch.

    conv6's bias had .002 in both files.
    """
    weights: Changes = {0: 1.0, until: 0.1}
    return {"conv6.bias": {0: 0.1}, **{f"{layer}.weight": weights for layer in layers}}


# The later runs had rules of lr.cu over 95 epochs, which run 169's notes name ("80 epochs instead
# of 95").  Where no other end was logged it is taken to be that.  Differs: these rules apply to
# each step.  Here a rate changes at the first whole epoch at or after its change in the code.
_RULED: Final = 95


def _exp(factor: float, first: float = 1.0) -> Changes:
    """Return a rate that falls evenly to 1 / ``factor`` of its ``first`` (``exp``)."""
    return {epoch: first * factor ** (-epoch / _RULED) for epoch in range(_RULED)}


def _dexp(
    factor: float, steps: int, first: float = 1.0, length: int = _RULED
) -> dict[float, float]:
    """Return a rate that falls to 1 / ``factor`` of its ``first`` in equal steps (``dexp``)."""
    levels = [first * factor ** (-step / (steps - 1)) for step in range(steps)]
    return {length * step / steps: level for step, level in enumerate(levels)}


def _jdexp(factor: float, steps: int) -> Changes:
    """Return ``_dexp`` with jumps (``jdexp``).

    In the second half of a step, between .2 and .9 of the run, the rate is the geometric mean of
    this step and the one before.
    """
    changes = _dexp(factor, steps)
    for (_, before), (start, level) in pairwise(sorted(changes.items())):
        changes[start + _RULED / steps / 2] = (before * level) ** 0.5
    changes[0.9 * _RULED] = 1 / factor
    return dict(sorted(changes.items()))


_BIASES: Final = _dexp(10, 2)  # schedB of the runs since 165: .02, in the second half .002

SCHEDULES: Final = MappingProxyType(
    {
        # Section 5's rule is code, see ``training.schedule.Plateau``; about 90 epochs.
        "plateau": PublishedSchedule(90),
        "constant": PublishedSchedule(90),
        # -- by hand: the notes at the end of layer-params-N.cfg, whose epochs are finished ones.
        # They do not name the rates of the biases.  These are from the files, as they were left
        # at the end of a run.
        # Run 145's biases had .02 after its continuation; whether it was less before that, as in
        # its sibling of 2010, was not logged.
        "run145": PublishedSchedule(91, _tenths(25, 51, 79), {}, _conv1(72, slow=67), {67: 0.0}),
        # The same run, continued at 1e-3 with colour noise; conv1 stayed frozen.
        "run145_continued": PublishedSchedule(
            135,
            {**_tenths(25, 51, 79), 91: 0.1, 107: 0.01, 124: 0.001},
            own=_conv1(72, slow=67),
            noise={67: 0.0, 91: 1.0, 124: 0.0},
        ),
        # The biases had .002 at the end; when it fell was not logged: here with the last drop.
        "run145_2010": PublishedSchedule(
            93, _tenths(23, 51, 78), {78: 0.1}, _conv1(72, slow=68), {68: 0.0}
        ),
        # The third drop was not logged (the file ends at 1e-5): here that of run 145-2010.  The
        # biases of conv1 and conv2 had .002 at the end: here both from conv1's first drop on.
        # The notes freeze conv1, but in the file it has 1e-5 and .002: here it is frozen.
        "run145_half": PublishedSchedule(
            96,
            _tenths(20, 48, 78),
            own={**_conv1(72, slow=66), "conv2.bias": {66: 0.1}},
            noise={66: 0.0},
        ),
        # No slow conv1, and no note that the colour noise was ever turned off.  The biases had
        # .02 after the first drop and .002 at the end: here from the last drop on.
        "run147": PublishedSchedule(90, _tenths(23, 51, 79), {79: 0.1}, _conv1(79), {}),
        "run148": PublishedSchedule(97, _tenths(22, 44, 86), {}, _conv1(73, slow=69), {69: 0.0}),
        "run150": PublishedSchedule(92, _tenths(25, 49, 79), {}, _conv1(72, slow=66), {66: 0.0}),
        # Began with weights of run 146-2011 in all layers but fc8, which had 1e-3 for its first
        # 300 batches (a fraction of an epoch).  Biases had .02 at the end, conv6's .022; conv1's
        # is taken to be .02 until conv1 is frozen.
        "run146_2012": PublishedSchedule(
            54,
            {0: 0.1, 22: 0.01, 42: 0.001},
            own={
                "conv1.weight": {0: 0.01, 5: 0.001, 7: 0.0},
                "conv1.bias": {7: 0.0},
                "conv6.bias": {0: 1.1},
                "fc8.weight": {0: 1.0, 9: 0.1, 22: 0.01, 42: 0.001},
            },
            noise={38: 0.0},
        ),
        # Began with conv1 to conv5 of a backup of run 145, and was killed after 6.6 epochs.  The
        # new layers had .01 up to epoch 2.16.  No note that the colour noise was turned off.
        "run146_2009": PublishedSchedule(
            7, {0: 0.1}, own=_new(2, "conv6", "fc6", "fc7", "fc8"), noise={}
        ),
        # Began with the convolutions of run 146-2009, and was killed after 8.1 epochs.  No note of
        # the colour noise here either.
        "run146_2011": PublishedSchedule(8, {0: 0.1}, own=_new(6, "fc6", "fc7", "fc8"), noise={}),
        # -- by the rules of lr.cu.  One rule for weights and biases up to run 163.
        "run155": PublishedSchedule(95, _exp(4000, 2), _exp(4000, 2), _conv1(74), {61: 0.0}),
        "run156": PublishedSchedule(95, _exp(2000, 2), _exp(2000, 2), _conv1(72), {61: 0.0}),
        "run157": PublishedSchedule(95, _exp(8000, 4), _exp(8000, 4), _conv1(73), {62: 0.0}),
        "run158": PublishedSchedule(95, _exp(20000, 4), _exp(20000, 4), _conv1(77), {63: 0.0}),
        "run166": PublishedSchedule(95, _dexp(1000, 4), _BIASES, _conv1(73), {64: 0.0}),
        "run167": PublishedSchedule(95, _dexp(1000, 4), _BIASES, _conv1(73), {63: 0.0}),
        "run169": PublishedSchedule(95, _dexp(500, 4), _BIASES, _conv1(73), {60: 0.0}),
        "run170": PublishedSchedule(95, _dexp(250, 4), _BIASES, _conv1(74), {68: 0.0}),
        # Batches of 256 at twice the rates; killed after 84 epochs, which the figure is of.
        "run170_256": PublishedSchedule(
            84, _dexp(250, 4, 2), _dexp(10, 2, 2), _conv1(73), {61: 0.0}
        ),
        "run171": PublishedSchedule(95, _dexp(500, 5), _BIASES, _conv1(72), {60: 0.0}),
        "run174": PublishedSchedule(
            86, _jdexp(500, 4), _BIASES, _conv1(74), {62: 0.0}
        ),  # killed at 86
        "run177": PublishedSchedule(95, _dexp(250, 4), _BIASES, _conv1(73), {60: 0.0}),
        # cuda-convnet2's net for two GPUs, layers-imagenet-2gpu-model.cfg, with the command of its
        # wiki (MultiGPU): 90 epochs, always with colour noise, conv1 never frozen.
        "cuda_convnet2": PublishedSchedule(
            90, _dexp(250, 4, 2, length=90), _dexp(25, 2, 2, length=90), noise={}
        ),
        # -- other nets
        # Caffe's models/bvlc_alexnet/readme.md: a tenth each 100,000 of 360,000 iterations of 256
        # images, so each 20 of 72 epochs; biases at twice the rate (lr_mult), no colour noise.
        "caffe": PublishedSchedule(72, _tenths(20, 40, 60), _tenths(20, 40, 60), noise={}),
        # layer-params-cifar10-11pct.cfg: 350, 150, 10 and 10 epochs; the biases' rate stayed.
        "cifar": PublishedSchedule(520, weights={500: 0.1, 510: 0.01}),
        # torchvision's references/classification: lr-step-size 30
        "every_30": PublishedSchedule(90, weights={30: 0.1, 60: 0.01}),
    }
)
