"""The benchmark as a command: its tables on the screen and in files."""

import json

from modelpar.bench.measure import markdown, measure
from modelpar.bench.reading import measure_reading, reading_table
from modelpar.files import write_texts
from modelpar.schemas import BenchmarkSettings


def benchmark(settings: BenchmarkSettings) -> None:
    """Print the tables; write them, the JSON and, with ``breakdown``, traces."""
    of_data = settings.what == "data"
    result = measure_reading(settings) if of_data else measure(settings)
    text = reading_table(result) if of_data else markdown(result)
    print(text)  # noqa: T201
    texts = {"benchmark.json": json.dumps(result, indent=1), "benchmark.md": text}
    write_texts(settings.out, texts)
    traces = ["trace/"] if settings.breakdown else []
    print(f"{settings.out}: {', '.join([*texts, *traces])}")  # noqa: T201
