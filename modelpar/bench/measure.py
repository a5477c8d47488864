"""Time the contenders in turn, round after round, so that a busy machine slows all equally."""

import platform
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from tqdm import tqdm

from modelpar import tables
from modelpar.bench.steps import CONTENDERS, Contender, gflop, plan_of
from modelpar.bench.workers import Workers, limit_link
from modelpar.device import num_cores
from modelpar.settings import BenchmarkSettings

# A contender without a precision is one at the same precision.
RATIOS: Final = ("plain float32", "plain", "ddp", "full rate")


def measure(settings: BenchmarkSettings) -> dict[str, Any]:
    """Return what ``benchmark.json`` holds: times in s, sizes in bytes, speeds in GFLOP/s.

    Raises LaunchError if a process fails.
    """
    result: dict[str, Any] = {"machine": machine(), "settings": asdict(settings)}
    result |= {"peaks": [], "rows": []}
    for batch_size in settings.batch_sizes:
        with ExitStack() as stack:
            stack.callback(limit_link, settings.link.hosts, None)
            workers = [
                stack.enter_context(
                    closing(Workers(Contender(name, precision, batch_size, settings)))
                )
                for precision, name in product(settings.precisions, settings.contenders)
            ]
            peaks, rows = _measure(workers, settings)
        work = gflop(plan_of(settings), batch_size)
        for row in rows:
            row["ratios"] = ratios(row, rows)
            row["gflops"] = work / row["step_s"]["median"]
            row["share_of_peak"] = row["gflops"] / peaks[row["precision"]]
        result["peaks"].append({"batch_size": batch_size, **peaks})
        result["rows"] += rows
    return result


def _measure(
    workers: Sequence[Workers], settings: BenchmarkSettings
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the peak of each precision, and a row for each contender at each link rate."""
    hosts, peaks = settings.link.hosts, dict.fromkeys(settings.precisions, 0.0)
    cases: list[tuple[Workers, float | None, list[Any]]] = [
        (one, rate, [])
        for rate in (None, *settings.link.rates)
        for one in workers
        if rate is None or one.contender.processes > 1
    ]
    for _ in tqdm(range(settings.rounds), "rounds", leave=False):
        for precision, best in peaks.items():  # of all processes of the largest contender at once
            same = [one for one in workers if one.contender.precision == precision]
            largest = max(same, key=lambda one: one.contender.processes)
            peaks[precision] = max(best, sum(largest.ask("peak")))
        for one, rate, turns in cases:
            limit_link(hosts, rate)
            turns.append(one.ask("turn", settings.steps))
    rows = [_row(*case) for case in cases]
    limit_link(hosts, None)
    if settings.breakdown:
        for one, row in zip(workers, rows, strict=False):  # the first rows are at the full rate
            name = f"{row['contender']}-{row['precision']}-batch{row['batch_size']}"
            row["traces"] = one.ask("trace", str(Path(settings.out, "trace", name)))
    return peaks, rows


def _row(
    workers: Workers, rate: float | None, turns: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    contender, ranks = workers.contender, [rank for turn in turns for rank in turn]
    # each round's median step, where a step takes as long as its slowest rank
    steps = (zip(*(rank["seconds"] for rank in turn), strict=True) for turn in turns)
    rounds = [median(map(max, step)) for step in steps]
    # on one host the loopback interface carries what all processes send
    senders = 1 if contender.settings.link.hosts else contender.processes
    return {
        "contender": contender.name,
        "what": CONTENDERS[contender.name],
        "precision": contender.precision,
        "batch_size": contender.batch_size,
        "link_mbit": rate,  # None: unlimited
        "processes": contender.processes,
        "rounds_s": rounds,
        "step_s": _spread(rounds),
        "images_per_s": _spread(contender.batch_size / seconds for seconds in rounds),
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "wire_bytes": int(median(rank["sent"] for rank in ranks) / senders),
        "first_step_s": workers.start_s,
    }


def ratios(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how many times as fast a row is as each of ``RATIOS``, round by round."""
    found: dict[str, dict[str, float]] = {}
    for other in rows:
        pairs = zip(other["rounds_s"], row["rounds_s"], strict=True)
        ratio = _spread(theirs / ours for theirs, ours in pairs)
        same_precision = other["precision"] == row["precision"]
        if other["processes"] == 1 or other["link_mbit"] == row["link_mbit"]:
            found[f"{other['contender']} {other['precision']}"] = ratio
            if same_precision:
                found[other["contender"]] = ratio
        same = same_precision and other["contender"] == row["contender"]
        if same and other["link_mbit"] is None and row["link_mbit"] is not None:
            found["full rate"] = ratio
    return {name: found[name] for name in RATIOS if name in found}


def _spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": median(ordered), "low": ordered[0], "high": ordered[-1]}


def machine() -> dict[str, Any]:
    """Return the hardware and software on which the results depend."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": name[1] if name else platform.machine(),
        "cores": num_cores(),
        "gpus": [torch.cuda.get_device_name(one) for one in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


# -- tables --------------------------------------------------------------------------------------


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
        cells = [_cells(row) for row in result["rows"] if row["batch_size"] == peaks["batch_size"]]
        table = tables.markdown(list(cells[0]), (list(row.values()) for row in cells))
        found = [f"{value:.0f} in {key}" for key, value in peaks.items() if key != "batch_size"]
        peak = f"Peak of matrix products, GFLOP/s of all processes: {', '.join(found)}."
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


def _range(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    low, middle, high = (f"{value[key]:.2f}" for key in ("low", "median", "high"))
    return middle if low == high else f"{middle} ({low}-{high})"
