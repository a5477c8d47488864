"""Time the contenders in turn, round after round, so that a busy machine slows all equally."""

import platform
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from modelpar.bench.contenders import CONTENDERS
from modelpar.bench.floor import floor, gflop
from modelpar.bench.steps import Contender
from modelpar.bench.workers import Workers, limit_link
from modelpar.device import choose_device, num_cores
from modelpar.errors import LaunchError, say
from modelpar.progress import progress_bar
from modelpar.schemas import BenchmarkSettings

# A contender without a precision is one at the same precision.
RATIOS: Final = ("plain float32", "plain", "ddp", "full rate")
GPU_RATIOS: Final = ("plain", "plain_compiled")


def with_defaults(settings: BenchmarkSettings) -> BenchmarkSettings:
    """Return the settings with the device, and what is left to it; raises SettingsError."""
    names = settings.contenders or ["plain"]
    device = choose_device(settings.device, min(CONTENDERS[name].processes for name in names))
    on_gpu, gpus = device == "cuda", torch.cuda.device_count()
    names = [
        name
        for name, kind in CONTENDERS.items()
        if device in kind.devices and not (on_gpu and kind.processes > gpus)
    ]
    precisions = ["float32", "bfloat16"]
    if on_gpu:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        precisions = ["bfloat16" if native else "float32"]
    return replace(
        settings,
        device=device,
        contenders=settings.contenders or names,
        precisions=settings.precisions or precisions,
        batch_sizes=settings.batch_sizes or ([128, 256, 512] if on_gpu else [128]),
        steps=settings.steps or (20 if on_gpu else 2),
    )


def contenders(settings: BenchmarkSettings, *, by_default: bool) -> list[Contender]:
    """Return what is timed, in the order in which it starts; see ``Kind.one_size``."""
    names, sizes = settings.contenders or [], settings.batch_sizes or []
    return [
        Contender(name, precision, size, settings)
        for precision, name, size in product(settings.precisions or [], names, sizes)
        if size == sizes[0] or not (by_default and CONTENDERS[name].one_size)
    ]


def measure(settings: BenchmarkSettings) -> dict[str, Any]:
    """Return what ``benchmark.json`` holds: times in s, sizes in bytes, speeds in GFLOP/s.

    Raises SettingsError for a net that cannot be built, LaunchError if no contender can run.
    """
    by_default, settings = settings.contenders is None, with_defaults(settings)
    result: dict[str, Any] = {"machine": machine(), "settings": asdict(settings)}
    result |= {"peaks": [], "rows": []}
    on_gpu, found = settings.device == "cuda", contenders(settings, by_default=by_default)
    _ = [one.plan for one in found]  # refuses settings before any process starts
    # On a GPU all start at once: they mostly compile their steps, each on about one core.
    sizes = dict.fromkeys(one.batch_size for one in found)
    of_sizes = ([one for one in found if one.batch_size == size] for size in sizes)
    for group in [found] if on_gpu else of_sizes:
        with ExitStack() as stack:
            stack.callback(limit_link, settings.link.hosts, None)
            starting = (stack.enter_context(closing(Workers(one))) for one in group)
            ready = _ready(list(starting) if on_gpu else starting, on_gpu=on_gpu)
            for size in dict.fromkeys(one.batch_size for one in group):
                workers = [one for one in ready if one.contender.batch_size == size]
                with _failure_reported():
                    peaks, rows = _measure(workers, settings)
                    result["peaks"].append({"batch_size": size, **peaks})
                    result["rows"] += rows
            if on_gpu:  # at the end, since a profiler may slow the steps that follow
                _count_launches([one for one in ready if not one.failed], result["rows"])
    if not result["rows"]:
        raise LaunchError("benchmark: none of the contenders can run")
    return result


@contextmanager
def _failure_reported() -> Generator[None]:
    """Print the line of a contender that fails, and go on without it."""
    try:
        yield
    except LaunchError as error:
        say(str(error))


def _ready(workers: Iterable[Workers], *, on_gpu: bool) -> list[Workers]:
    """Return those of ``workers`` that can take their step.

    On CPUs they start one after another.  On a GPU all make and compile their steps at the same
    time.  Each is alone while it tunes, but for those that still compile what they make.
    """
    ready: list[Workers] = []
    for some in [list(workers)] if on_gpu else ([one] for one in workers):
        for one in some:
            one.begin("prepare")
        tuned: list[Workers] = []
        for one in _able(some):
            one.begin("tune")
            tuned += _able([one])
        for one in tuned:
            one.begin("warm_up")
        for one in _able(tuned):
            one.report()
            ready.append(one)
    return ready


