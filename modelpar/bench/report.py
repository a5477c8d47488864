"""The results of a benchmark as tables in Markdown."""

from typing import Any, Final

from modelpar import tables

HEAD: Final = (
    "contender", "precision", "step, s", "images/s", "/ plain float32", "/ plain", "/ ddp",
    "share of peak", "memory, MB", "sent, MB", "first step, s",
)  # fmt: skip
LINK_HEAD: Final = (
    "link",
    "contender",
    "precision",
    "step, s",
    "images/s",
    "/ full rate",
    "/ ddp",
)


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of ``benchmark.json``."""
    machine, settings = result["machine"], result["settings"]
    where = ", ".join([*machine["gpus"], f"{machine['processor']}, {machine['cores']} cores"])
    about = (
        f"{where}; torch {machine['torch']}, Python {machine['python']}; "
        f"{settings['image_size']} pixels, {settings['num_classes']} classes, "
        f"recipe {settings['recipe']['name']}; median over {settings['rounds']} rounds of "
        f"{settings['steps']} steps (fastest-slowest round). Memory is the peak of a process, "
        "sent what a process sends per step."
    )
    blocks = [about]
    for peaks in result["peaks"]:
        rows = [row for row in result["rows"] if row["batch_size"] == peaks["batch_size"]]
        limited = [row for row in rows if row["link_mbit"] is not None]
        full = [row for row in rows if row["link_mbit"] is None]
        blocks += [f"Batch {peaks['batch_size']}", tables.markdown(HEAD, map(_cells, full))]
        found = [f"{value:.0f} in {key}" for key, value in peaks.items() if key != "batch_size"]
        blocks.append(f"Peak of matrix products, GFLOP/s of all processes: {', '.join(found)}.")
        if limited:
            blocks.append(tables.markdown(LINK_HEAD, map(_link_cells, limited)))
    texts = {row["contender"]: row["what"] for row in result["rows"]}
    blocks.append("\n".join(f"- {name}: {text}" for name, text in texts.items()))
    return "\n\n".join(blocks)


def _cells(row: dict[str, Any]) -> list[str]:
    ratios = [_spread(row["ratios"].get(base)) for base in ("plain float32", "plain", "ddp")]
    return [
        row["contender"],
        row["precision"],
        _spread(row["step_s"]),
        f"{row['images_per_s']['median']:.1f}",
        *ratios,
        f"{row['share_of_peak']:.0%}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['wire_bytes'] / 1e6:.1f}",
        f"{row['first_step_s']:.0f}",
    ]


def _link_cells(row: dict[str, Any]) -> list[str]:
    ratios = [_spread(row["ratios"].get(base)) for base in ("full rate", "ddp")]
    return [f"{row['link_mbit']:g} Mbit/s", *_cells(row)[:4], *ratios]


def _spread(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    low, median, high = (f"{value[key]:.2f}" for key in ("low", "median", "high"))
    return median if low == high else f"{median} ({low}-{high})"
