"""Compare runs: ``python -m modelpar.compare runs=[RUN,SWEEP,'runs/*',AVERAGE.json]``."""

from functools import partial

from modelpar import command

main = partial(command.main, "compare", "studies.page:compare")

if __name__ == "__main__":
    main()
