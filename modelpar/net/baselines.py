"""The nets to compare with: the one-column control of run 145-half."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from modelpar.mesh import generator
from modelpar.net import paper
from modelpar.net.alexnet import Blocks, plan_from
from modelpar.net.paper import LAYERS, Plan, Recipe

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from modelpar.net.layers import Draw

CONV5: Final = 256  # run 145-half: as many as both columns of the pair have
UNITS: Final = 4096  # run 145-half: fc6 and fc7 likewise


class OneColumn(nn.Module):
    """The control of section 3.2: one column's conv1-conv4, with the pair's conv5, fc6 and fc7.

    Half the kernels would not be half the net: nearly all parameters are in fc6, so the control
    keeps the pair's width from conv5 on, 59,798,312 parameters in all (run 145-half).
    """

    def __init__(self, plan: Plan, seed: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.conv1 = _conv("conv1", 3, plan)
        self.conv2 = _conv("conv2", LAYERS["conv1"].outputs, plan)
        self.conv3 = _conv("conv3", LAYERS["conv2"].outputs, plan)
        self.conv4 = _conv("conv4", LAYERS["conv3"].outputs, plan)
        self.conv5 = _conv("conv5", LAYERS["conv4"].outputs, plan, CONV5)
        self.fc6 = nn.Linear(CONV5 * plan.last_size**2, UNITS)
        self.fc7 = nn.Linear(UNITS, UNITS)
        self.fc8 = nn.Linear(UNITS, plan.num_classes)
        self.blocks = Blocks(plan, slice(0, UNITS))
        with torch.no_grad():
            for name, row in LAYERS.items():
                layer: Any = self.get_submodule(name)
                source = None if seed is None else generator(seed, "init", name)
                drawn = torch.empty(layer.weight.shape, device="cpu")
                layer.weight.copy_(drawn.normal_(0, plan.recipe.std(name), generator=source))
                layer.bias.fill_(row.bias)

    @classmethod
    def from_recipe(
        cls,
        recipe: str | Recipe,
        num_classes: int = paper.NUM_CLASSES,
        image_size: int = paper.IMAGE_SIZE,
        *,
        seed: int | None = None,
        **switches: Any,
    ) -> Self:
        """Return the control with the rules of a recipe; raises SettingsError."""
        return cls(plan_from(recipe, num_classes, image_size, switches), seed)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of ``images`` (N, 3, S, S)."""
        blocks = self.blocks
        x = blocks.after_conv1(
            self.conv1(blocks.pad(images, self.conv1.weight))
        )  # (N, 48, 27, 27)
        x = blocks.after_conv2(self.conv2(x))  # (N, 128, 13, 13)
        x = blocks.activate(self.conv3(x))  # (N, 192, 13, 13)
        x = blocks.activate(self.conv4(x))  # (N, 192, 13, 13)
        x = blocks.after_conv5(self.conv5(x))  # (N, 9216)
        x = blocks.after_fc6(self.fc6(x))  # (N, 4096)
        x = blocks.after_fc7(self.fc7(x))  # (N, 4096)
        return self.fc8(x)

    def fix_dropout(self, draw: Draw | None) -> None:
        """Make the next forward's masks a function of ``draw``; None: torch's generator."""
        self.blocks.fix_dropout(draw)


def _conv(name: str, inputs: int, plan: Plan, outputs: int | None = None) -> nn.Conv2d:
    row = LAYERS[name]
    kernels = outputs or row.outputs
    return nn.Conv2d(inputs, kernels, row.kernel, stride=row.stride, padding=plan.padding(name))
