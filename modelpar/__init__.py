"""AlexNet as it ran in 2012, split over two devices, in today's PyTorch."""

from modelpar.net.alexnet import AlexNet, Column, merge, split
from modelpar.net.crossing import Link
from modelpar.net.paper import Plan, Recipe

__all__ = ["AlexNet", "Column", "Link", "Plan", "Recipe", "merge", "split"]
__version__ = "0.1.0"
