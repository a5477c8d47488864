"""AlexNet as it ran in 2012, split over two devices, in today's PyTorch."""

import gc

# Importing torch creates hundreds of thousands of objects, and all of them stay.  Python's garbage
# collector would search them again and again, which takes a second, so it pauses.
collects = gc.isenabled()
gc.disable()

from modelpar.net.alexnet import AlexNet, Column  # noqa: E402
from modelpar.net.exchange import Link  # noqa: E402
from modelpar.net.plan import Plan, Recipe  # noqa: E402
from modelpar.net.weights import merge, split  # noqa: E402

if collects:
    gc.enable()
del collects

__all__ = ["AlexNet", "Column", "Link", "Plan", "Recipe", "merge", "split"]
__version__ = "0.1.0"