def _able(workers: Iterable[Workers]) -> Iterator[Workers]:
    """Yield those of ``workers`` that finish the part of their start that they have begun."""
    for one in workers:
        with _failure_reported():
            one.started()
            yield one


def _count_launches(workers: Sequence[Workers], rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row how often a step of the contender, of its last batch, starts kernels."""
    last = {(one.contender.name, one.contender.precision): one for one in workers}
    for key, one in last.items():
        with _failure_reported():
            counts = one.ask("launches")[0]
            for row in rows:
                if (row["contender"], row["precision"]) == key:
                    row.update(counts)


def _measure(
    workers: Sequence[Workers], settings: BenchmarkSettings
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the peak of each precision, and a row for each contender at each link rate.

    The peak is that of all processes of the largest contender at once, or of one GPU, for which
    there is also ``copy``; see ``workers``.
    """
    hosts, on_gpu = settings.link.hosts, settings.device == "cuda"
    cases: list[tuple[Workers, float | None, list[Any]]] = [
        (one, rate, [])
        for rate in (None, *settings.link.rates)
        for one in workers
        if rate is None or one.contender.processes > 1
    ]
    largest_first = sorted(workers, key=lambda one: -one.contender.processes)
    peaks = dict[str, float]()
    for _ in progress_bar(iterable=range(settings.rounds), desc="rounds", leave=False):
        for precision in dict.fromkeys(one.contender.precision for one in workers):
            same = [one for one in largest_first if one.contender.precision == precision]
            for name, found in _peak(same, on_gpu=on_gpu).items():
                peaks[name] = max(peaks.get(name, 0.0), found)
        for one, rate, turns in cases:
            limit_link(hosts, rate)
            if not one.failed:
                with _failure_reported():
                    turns.append(one.ask("turn", settings.steps))
    cases = [case for case in cases if not case[0].failed]
    rows = [_row(*case) for case in cases]
    limit_link(hosts, None)
    for row, (one, rate, _) in zip(rows, cases, strict=True):
        row["ratios"] = ratios(row, rows)
        row.update(shares(one.contender, row["step_s"]["median"], peaks))
        if settings.breakdown and rate is None:
            name = f"{row['contender']}-{row['precision']}-batch{row['batch_size']}"
            with _failure_reported():
                row["traces"] = one.ask("trace", str(Path(settings.out, "trace", name)))
    return peaks, rows


def _peak(workers: Sequence[Workers], *, on_gpu: bool) -> dict[str, float]:
    """Return the peak that the first of ``workers`` that does not fail measures."""
    for one in workers:
        if not one.failed:
            with _failure_reported():
                ranks = one.ask("peak")
                share = len(ranks) if on_gpu else 1
                return {name: sum(rank[name] for rank in ranks) / share for name in ranks[0]}
    return {}


def _row(
    workers: Workers, rate: float | None, turns: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    contender, ranks = workers.contender, [rank for turn in turns for rank in turn]
    # each round's median step, where a step takes as long as its slowest rank
    steps = (zip(*(rank["seconds"] for rank in turn), strict=True) for turn in turns)
    rounds = [median(map(max, step)) for step in steps]
    return {
        "contender": contender.name,
        "what": CONTENDERS[contender.name].what,
        "precision": contender.precision,
        "batch_size": contender.batch_size,
        "link_mbit": rate,  # None: unlimited
        "processes": contender.processes,
        "rounds_s": rounds,
        "step_s": _spread(rounds),
        "images_per_s": _spread(contender.batch_size / seconds for seconds in rounds),
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "wire_bytes": int(median(rank["sent"] for rank in ranks)),
        "first_step_s": workers.start_s,
    }


def shares(contender: Contender, seconds: float, peaks: dict[str, float]) -> dict[str, float]:
    """Return the speed of a step of so many ``seconds`` in GFLOP/s, and its shares of limits.

    On a GPU these are those of the contender's GPUs.
    """
    size, share = contender.batch_size, CONTENDERS[contender.name].share
    peak, plan = peaks[contender.precision], contender.plan
    speed = share * gflop(plan, size) / seconds
    if "copy" not in peaks:
        return {"gflops": speed, "share_of_peak": speed / peak}
    itemsize = getattr(torch, contender.precision).itemsize
    least = share * floor(plan, size, itemsize, peak * 1e9, peaks["copy"] * 1e9)
    return {
        "gflops": speed,
        "share_of_peak": speed / (contender.processes * peak),
        "share_of_floor": least / (contender.processes * seconds),
    }


def ratios(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how many times as fast a row is as the ``RATIOS``, round by round."""
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
    return {name: found[name] for name in (*RATIOS, *GPU_RATIOS) if name in found}


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
