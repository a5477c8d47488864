"""The results of a benchmark as tables in Markdown."""

from typing import Any, Final

from modelpar import tables

RATIOS: Final = ("plain float32", "plain", "ddp", "full rate")
HEAD: Final = (
    "contender", "precision", "link", "step, s", "images/s", *(f"/ {base}" for base in RATIOS),
    "share of peak", "memory, MB", "sent, MB", "first step, s",
)  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of ``benchmark.json``."""
    machine, settings = result["machine"], result["settings"]
    where = ", ".join([*machine["gpus"], f"{machine['processor']}, {machine['cores']} cores"])
    about = (
        f"{where}; torch {machine['torch']}, Python {machine['python']}; "
        f"{settings['image_size']} pixels, {settings['num_classes']} classes, "
        f"recipe {settings['recipe']['name']}; median over {settings['rounds']} rounds of "
        f"{settings['steps']} steps (fastest-slowest round). Columns with a slash: speed relative "
        "to that contender, or to the same one at the full rate of the link. Memory is the peak "
        "of a process, sent what a process sends per step."
    )
    blocks = [about]
    for peaks in result["peaks"]:
        rows = [row for row in result["rows"] if row["batch_size"] == peaks["batch_size"]]
        blocks += [f"Batch {peaks['batch_size']}", tables.markdown(HEAD, map(_cells, rows))]
        found = [f"{value:.0f} in {key}" for key, value in peaks.items() if key != "batch_size"]
        blocks.append(f"Peak of matrix products, GFLOP/s of all processes: {', '.join(found)}.")
    texts = {row["contender"]: row["what"] for row in result["rows"]}
    blocks.append("\n".join(f"- {name}: {text}" for name, text in texts.items()))
    return "\n\n".join(blocks)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["contender"],
        row["precision"],
        "" if row["link_mbit"] is None else f"{row['link_mbit']:g} Mbit/s",
        _spread(row["step_s"]),
        f"{row['images_per_s']['median']:.1f}",
        *(_spread(row["ratios"][base]) if base in row["ratios"] else "" for base in RATIOS),
        f"{row['share_of_peak']:.0%}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['wire_bytes'] / 1e6:.1f}",
        f"{row['first_step_s']:.0f}",
    ]


def _spread(value: dict[str, float]) -> str:
    low, median, high = (f"{value[key]:.2f}" for key in ("low", "median", "high"))
    return median if low == high else f"{median} ({low}-{high})"
