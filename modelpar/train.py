"""Train the two-column net: ``modelpar-train [key=value ...]`` starts its two processes.

Or ``torchrun --nproc-per-node 2 -m modelpar.train [key=value ...]``.
"""

from typing import NoReturn

from modelpar import launch
from modelpar.training.prepare import prepare
from modelpar.training.trainer import train


def main() -> NoReturn:
    """Run as the launcher or, under torchrun, as a rank."""
    launch.main(launch.Command("train", prepare, train))


if __name__ == "__main__":
    main()
