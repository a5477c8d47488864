"""Time a training step by several means: ``python -m modelpar.benchmark [key=value ...]``."""

import json
from pathlib import Path
from typing import NoReturn

from modelpar import launch
from modelpar.bench.measure import markdown, measure
from modelpar.settings import BenchmarkSettings


def benchmark(settings: BenchmarkSettings) -> None:
    """Print the tables; write them, the JSON and, with ``breakdown``, traces."""
    result, out = measure(settings), Path(settings.out)
    text = markdown(result)
    print(text)  # noqa: T201
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "benchmark.md").write_text(text + "\n")
    traces = ", trace/" if settings.breakdown else ""
    print(f"{out}: benchmark.json, benchmark.md{traces}")  # noqa: T201


def main() -> NoReturn:
    """Run in this process, which starts those of the contenders."""
    launch.main_single("benchmark", benchmark)


if __name__ == "__main__":
    main()
