"""Tables as Markdown and as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comma_separated(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a CSV table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def mean_std(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation; nothing for no values."""
    if not values:
        return ""
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"
