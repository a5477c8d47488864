"""Train the two-column net: ``modelpar-train [key=value ...]`` starts its two processes.

Or ``torchrun --nproc-per-node 2 -m modelpar.train [key=value ...]``.
"""

from functools import partial

from modelpar import command

main = partial(command.main, "train", "training.trainer:train", "training.prepare:prepare")

if __name__ == "__main__":
    main()
