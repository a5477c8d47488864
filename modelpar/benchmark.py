"""Time a training step by several means: ``python -m modelpar.benchmark [key=value ...]``."""

from functools import partial

from modelpar import command

main = partial(command.main, "benchmark", "bench.report:benchmark")

if __name__ == "__main__":
    main()
