"""A recipe and a plan: everything that fixes a net's shape and arithmetic."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from modelpar import config
from modelpar.checks import check
from modelpar.errors import SettingsError, refuse_choice
from modelpar.groups import ModelSettings, RecipeSettings
from modelpar.net import paper


@dataclass
class Recipe(RecipeSettings):
    """The training rules, checked; see ``RecipeSettings`` for the switches.

    The baselines have their own ``weight_std`` to ``norms`` and ``conv1_padding``.
    """

    def __post_init__(self) -> None:
        check(self, "recipe.")
        if self.bias_drop is not None and self.rates == "equal":
            raise SettingsError(
                f"recipe.bias_drop={self.bias_drop}: requires recipe.rates=double_bias"
            )
        if self.bias_drop is not None and not paper.SCHEDULES[self.schedule].takes_bias_drop:
            raise SettingsError(
                f"recipe.bias_drop={self.bias_drop}: recipe.schedule={self.schedule} has no fixed "
                "drops, or its biases do not fall together; use another schedule"
            )

    @classmethod
    def named(cls, recipe: "str | Recipe") -> "Recipe":
        """Return that of ``conf/recipe``, or a recipe itself.  Raises SettingsError."""
        if isinstance(recipe, Recipe):
            return recipe
        return cls(**config.load_group("recipe", recipe))

    @property
    def alpha(self) -> float:
        """Alpha as torch counts it, over the whole window: 5e-4 (paper) or 1e-4 (code)."""
        return paper.NORM_ALPHA * (paper.NORM_SIZE if self.norm_alpha == "per_term" else 1)


@dataclass(frozen=True)
class Plan:
    """Everything that fixes a net's shape and arithmetic: a recipe, the data's sizes, switches.

    ``image_size``: the side of a crop in pixels.  ``crossing_at``: the layers that read both
    columns; fc8 always sums both.  ``net``: one of ``paper.NETS``, or of ``paper.BASELINES``,
    which do not take every switch.  ``pool``: ``overlapping`` is 3 x 3 with stride 2 (section
    3.4), ``non_overlapping`` 2 x 2 with stride 2 (run 147), ``average`` the mean over 3 x 3 with
    stride 2.  ``norm``: ``response`` is the recipe's, ``first_only`` has none after conv2 (run
    167), ``within_channel`` normalizes inside each map, ``batch`` has no scale and shift.
    ``dropout``: the share of fc6's and fc7's units that is dropped, ``conv4_dropout``: that of
    conv4's units (run 177).
    """

    recipe: Recipe
    num_classes: int = paper.NUM_CLASSES
    image_size: int = paper.IMAGE_SIZE
    net: str = "two_columns"
    norm: str = "response"
    activation: str = "relu"
    pool: str = "overlapping"
    dropout: float = paper.DROPOUT
    conv4_dropout: float = 0.0
    crossing_at: tuple[str, ...] = paper.CROSSINGS

    def __post_init__(self) -> None:
        switches = {entry.name: getattr(self, entry.name) for entry in fields(ModelSettings)}
        check(ModelSettings(**switches), "model.")
        least = paper.MIN_IMAGE_SIZES.get(self.net, paper.MIN_IMAGE_SIZE)
        if self.image_size < least:
            raise SettingsError(f"model.image_size={self.image_size}: use {least} pixels or more")
        for key, choices in paper.BASELINES.get(self.net, {}).items():
            if switches[key] not in choices:
                value, *taken = (_as_typed(choice) for choice in (switches[key], *choices))
                raise SettingsError(
                    f"model.{key}={value}: model.net={self.net} takes only {' or '.join(taken)}; "
                    f"leave model.{key} out"
                )
        if self.net in paper.BASELINES:
            return
        if self.conv4_dropout and "conv4" not in self.layers:
            raise SettingsError(
                f"model.conv4_dropout={self.conv4_dropout}: model.net={self.net} has no conv4; "
                "use null"
            )
        crossable = [name for name in self.layers if name not in {"conv1", "fc8"}]
        for name in self.crossing_at:
            if name not in crossable:
                refuse_choice("model.crossing_at", name, crossable)

    @property
    def layers(self) -> Mapping[str, paper.Layer]:
        """The net's layers in order, as one column holds them; torchvision's are not listed."""
        if self.net == "four_layer":
            return paper.FOUR_LAYERS[self.norm]
        return paper.NETS.get(self.net, {})

    @property
    def columns(self) -> int:
        """How many columns the whole net has."""
        return 1 if self.net in {"one_column", *paper.BASELINES} else paper.COLUMNS

    @property
    def decays(self) -> dict[str, float]:
        """What multiplies the recipe's weight decay in each layer."""
        return {name: row.decay for name, row in self.layers.items()}

    @property
    def norm_inputs(self) -> dict[str, str]:
        """What the normalization after a convolution reads, see ``recipe.norm1_input``."""
        return {"conv1": self.recipe.norm1_input, "conv2": self.recipe.norm2_input}

    @property
    def by_image(self) -> bool:
        """Whether conv1 to conv5 treat each image independently, so that a batch can be cut."""
        return self.norm != "batch" and self.conv4_dropout == 0

    @property
    def middle(self) -> tuple[str, ...]:
        """The layers between conv2 and conv5, which neither normalize nor pool."""
        return tuple(name for name in ("conv3", "conv4") if name in self.layers)

    def std(self, layer: str) -> float:
        """Return the standard deviation of ``layer``'s initial weights."""
        code = self.net == "four_layer" or self.recipe.weight_std == "wider_conv3_5"
        return self.layers[layer].code_std if code else paper.PAPER_STD

    @property
    def conv1_padding(self) -> tuple[int, int, int, int]:
        """Zero columns left and right, zero rows above and below the image."""
        if self.recipe.conv1_padding == "around":
            return (2, 2, 2, 2)  # torchvision's AlexNet
        row = paper.LAYERS["conv1"]  # the code rounds the output's side up: 224 -> 55 (layer.py)
        missing = -(self.image_size - row.kernel) % row.stride
        return (0, missing, 0, missing)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The sides of the maps of pools 1, 2 and 5 in pixels: 27, 13, 6 at 224."""
        left, right, _, _ = self.conv1_padding
        row = paper.LAYERS["conv1"]
        one = self.pooled((self.image_size + left + right - row.kernel) // row.stride + 1)
        less = 2 if self.pool == "non_overlapping" else 0  # of the maps of conv2 and of conv5
        two = self.pooled(one - less)
        return one, two, self.pooled(two - less)

    def pooled(self, size: int) -> int:
        """Return the side of a map of side ``size`` after pooling, rounded up as the code did."""
        window = 2 if self.pool == "non_overlapping" else 3
        return -(-(size - window) // 2) + 1

    def padding(self, layer: str) -> int:
        """Return a convolution's zero padding; run 147 took one off conv2 and conv5."""
        less = self.pool == "non_overlapping" and layer in {"conv2", "conv5"}
        return self.layers[layer].padding - less

    def inputs(self, layer: str) -> int:
        """Return how many maps or units of one column ``layer`` reads (conv1: the image's 3)."""
        if layer == "conv1":
            return 3
        names = list(self.layers)
        previous = self.layers[names[names.index(layer) - 1]].outputs
        return previous * (self.sizes[-1] ** 2 if layer == "fc6" else 1)


