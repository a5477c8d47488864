"""The two doors: under torchrun, or starting torchrun's agent for each Hydra job.

Door 1, ``torchrun -m modelpar.train``: the ranks are there already; each composes the settings
for itself.  Door 2, ``python -m modelpar.train``: Hydra runs the job, and the job is torchrun's
agent, which starts the ranks.  Both end with the exit statuses of ``modelpar.errors``.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import modelpar
from modelpar import agent, config, device, distributed, ends, environment, jobs, sweep
from modelpar.distributed import Meeting
from modelpar.errors import (
    CheckpointError,
    DataError,
    LaunchError,
    PeerLostError,
    RunError,
    SettingsError,
    StoppedError,
)
from modelpar.jobs import Job

HELPS: Final = ("--help", "-h", "--hydra-help", "--version")
INFORMS: Final = (*HELPS, "--cfg", "-c", "--info", "-i")


def enter(job: Job) -> NoReturn:
    """Run ``job`` through the door it came by, and end the process with its exit status."""
    status = _torchrun_door(job) if "RANK" in os.environ else _own_door(job)
    ends.let_go()
    sys.exit(status)


def enter_alone(name: str, work: Callable[[Any], None]) -> NoReturn:
    """Run a main that needs no other process, with the same settings and exit statuses."""
    words = sys.argv[1:]
    found: list[BaseException] = []

    def run(cfg: DictConfig) -> None:
        try:
            work(config.typed(name, cfg))
        except RunError as error:
            found.append(error)
        except OSError as error:
            found.append(SettingsError(f"{error.filename or name}: {error.strerror}"))

    try:
        if not config.has_flags(words):
            config.read(name, words)
        config.run_hydra(name, run)
    except (RunError, KeyboardInterrupt) as error:
        found.append(error)
    for error in found:
        status, line = ends.status(error)
        ends.say(line)
        sys.exit(status)
    sys.exit(0)


# -- door 1: under torchrun ----------------------------------------------------------------------


def _torchrun_door(job: Job) -> int:
    overrides = sys.argv[1:]
    named: Path | None = None
    kept: Path | None = None  # where the end is told
    met = Meeting()
    try:
        environment.exit_with_parent()
        if any(word.startswith(INFORMS) for word in overrides):
            if environment.is_local_rank0():
                config.run_hydra(job.name, lambda _: None)
            return 0
        _refuse_flags(job, overrides)
        settings, named = _read(job, overrides)
        where = environment.read()
        settings.replicas = environment.check_world(
            settings.columns, settings.replicas, where.size
        )
        _check_restarts(job, named, where)
        met = distributed.meet(_same(settings, where), settings.comm.timeout)
        # Started again by torchrun, a rank finds its own run, whatever ``resume`` says.
        if met.attempt:
            if isinstance(ends.recorded(named, met.launcher), StoppedError):
                return 0  # asked to stop, not lost: torchrun takes any end but 0 for a failure
            ends.raise_final(named, met.launcher)
        prepared = distributed.prepare_together(
            lambda: job.prepare(settings, None if met.attempt else named),
            met.store,
            settings.comm.timeout,
        )
        kept = named if job.keeps_runs else None
        if where.rank == 0:
            ends.forget(kept)
        with jobs.opened(settings, met.store) as ranks:
            place = str(named or config.new_run_dir(job.name, overrides))
            run_dir = Path(ranks.gather_text(place)[0])
            kept = run_dir if job.keeps_runs else None
            jobs.work(job, prepared, settings, ranks, run_dir, met.attempt)
            if where.rank == 0:
                ends.forget(kept)  # of a process that was lost, and started again
    except BaseException as error:  # noqa: BLE001 - every end has its status
        if isinstance(error, (DataError, CheckpointError)) and job.keeps_runs:
            kept = kept or named  # it is this run's directory, or there is none
        return _end(error, kept, met.launcher)
    return 0


def _refuse_flags(job: Job, overrides: list[str]) -> None:
    """Raise SettingsError for -m, each rank would sweep by itself, and for Hydra's other flags."""
    if sweep.asked(overrides):
        words = " ".join(f"'{word}'" if "," in word else word for word in overrides)
        raise SettingsError(
            f"-m does not go under torchrun; run python -m modelpar.{job.name} {words}"
        )
    for word in overrides:
        if word.startswith("-"):
            raise SettingsError(
                f"{word} does not go under torchrun; run python -m modelpar.{job.name}"
            )


def _read(job: Job, overrides: list[str]) -> tuple[Any, Path | None]:
    """Return the validated settings, and the run directory where one was given."""
    settings = config.read(job.name, overrides)
    given = getattr(settings, "run_dir", None)
    if given is None and any(word.startswith("hydra.run.dir=") for word in overrides):
        given = config.new_run_dir(job.name, overrides)
    return settings, Path(given) if given is not None else None


# What may differ between the hosts of one run.
OWN: Final = ("device", "threads", "workers", "cache_dir", "data.root", "data.workers", "monitor")


def _same(settings: Any, where: environment.Environment) -> dict[str, Any]:
    """Return what all ranks must have alike: versions, and all settings but a host's own."""
    flat = {".".join(map(str, path)): value for path, value in _leaves(asdict(settings)) if path}
    versions = {"modelpar": modelpar.__version__, "torch": torch.__version__}
    kind = {"device": device.choose_device(settings.device, where.local_size)}
    return versions | kind | {key: value for key, value in flat.items() if not key.startswith(OWN)}


def _leaves(tree: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, *path, key)


def _check_restarts(job: Job, named: Path | None, where: environment.Environment) -> None:
    """Raise where torchrun would start the run again, and it would not go on."""
    if where.size == 1 or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    if job.keeps_runs and named is None:
        raise SettingsError("torchrun --max-restarts: needs run_dir=, where the run goes on")
    if where.agent_has_store:
        raise LaunchError(
            "torchrun --max-restarts: needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
            "environment, or what is started again reads stale addresses and hangs"
        )


def _end(error: BaseException, run_dir: Path | None, launcher: str) -> int:
    """Say in one line why a rank under torchrun ends, and return its exit status.

    torchrun ends the others as soon as one is gone, so local rank 0 speaks and they wait.  Who
    failed first leaves its end in the run directory; who merely lost it adds nothing.
    """
    status, line = ends.status(error)
    if isinstance(error, PeerLostError) and (first := ends.recorded(run_dir, launcher)):
        return first.status
    if run_dir is not None:
        ends.record(run_dir, status, line, environment.read().rank, launcher)
    if status == 1:
        traceback.print_exception(error)
    if not environment.is_local_rank0():
        jobs.let_others_speak(error)
    ends.say(line)
    return status


# -- door 2: our own -----------------------------------------------------------------------------


def _own_door(job: Job) -> int:
    words = sys.argv[1:]
    found: list[BaseException] = []

    def run(cfg: DictConfig) -> float | None:
        try:
            settings, ranks = agent.place(config.typed(job.name, cfg))
            run_dir = Path(HydraConfig.get().runtime.output_dir)
            return agent.launch(job, settings, ranks, run_dir)
        except RunError as error:
            found.append(error)
            return None

    try:
        if sweep.asked(words) and not any(word.startswith(HELPS) for word in words):
            return sweep.run(job, words)
        if not config.has_flags(words):
            settings, run_dir = _read(job, words)
            settings, _ = agent.place(settings)
            job.prepare(settings, run_dir)
        config.run_hydra(job.name, run)
    except (RunError, KeyboardInterrupt) as error:
        found.append(error)
    for error in found:
        status, line = ends.status(error)
        ends.say(line)
        return status
    return 0
