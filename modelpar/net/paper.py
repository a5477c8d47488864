"""The numbers of the paper and of the code its authors ran in 2012, as one frozen table.

Paper: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", NIPS 2012; "section" and "table" refer to it.  Code: the authors' source as the
Computer History Museum released it; "run N" is the training its ``layer-params-N.cfg`` logs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
OWN_CROSSINGS: Final = MappingProxyType(  # of the nets whose columns meet elsewhere
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
BIAS_RATIO: Final = 2.0  # run 145: the biases' first rate is .02

COLOUR_NOISE: Final = 0.1  # section 4.1: standard deviation of the three draws
RATE_DIVISOR: Final = 10.0  # section 5
PLATEAU_DROPS: Final = 3  # section 5: the rate was divided three times


@dataclass(frozen=True)
class Timetable:
    """Learning rates and colour noise over a published run of ``length`` epochs.

    Each mapping has what multiplies the first rate from an epoch on, counted from 0; before its
    first epoch that is 1.  ``conv1`` replaces the factor of the first layer's weights, and where
    it is 0 the first layer's biases stay too.  ``noise_off`` is the epoch from which there is no
    colour noise; None: run 145's, in proportion.
    """

    length: int
    weights: Mapping[float, float] = field(default_factory=dict[float, float])
    biases: Mapping[float, float] = field(default_factory=dict[float, float])
    conv1: Mapping[float, float] = field(default_factory=dict[float, float])
    noise_off: int | None = None


SCHEDULES: Final = MappingProxyType(
    {
        # Section 5's rule is code, see ``training.schedule.Plateau``; about 90 epochs.
        "plateau": Timetable(90),
        "constant": Timetable(90),
        # The biases' rate stayed at 0.02 throughout.  In the last files of runs 145, 166, 167 and
        # 170 conv1's rates are both 0; their notes name the epoch for the weights only.
        "run145": Timetable(
            91,
            weights={25: 0.1, 51: 0.01, 79: 0.001},
            conv1={67: 0.001, 72: 0.0},
            noise_off=67,
        ),
        # ``dexp`` of lr.cu: to 1/250 of the first rate in equal steps, the biases to 1/10.
        "run170": Timetable(
            95,
            weights={95 * step / 4: 250 ** (-step / 3) for step in range(4)},
            biases={95 / 2: 0.1},
            conv1={74: 0.0},
            noise_off=68,
        ),
        # Runs 166 and 167 go to 1/1000.  Run 166's noise was turned off at 64.  The length of run
        # 167 was not logged; it is taken to be run 170's.
        "run167": Timetable(
            95,
            weights={95 * step / 4: 1000 ** (-step / 3) for step in range(4)},
            biases={95 / 2: 0.1},
            conv1={73: 0.0},
            noise_off=63,
        ),
        # layer-params-cifar10-11pct.cfg: 350, 150, 10 and 10 epochs; the biases' rate stayed.
        "cifar": Timetable(520, weights={500: 0.1, 510: 0.01}),
        # torchvision's references/classification: lr-step-size 30
        "every_30": Timetable(90, weights={30: 0.1, 60: 0.01}),
    }
)