def _as_typed(value: object) -> str:
    """Return a switch's value as a command line has it."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values, as manifests and exported files record it."""
    return {**asdict(plan), "crossing_at": list(plan.crossing_at)}


def plan_of(values: dict[str, Any]) -> Plan:
    """Return the plan of values from ``settings_of``; raises SettingsError if they are not one."""
    values = dict(values)
    try:
        values["recipe"] = Recipe(**values["recipe"])
        values["crossing_at"] = tuple(values["crossing_at"])
        return Plan(**values)
    except (KeyError, TypeError) as error:
        raise SettingsError(f"not a description of a net: {error}") from None


def plan_for(
    recipe: RecipeSettings, model: ModelSettings, num_classes: int, image_size: int
) -> Plan:
    """Return the net that recipe, switches and data ask for; raises SettingsError."""
    net = model.net or ""
    chosen: dict[str, Any] = {"crossing_at": paper.OWN_CROSSINGS.get(net, paper.CROSSINGS)}
    chosen |= {key: choices[0] for key, choices in paper.BASELINES.get(net, {}).items()}
    chosen |= {key: value for key, value in vars(model).items() if value is not None}
    chosen |= {"num_classes": num_classes, "image_size": image_size}
    chosen["crossing_at"] = tuple(chosen["crossing_at"])
    return Plan(Recipe(**asdict(recipe)), **chosen)
