"""What was measured: a table in Markdown, JSON, a picture."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelpar.bench.anatomy import PLACES
from modelpar.bench.steps import CONTENDERS
from modelpar.settings import BenchmarkSettings

HEAD = (
    "contender", "precision", "step, s", "images/s", "/ plain float32", "/ plain", "/ ddp",
    "of peak", "memory, MB", "sent, MB", "crossings, ms", "alone, ms", "hidden", "start, s",
)  # fmt: skip
LINK_HEAD = ("link", "contender", "precision", "step, s", "images/s", "/ full rate", "/ ddp")


def show(result: dict[str, Any], settings: BenchmarkSettings) -> None:
    """Print the tables; write them, the JSON and, where matplotlib is installed, the picture."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    text = tables(result)
    print(text)  # noqa: T201
    (out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "benchmark.md").write_text(text + "\n")
    if find_spec("matplotlib"):
        from modelpar.bench import picture  # noqa: PLC0415 - of the extra plots

        picture.draw(result, out / "benchmark.png")
        print(f"{out}: benchmark.json, benchmark.md, benchmark.png")  # noqa: T201
    else:
        print(f"{out}: benchmark.json, benchmark.md; pip install modelpar[plots] draws it")  # noqa: T201


def tables(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    machine, settings = result["machine"], result["settings"]
    where = ", ".join([*machine["gpus"], f"{machine['processor']}, {machine['cores']} cores"])
    how = (
        f"{where}; torch {machine['torch']}, Python {machine['python']}; "
        f"{settings['image_size']} pixels, {settings['num_classes']} classes, "
        f"recipe {settings['recipe']['name']}; median over {settings['rounds']} rounds of "
        f"{settings['steps']} steps (lowest-highest round)"
    )
    blocks = [how]
    for peaks in result["peaks"]:
        size = peaks["batch_size"]
        rows = [row for row in result["rows"] if row["batch_size"] == size]
        full = [row for row in rows if row["link_mbit"] is None]
        slow = [row for row in rows if row["link_mbit"] is not None]
        blocks += [f"Batch {size}", _table(HEAD, [_cells(row) for row in full])]
        blocks.append(_peaks(peaks))
        if slow:
            blocks.append(_table(LINK_HEAD, [_link_cells(row) for row in slow]))
        if any("layers" in row for row in full):
            blocks.append(_layers(full))
    used = dict.fromkeys(row["contender"] for row in result["rows"])
    blocks.append("\n".join(f"- {name}: {CONTENDERS[name].text}" for name in used))
    return "\n\n".join(blocks)


def _peaks(peaks: dict[str, Any]) -> str:
    parts = [
        f"{precision} {found['matrix']:.0f} in a matrix product, {found['convolution']:.0f} in a "
        "1 x 1 convolution"
        for precision, found in peaks.items()
        if precision != "batch_size"
    ]
    return f"Peak, GFLOP/s of all processes at once: {'; '.join(parts)}. The larger counts."


def _cells(row: dict[str, Any]) -> list[str]:
    crossed = bool(row["counted_bytes"])
    return [
        row["contender"],
        row["precision"],
        _with_spread(row["step_s"], 2),
        f"{row['images_per_s']['median']:.1f}",
        *(_with_spread(row["ratios"].get(base), 2) for base in ("plain float32", "plain", "ddp")),
        f"{row['share_of_peak']:.0%}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['wire_bytes'] / 1e6:.1f}",
        f"{row['crossing_s'] * 1e3:.0f}" if crossed else "",
        f"{row['swaps_alone_s'] * 1e3:.0f}" if crossed else "",
        f"{row['hidden']:.0%}" if crossed else "",
        f"{row['first_step_s']:.0f}",
    ]


def _link_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['link_mbit']:g} Mbit/s",
        row["contender"],
        row["precision"],
        _with_spread(row["step_s"], 2),
        f"{row['images_per_s']['median']:.1f}",
        _with_spread(row["ratios"].get("full rate"), 2),
        _with_spread(row["ratios"].get("ddp"), 2),
    ]


def _layers(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [
            row["contender"],
            row["precision"],
            *(f"{row['layers'][place] * 1e3:.0f}" for place in PLACES),
        ]
        for row in rows
        if "layers" in row
    ]
    table = _table(("ms of process 0", "precision", *PLACES), cells)
    return f"{table}\n\n(one step under the profiler, whose own cost it shows too)"


def _with_spread(spread: dict[str, float] | None, digits: int) -> str:
    if spread is None:
        return ""
    low, median, high = (f"{spread[key]:.{digits}f}" for key in ("low", "median", "high"))
    return median if low == high else f"{median} ({low}-{high})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
