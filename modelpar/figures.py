"""Draw figures 1, 3 and 4 of trainings: ``python -m modelpar.figures checkpoint=RUN_DIR``.

``runs=[RUN,SWEEP,'runs/*']`` adds these runs to figure 3 and draws figure 1 of them.
"""

from functools import partial

from modelpar import command

main = partial(command.main, "figures", "studies.figures:figures")

if __name__ == "__main__":
    main()
