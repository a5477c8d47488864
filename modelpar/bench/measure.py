"""Time the contenders in turn, round after round, so that a busy machine slows all equally."""

import platform
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from modelpar.bench import link
from modelpar.bench.steps import CONTENDERS, gflop, plan_of
from modelpar.bench.workers import Workers
from modelpar.device import num_cores
from modelpar.settings import BenchmarkSettings

BASELINES: Final = ("plain float32", "plain", "ddp")  # without a precision: at the same one


@dataclass
class Case:
    """One contender at one precision, batch size and link rate, and the answers of its turns."""

    workers: Workers
    rate: float | None  # Mbit/s; None: unlimited
    turns: list[list[dict[str, Any]]] = field(default_factory=list[list[dict[str, Any]]])

    def seconds(self) -> list[float]:
        """Return each round's median step in s, where a step takes as long as its slowest rank."""
        return [
            statistics.median(map(max, zip(*(rank["seconds"] for rank in turn), strict=True)))
            for turn in self.turns
        ]


def measure(settings: BenchmarkSettings) -> dict[str, Any]:
    """Return what ``benchmark.json`` holds: times in s, sizes in bytes, speeds in GFLOP/s.

    Raises LaunchError if a process fails.
    """
    result: dict[str, Any] = {"machine": machine(), "settings": asdict(settings)}
    result |= {"peaks": [], "rows": []}
    for batch_size in settings.batch_sizes:
        with ExitStack() as stack:
            workers: list[Workers] = []
            for precision in settings.precisions:
                for name in settings.contenders:
                    one = Workers(name, precision, batch_size, settings)
                    stack.callback(one.close)
                    tqdm.write(
                        f"modelpar: {name} {precision}, batch {batch_size}: "
                        f"first step after {one.start_s:.1f} s"
                    )
                    workers.append(one)
            stack.callback(link.limit, settings.link.hosts, None)
            _measure(workers, settings, result)
    return result


def _measure(workers: list[Workers], settings: BenchmarkSettings, result: dict[str, Any]) -> None:
    batch_size = workers[0].batch_size
    cases = [
        Case(one, rate)
        for rate in (None, *settings.link.rates)
        for one in workers
        if rate is None or CONTENDERS[one.name].processes > 1
    ]
    peaks: dict[str, list[float]] = {precision: [] for precision in settings.precisions}
    for _ in tqdm(range(settings.rounds), "rounds", leave=False):
        for precision, found in peaks.items():  # of all processes of the largest contender at once
            same = [one for one in workers if one.precision == precision]
            found.append(sum(max(same, key=lambda one: len(one.processes)).ask("peak")))
        rate: float | None = None
        for case in cases:
            if case.rate != rate:
                rate = case.rate
                link.limit(settings.link.hosts, rate)
            case.turns.append(case.workers.ask("turn", settings.steps))
        link.limit(settings.link.hosts, None)
    best = {precision: max(found) for precision, found in peaks.items()}
    result["peaks"].append({"batch_size": batch_size, **best})
    work = gflop(plan_of(settings), batch_size)
    for case in cases:
        row = _row(case, cases, settings)
        row["gflops"] = work / row["step_s"]["median"]
        row["share_of_peak"] = row["gflops"] / best[case.workers.precision]
        if settings.breakdown and case.rate is None:
            name = f"{row['contender']}-{row['precision']}-batch{batch_size}"
            row["traces"] = case.workers.ask("trace", str(Path(settings.out, "trace", name)))
        result["rows"].append(row)


def _row(case: Case, cases: list[Case], settings: BenchmarkSettings) -> dict[str, Any]:
    workers, ranks = case.workers, [rank for turn in case.turns for rank in turn]
    size, seconds = len(workers.processes), case.seconds()
    sent = statistics.median(rank["sent"] for rank in ranks)
    return {
        "contender": workers.name,
        "what": CONTENDERS[workers.name].text,
        "precision": workers.precision,
        "batch_size": workers.batch_size,
        "link_mbit": case.rate,
        "processes": size,
        "rounds_s": [[rank["seconds"] for rank in turn] for turn in case.turns],
        "step_s": _spread(seconds),
        "images_per_s": _spread([workers.batch_size / one for one in seconds]),
        "ratios": _ratios(case, cases),
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        # on one host the loopback interface carries what all processes send
        "wire_bytes": int(sent if settings.link.hosts or size == 1 else sent / size),
        "counted_bytes": ranks[-1]["counted"],
        "first_step_s": workers.start_s,
    }


def _ratios(case: Case, cases: list[Case]) -> dict[str, dict[str, float]]:
    """Return how many times as fast the case is as each baseline, round by round."""
    found: dict[str, dict[str, float]] = {}
    for other in cases:
        same_link = other.rate == case.rate or CONTENDERS[other.workers.name].processes == 1
        for base in BASELINES:
            name, _, precision = base.partition(" ")
            kind = (name, precision or case.workers.precision)
            if (other.workers.name, other.workers.precision) == kind and same_link:
                found[base] = _ratio(case, other)
        if other.workers is case.workers and other.rate is None and case.rate is not None:
            found["full rate"] = _ratio(case, other)
    return found


def _ratio(case: Case, other: Case) -> dict[str, float]:
    pairs = zip(other.seconds(), case.seconds(), strict=True)
    return _spread([theirs / ours for theirs, ours in pairs])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def machine() -> dict[str, Any]:
    """Return the hardware and software on which the results depend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": num_cores(),
        "gpus": [torch.cuda.get_device_name(one) for one in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
