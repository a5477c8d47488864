"""Exact top-1 and top-5 error of a checkpoint: ``modelpar-evaluate checkpoint=RUN_DIR``.

With two processes or one, under torchrun or not, with one view or the paper's ten.  A list of
checkpoints gives the errors of each, and of their average.
"""

from functools import partial

from modelpar import command

main = partial(command.main, "evaluate", "training.evaluation:run", "training.evaluation:prepare")

if __name__ == "__main__":
    main()
