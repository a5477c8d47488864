"""AlexNet as it ran in 2012, split over two devices, in today's PyTorch."""

import gc
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelpar.net.alexnet import AlexNet, Column
    from modelpar.net.exchange import Link
    from modelpar.net.plan import Plan, Recipe
    from modelpar.net.weights import merge, split

__all__ = ["AlexNet", "Column", "Link", "Plan", "Recipe", "merge", "split"]
__version__ = "0.1.0"

PLACES = {
    "AlexNet": "net.alexnet",
    "Column": "net.alexnet",
    "Link": "net.exchange",
    "Plan": "net.plan",
    "Recipe": "net.plan",
    "merge": "net.weights",
    "split": "net.weights",
}


def load(function: str) -> Any:
    """Import and return MODULE:NAME of this package.

    Importing torch creates hundreds of thousands of objects, and all of them stay.  Python's
    garbage collector would search them again and again, which takes a second, so it pauses.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return pkgutil.resolve_name(f"modelpar.{function}")
    finally:
        if collects:
            gc.enable()


def __getattr__(name: str) -> Any:
    """Import what the package exports when it is used: a command starts before torch is loaded."""
    if name not in PLACES:
        raise AttributeError(f"module 'modelpar' has no attribute {name!r}")
    return load(f"{PLACES[name]}:{name}")
