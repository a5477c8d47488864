"""Time a training step by several means: ``python -m modelpar.benchmark [key=value ...]``."""

import json
from functools import partial

from modelpar import launch
from modelpar.bench.measure import markdown, measure
from modelpar.files import write_texts
from modelpar.settings import BenchmarkSettings


def benchmark(settings: BenchmarkSettings) -> None:
    """Print the tables; write them, the JSON and, with ``breakdown``, traces."""
    result = measure(settings)
    text = markdown(result)
    print(text)  # noqa: T201
    texts = {"benchmark.json": json.dumps(result, indent=1), "benchmark.md": text}
    write_texts(settings.out, texts)
    traces = ["trace/"] if settings.breakdown else []
    print(f"{settings.out}: {', '.join([*texts, *traces])}")  # noqa: T201


main = partial(launch.main_single, "benchmark", benchmark)

if __name__ == "__main__":
    main()
