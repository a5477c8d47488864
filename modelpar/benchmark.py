"""Time a training step of several implementations, or how fast images are read.

modelpar-benchmark
modelpar-benchmark contenders=[plain,pair] precisions=[float32] batch_sizes=[64]
modelpar-benchmark what=data
"""

from functools import partial

from modelpar import command

main = partial(command.main, "benchmark", "bench.report:benchmark")

if __name__ == "__main__":
    main()
