"""The benchmark as a command: its tables on the screen and in files."""

import json
from typing import Any, Final

from modelpar import tables
from modelpar.bench.measure import GPU_RATIOS, RATIOS, measure
from modelpar.bench.reading import FORMATS, READERS, measure_reading
from modelpar.files import write_texts
from modelpar.schemas import BenchmarkSettings

TRAINED: Final = 90 * 1_281_167  # images: section 5's 90 cycles, ILSVRC 2012's training images
# What the tables mean, after the speeds relative to a contender.
ON_CPU: Final = (
    ", or to the same one at the full rate of the link. Memory is the peak "
    "of a process, sent what a process sends per step."
)
ON_GPU: Final = (
    ". The floor is the time of a step whose kernels compute at the peak of matrix products or "
    "move their bytes as fast as a copy, whichever takes longer. Launches by the processor and "
    "kernels are those of a step of its last batch. 90 epochs are ImageNet's, which took "
    "the paper's two GPUs five to six days. A column's images are those of the pair. Memory is "
    "the peak of what a process allocates on its GPU."
)


def benchmark(settings: BenchmarkSettings) -> None:
    """Print the tables; write them, the JSON and, with ``breakdown``, traces."""
    of_data = settings.what == "data"
    result = measure_reading(settings) if of_data else measure(settings)
    text = reading_table(result) if of_data else markdown(result)
    print(text)  # noqa: T201
    texts = {"benchmark.json": json.dumps(result, indent=1), "benchmark.md": text}
    write_texts(settings.out, texts)
    traces = ["trace/"] if settings.breakdown and not of_data else []
    print(f"{settings.out}: {', '.join([*texts, *traces])}")  # noqa: T201


# -- tables ---------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of ``benchmark.json``."""
    machine, settings = result["machine"], result["settings"]
    where = ", ".join([*machine["gpus"], f"{machine['processor']}, {machine['cores']} cores"])
    on_gpu = any("copy" in peaks for peaks in result["peaks"])
    about = (
        f"{where}; torch {machine['torch']}, Python {machine['python']}; "
        f"{settings['image_size']} pixels, {settings['num_classes']} classes, "
        f"recipe {settings['recipe']['name']}; median over {settings['rounds']} rounds of "
        f"{settings['steps']} steps (fastest-slowest round). Columns with a slash: speed relative "
        "to that contender"
    )
    blocks = [about + (ON_GPU if on_gpu else ON_CPU)]
    for peaks in result["peaks"]:
        rows = [row for row in result["rows"] if row["batch_size"] == peaks["batch_size"]]
        if not rows:
            continue
        cells = [(_gpu_cells if on_gpu else _cells)(row) for row in rows]
        table = tables.markdown(list(cells[0]), (list(row.values()) for row in cells))
        others = {"batch_size", "copy"}
        found = ", ".join(f"{peaks[one]:.0f} in {one}" for one in peaks if one not in others)
        peak = f"Peak of matrix products, GFLOP/s of all processes: {found}."
        if on_gpu:
            copies = f"copies, GB/s: {peaks['copy']:.0f}"
            peak = f"Peak of matrix products of a GPU, GFLOP/s: {found}; {copies}."
        blocks += [f"Batch {peaks['batch_size']}", table, peak]
    texts = {row["contender"]: row["what"] for row in result["rows"]}
    blocks.append("\n".join(f"- {name}: {text}" for name, text in texts.items()))
    return "\n\n".join(blocks)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "contender": row["contender"],
        "precision": row["precision"],
        "link": "" if row["link_mbit"] is None else f"{row['link_mbit']:g} Mbit/s",
        "step, s": _range(row["step_s"]),
        "images/s": f"{row['images_per_s']['median']:.1f}",
        **{f"/ {base}": _range(row["ratios"].get(base)) for base in RATIOS},
        "share of peak": f"{row['share_of_peak']:.0%}",
        "memory, MB": f"{row['peak_bytes'] / 1e6:.0f}",
        "sent, MB": f"{row['wire_bytes'] / 1e6:.1f}",
        "first step, s": f"{row['first_step_s']:.0f}",
    }


def _gpu_cells(row: dict[str, Any]) -> dict[str, str]:
    speed = row["images_per_s"]["median"]
    return {
        "contender": row["contender"],
        "precision": row["precision"],
        "step, ms": _range({key: 1e3 * value for key, value in row["step_s"].items()}),
        "images/s": f"{speed:.0f}",
        **{f"/ {base}": _range(row["ratios"].get(base)) for base in GPU_RATIOS},
        "share of peak": f"{row['share_of_peak']:.0%}",
        "share of floor": f"{row['share_of_floor']:.0%}",
        "launches": str(row.get("launches", "")),
        "kernels": str(row.get("kernels", "")),
        "memory, MB": f"{row['peak_bytes'] / 1e6:.0f}",
        "90 epochs, h": f"{TRAINED / speed / 3600:.1f}",
        "first step, s": f"{row['first_step_s']:.0f}",
    }


def _range(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    low, middle, high = (f"{value[key]:.2f}" for key in ("low", "median", "high"))
    return middle if low == high else f"{middle} ({low}-{high})"


def reading_table(result: dict[str, Any]) -> str:
    """Return the tables of ``measure_reading``."""
    found, settings, rows = result["machine"], result["settings"], result["rows"]
    base, cores, images = rows[0], f"{found['cores']} cores", settings["images"]
    where = ", ".join([*found["gpus"], f"{found['processor']}, {cores}"])
    about = (
        f"{where}; torch {found['torch']}, Python {found['python']}; {images} generated "
        f"photographs, crops of {settings['image_size']} pixels, batch "
        f"{settings['batch_sizes'][0]}; medians over {settings['rounds']} rounds of "
        f"{settings['steps']} batches or more. Images/s, and in brackets relative to imagefolder. "
        "The whole net trains in one process."
    )
    head = ["reader", "one core", cores, "while training", "waiting"]
    cells = [
        [
            row["reader"],
            *(
                f"{row[key]:,.0f} ({row[key] / base[key]:.1f})"
                for key in ("one_core", "all_cores")
            ),
            f"{row['training']:,.1f} ({row['training'] / base['training']:.2f})",
            f"{row['waiting']:.1%}",
        ]
        for row in rows
    ]
    prepared = result["preparing"]
    alone = prepared["pillow"]
    made = ", ".join(
        f"{form} {prepared[form]:,.0f} ({prepared[form] / alone:.2f})" for form in FORMATS
    )
    preparing = (
        f"Preparing on one core, images/s: decoding alone with Pillow {alone:,.0f}; {made}."
    )
    names = "\n".join(f"- {name}: {text}" for name, text in READERS.items())
    return "\n\n".join([about, tables.markdown(head, cells), preparing, names])
