"""AlexNet as it ran in 2012, split over two devices, in today's PyTorch."""

from modelpar.net.alexnet import AlexNet, Column
from modelpar.net.exchange import Link
from modelpar.net.plan import Plan, Recipe
from modelpar.net.weights import merge, split

__all__ = ["AlexNet", "Column", "Link", "Plan", "Recipe", "merge", "split"]
__version__ = "0.1.0"
