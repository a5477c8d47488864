"""Draw figures 1, 3 and 4 of the paper from trainings.

``runs`` adds runs to figure 3, and draws figure 1 of them.

    modelpar-figures checkpoint=runs/first
    modelpar-figures runs=[runs/relu,runs/tanh,'multirun/*/*']
"""

from functools import partial

from modelpar import command

main = partial(command.main, "figures", "studies.figures:figures")

if __name__ == "__main__":
    main()
