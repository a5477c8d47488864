"""Print the exact top-1 and top-5 error of a checkpoint over all test images.

A list of checkpoints gives the errors of each net, and those of their average.

    modelpar-evaluate checkpoint=runs/first views=10
    modelpar-evaluate checkpoint=[runs/a,runs/b] out=average.json
    torchrun --standalone --nproc-per-node 2 -m modelpar.evaluate checkpoint=runs/first
"""

from functools import partial

from modelpar import command

main = partial(command.main, "evaluate", "training.evaluation:run", "training.evaluation:prepare")

if __name__ == "__main__":
    main()
