"""How fast it is: ``python -m modelpar.benchmark [key=value ...]``.

Runs one training step of the same net and batch by each means, in turn, and prints the table.
"""

from typing import NoReturn

from modelpar import launch
from modelpar.bench import measure, report
from modelpar.settings import BenchmarkSettings


def benchmark(settings: BenchmarkSettings) -> None:
    """Measure; write and show what was found."""
    report.show(measure.measure(settings), settings)


def main() -> NoReturn:
    """Run in this process, which starts those of the contenders."""
    launch.enter_alone("benchmark", benchmark)


if __name__ == "__main__":
    main()
