"""Compare runs: mean and standard deviation over seeds, and the difference to the control.

modelpar-compare runs=[runs/lrn]
modelpar-compare runs=[runs/a,runs/b,'multirun/*/*']
modelpar-compare runs=[average.json]
"""

from functools import partial

from modelpar import command

main = partial(command.main, "compare", "studies.page:compare")

if __name__ == "__main__":
    main()
