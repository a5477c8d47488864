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


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for a terminal: numbers on the right, words on the left of their column."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = [column[1][:1].isalpha() for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if left else f"{cell:>{width}}"
            for cell, width, left in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in lines
    )


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
