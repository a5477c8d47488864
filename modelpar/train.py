"""Train the two-column net: ``modelpar-train [key=value ...]`` starts its two processes.

Or ``torchrun --nproc-per-node 2 -m modelpar.train [key=value ...]``.
"""

from functools import partial

from modelpar import launch
from modelpar.training.prepare import prepare
from modelpar.training.trainer import train

main = partial(launch.main, "train", prepare, train)

if __name__ == "__main__":
    main()
