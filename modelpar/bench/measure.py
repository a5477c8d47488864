"""The contenders in turn, round after round, so that a noisy machine hits all alike."""

import os
import platform
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from modelpar.bench import anatomy, wire
from modelpar.bench.steps import CONTENDERS, gflop, plan_of
from modelpar.bench.worlds import World
from modelpar.settings import BenchmarkSettings

ALONE_REPEATS: Final = 5
BASELINES: Final = ("plain float32", "plain", "layers", "ddp", "in_turn")


@dataclass
class Case:
    """One contender at one precision, batch size and rate, with what its turns told."""

    world: World
    rate: float | None  # Mbit/s; None: as fast as it goes
    turns: list[list[dict[str, Any]]] = field(default_factory=list[list[dict[str, Any]]])

    def seconds(self) -> list[float]:
        """Return the median step of each round, in s: of the process that took longest."""
        return [
            statistics.median(map(max, zip(*(rank["seconds"] for rank in turn), strict=True)))
            for turn in self.turns
        ]


def measure(settings: BenchmarkSettings) -> dict[str, Any]:
    """Return all that was measured, as ``benchmark.json`` holds it.

    Times in s, sizes in bytes, speeds in GFLOP/s.
    """
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": asdict(settings),
        "peaks": [],
        "rows": [],
        "timelines": {},
    }
    for batch_size in settings.batch_sizes:
        with ExitStack() as ends:
            worlds = [
                _started(name, precision, batch_size, settings, ends)
                for precision in settings.precisions
                for name in settings.contenders
            ]
            ends.callback(wire.limit, settings.link.hosts, None)
            _measure(worlds, settings, result)
    return result


def _started(
    name: str, precision: str, batch_size: int, settings: BenchmarkSettings, ends: ExitStack
) -> World:
    world = World(name, precision, batch_size, settings)
    ends.callback(world.close)
    tqdm.write(
        f"modelpar: {name} {precision}, batch {batch_size}: first step after {world.start_s:.1f} s"
    )
    return world


def _measure(worlds: list[World], settings: BenchmarkSettings, result: dict[str, Any]) -> None:
    batch_size = worlds[0].batch_size
    cases = [
        Case(world, rate)
        for rate in (None, *settings.link.rates)
        for world in worlds
        if rate is None or CONTENDERS[world.name].processes > 1
    ]
    peaks: dict[str, list[dict[str, float]]] = {name: [] for name in settings.precisions}
    for _ in tqdm(range(settings.rounds), "rounds", leave=False):
        for precision, found in peaks.items():
            found.append(_peak([world for world in worlds if world.precision == precision]))
        rate: float | None = None
        for case in cases:
            if case.rate != rate:
                rate = case.rate
                wire.limit(settings.link.hosts, rate)
            case.turns.append(case.world.ask("turn", settings.steps))
        wire.limit(settings.link.hosts, None)
    best = {
        precision: {kind: max(one[kind] for one in found) for kind in found[0]}
        for precision, found in peaks.items()
    }
    result["peaks"].append({"batch_size": batch_size, **best})
    work = gflop(plan_of(settings), batch_size)
    for case in cases:
        row = _row(case, cases, settings)
        row["gflops"] = work / row["step_s"]["median"]
        row["share_of_peak"] = row["gflops"] / max(best[case.world.precision].values())
        result["rows"].append(row)
    if settings.breakdown:
        for world in worlds:
            spans = world.ask("anatomy")
            world.close()  # the profiler's records take room
            (row,) = (
                row
                for row in result["rows"]
                if row["batch_size"] == batch_size
                and row["link_mbit"] is None
                and (row["contender"], row["precision"]) == (world.name, world.precision)
            )
            row["layers"] = anatomy.seconds(spans[0])
            if world.name == "pair":
                result["timelines"][f"{world.precision}, batch {batch_size}"] = _timeline(spans)


def _peak(worlds: Sequence[World]) -> dict[str, float]:
    """Return what all processes of the largest world reach at once."""
    world = max(worlds, key=lambda one: len(one.processes))
    ranks = world.ask("peak")
    return {kind: sum(rank[kind] for rank in ranks) for kind in ranks[0]}


def _row(case: Case, cases: list[Case], settings: BenchmarkSettings) -> dict[str, Any]:
    world, ranks = case.world, [rank for turn in case.turns for rank in turn]
    size = len(world.processes)
    crossing = statistics.median(rank["crossing_s"] for rank in ranks)
    counted = ranks[-1]["counted"]
    alone = 0.0
    if counted:
        wire.limit(settings.link.hosts, case.rate)
        alone = statistics.median(world.ask("alone", ALONE_REPEATS))
        wire.limit(settings.link.hosts, None)
    sent = statistics.median(rank["wire"] for rank in ranks)
    seconds = case.seconds()
    return {
        "contender": world.name,
        "what": CONTENDERS[world.name].text,
        "precision": world.precision,
        "batch_size": world.batch_size,
        "link_mbit": case.rate,
        "processes": size,
        "rounds_s": [[rank["seconds"] for rank in turn] for turn in case.turns],
        "step_s": _spread(seconds),
        "images_per_s": _spread([world.batch_size / one for one in seconds]),
        "ratios": _ratios(case, cases),
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        # on one host the loopback carries what all processes send
        "wire_bytes": int(sent if settings.link.hosts or size == 1 else sent / size),
        "counted_bytes": counted,
        "crossing_s": crossing,
        "swaps_alone_s": alone,
        "hidden": max(0.0, 1 - crossing / alone) if alone else None,
        "first_step_s": world.start_s,
    }


def _ratios(case: Case, cases: list[Case]) -> dict[str, dict[str, float]]:
    """Return how many times as fast the case is as each baseline, round by round."""
    found: dict[str, dict[str, float]] = {}
    for base in BASELINES:
        name, _, precision = base.partition(" ")
        for other in cases:
            alike = other.rate == case.rate or CONTENDERS[name].processes == 1
            if (
                (other.world.name, other.world.precision)
                == (name, precision or case.world.precision)
            ) and alike:
                found[base] = _against(case, other)
    for other in cases:
        if other.world is case.world and other.rate is None and case.rate is not None:
            found["full rate"] = _against(case, other)
    return found


def _against(case: Case, other: Case) -> dict[str, float]:
    pairs = zip(other.seconds(), case.seconds(), strict=True)
    return _spread([theirs / ours for theirs, ours in pairs])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _timeline(ranks: list[list[anatomy.Span]]) -> list[list[dict[str, Any]]]:
    """Return each rank's spans as plain values, in s from the step's start."""
    zero = min(spans[0].start for spans in ranks)
    return [
        [{"from": span.start - zero, "to": span.end - zero, "place": span.place} for span in spans]
        for spans in ranks
    ]


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    gpus = [torch.cuda.get_device_name(one) for one in range(torch.cuda.device_count())]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
