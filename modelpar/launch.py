"""The two doors: under torchrun, or starting torchrun's agent for each Hydra job.

Door 1, ``torchrun -m modelpar.train``: the ranks are there already; each composes the settings
for itself.  Door 2, ``python -m modelpar.train``: Hydra runs the job, and the job is torchrun's
agent, which starts the ranks.  Both end with the exit statuses of ``modelpar.errors``.
"""

from __future__ import annotations

import errno
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
import uuid
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import modelpar
from modelpar import config, ends, host, mesh
from modelpar.errors import (
    CheckpointError,
    DataError,
    LaunchError,
    PeerLostError,
    RunError,
    SettingsError,
    StoppedError,
)
from modelpar.mesh import Meeting

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextlib import AbstractContextManager

    from omegaconf import DictConfig
    from torch.distributed import Store

    from modelpar.mesh import Mesh

SWEEPS: Final = ("--multirun", "-m")
INFORMS: Final = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i")
THREADS_GIVEN: Final = "OMP_NUM_THREADS" in os.environ
PATIENCE: Final = 5.0  # s that a rank waits for local rank 0 to speak first
HANDLED: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,  # torchrun's own default leaves this one out
)
CHATTY: Final = (
    "torch.distributed.elastic",
    "torch.distributed.elastic.agent.server.api",
    "torch.multiprocessing",
)
SHUTDOWN: Final = 120  # s that the agent leaves the ranks to finish a step and save


@dataclass(frozen=True)
class Job:
    """One main: its name in ``conf/``, what it needs before a group starts, what every rank runs.

    ``prepare`` gets settings and run directory (None: a new one, or one that was checked), raises
    for all that can be known before a process starts, creates nothing but what the cache holds,
    and returns what ``work`` needs.  ``work`` gets that, the settings, the mesh and the run
    directory, and returns the objective.  Both must be functions of a module, for ``spawn`` to
    find them.  ``keeps_runs``: whether it has a run directory at all.
    """

    name: str
    prepare: Callable[[Any, Path | None], Any]
    work: Callable[[Any, Any, Mesh, Path], float]
    keeps_runs: bool = True


def enter(job: Job) -> NoReturn:
    """Run ``job`` through the door it came by, and end the process with its exit status."""
    sys.exit(_torchrun_door(job) if "RANK" in os.environ else _own_door(job))


def enter_alone(name: str, work: Callable[[Any], None]) -> NoReturn:
    """Run a main that needs no other process, with the same settings and exit statuses."""
    words = sys.argv[1:]
    found: list[BaseException] = []

    def run(cfg: DictConfig) -> None:
        try:
            settings = config.to_object(name, cfg)
            config.VALIDATORS[name](settings)
            work(settings)
        except RunError as error:
            found.append(error)

    try:
        if not _has_flags(words):
            config.read(name, words)
        _hydra_main(name, run)
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
        host.die_with_launcher()
        if any(word.startswith(INFORMS) for word in overrides):
            if host.speaks():
                _hydra_main(job.name, lambda _: None)
            return 0
        _refuse_flags(job, overrides)
        settings, named = _read(job, overrides)
        where = host.place()
        settings.replicas = host.check_world(settings.columns, settings.replicas, where.size)
        _check_restarts(job, named, where)
        met = mesh.meet(_same(settings, where), settings.comm.timeout)
        # Started again by torchrun, a rank finds its own run, whatever ``resume`` says.
        if met.attempt:
            if isinstance(ends.recorded(named, met.launcher), StoppedError):
                return 0  # asked to stop, not lost: torchrun takes any end but 0 for a failure
            ends.raise_final(named, met.launcher)
        prepared = job.prepare(settings, None if met.attempt else named)
        kept = named if job.keeps_runs else None
        if where.rank == 0:
            ends.forget(kept)
        with _opened(settings, met.store) as ranks:
            place = str(named or _new_run_dir(job, overrides))
            run_dir = Path(mesh.gather_text(place, ranks)[0])
            kept = run_dir if job.keeps_runs else None
            _work(job, prepared, settings, ranks, run_dir, met.attempt)
    except BaseException as error:  # noqa: BLE001 - every end has its status
        if isinstance(error, (DataError, CheckpointError)) and job.keeps_runs:
            kept = kept or named  # it is this run's directory, or there is none
        return _end(error, kept, met.launcher)
    return 0


def _refuse_flags(job: Job, overrides: list[str]) -> None:
    """Raise SettingsError for -m, each rank would sweep by itself, and for Hydra's other flags."""
    if any(flag in overrides for flag in SWEEPS):
        words = " ".join(f"'{word}'" if "," in word else word for word in overrides)
        message = f"-m does not go under torchrun; run python -m modelpar.{job.name} {words}"
        raise SettingsError(message)
    for word in overrides:
        if word.startswith("-"):
            message = f"{word} does not go under torchrun; run python -m modelpar.{job.name}"
            raise SettingsError(message)


def _read(job: Job, overrides: list[str]) -> tuple[Any, Path | None]:
    """Return the validated settings, and the run directory where one was given."""
    composed = config.compose_settings(job.name, overrides)
    settings = config.to_object(job.name, composed)
    config.VALIDATORS[job.name](settings)
    given = getattr(settings, "run_dir", None)
    if given is None and any(word.startswith("hydra.run.dir=") for word in overrides):
        given = composed.hydra.run.dir
    return settings, Path(given) if given is not None else None


# What may differ between the hosts of one run.
OWN: Final = ("device", "threads", "workers", "cache_dir", "data.root", "data.workers", "monitor")


def _same(settings: Any, where: host.Place) -> dict[str, Any]:
    """Return what all ranks must have alike: versions, and all settings but a host's own."""
    flat = {".".join(map(str, path)): value for path, value in _leaves(asdict(settings)) if path}
    versions = {"modelpar": modelpar.__version__, "torch": torch.__version__}
    device = {"device": host.choose_device(settings.device, where.local_size)}
    return (
        versions | device | {key: value for key, value in flat.items() if not key.startswith(OWN)}
    )


def _leaves(tree: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, *path, key)


def _check_restarts(job: Job, named: Path | None, where: host.Place) -> None:
    """Raise where torchrun would start the run again, and it would not go on."""
    if where.size == 1 or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    if job.keeps_runs and named is None:
        message = "torchrun --max-restarts: needs run_dir=, where the run goes on"
        raise SettingsError(message)
    if where.agent_has_store:
        message = (
            "torchrun --max-restarts: needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
            "environment, or what is started again reads stale addresses and hangs"
        )
        raise LaunchError(message)


def _new_run_dir(job: Job, overrides: list[str]) -> Path:
    """Return Hydra's output directory for a run that starts now."""
    return Path(str(config.compose_settings(job.name, overrides).hydra.run.dir))


def _end(error: BaseException, run_dir: Path | None, launcher: str) -> int:
    """Say in one line why a rank under torchrun ends, and return its exit status.

    torchrun ends the others as soon as one is gone, so local rank 0 speaks and they wait.  Who
    failed first leaves its end in the run directory; who merely lost it adds nothing.
    """
    status, line = ends.status(error)
    if isinstance(error, PeerLostError) and (first := ends.recorded(run_dir, launcher)):
        return first.status
    if run_dir is not None:
        ends.record(run_dir, status, line, host.place().rank, launcher)
    if status == 1:
        traceback.print_exception(error)
    if not host.speaks():
        _let_others_speak(error)
    ends.say(line)
    return status


# -- door 2: our own -----------------------------------------------------------------------------


def _own_door(job: Job) -> int:
    words = sys.argv[1:]
    sweeps = any(flag in words for flag in SWEEPS)
    found: list[RunError] = []

    def run(cfg: DictConfig) -> float | None:
        try:
            return _launched(job, cfg, checked=not sweeps)
        except StoppedError as error:
            found.append(error)
            raise KeyboardInterrupt from None  # ends a sweep too
        except RunError as error:
            if sweeps:
                ends.say(str(error))  # a sweep says so at once; Hydra decides whether it goes on
                raise RuntimeError(str(error)) from None
            found.append(error)
            return None

    try:
        if not _has_flags(words):
            settings, run_dir = _read(job, words)
            settings, _ = _placed(settings)
            job.prepare(settings, run_dir)
        _hydra_main(job.name, run)
    except RunError as error:
        found.append(error)
    except KeyboardInterrupt:
        if not found:
            ends.say("stopped")
            return 130  # 128 + SIGINT, as shells count
    if found:
        ends.say(str(found[0]))
        return found[0].status
    return 0


def _has_flags(words: list[str]) -> bool:
    """Whether Hydra is asked for something of its own: --help, --cfg, -m and the like."""
    return any(word.startswith("-") for word in words)


def _hydra_main(name: str, task: Callable[[DictConfig], Any]) -> None:
    """Hand over to Hydra, which reads the command line and calls ``task`` for each job."""
    config.register()
    hydra.main(config_path=str(config.conf_dir()), config_name=name, version_base="1.3")(task)()


def _placed(settings: Any) -> tuple[Any, int]:
    """Fix device and number of ranks: the pair, or the whole net where there is just one GPU."""
    ranks = settings.columns * settings.replicas
    one_gpu = (
        host.choose_device("auto", ranks) == "cpu" and host.choose_device("auto", 1) == "cuda"
    )
    if settings.device == "auto" and settings.replicas == 1 and one_gpu:
        settings.columns, ranks = 1, 1
    settings.device = host.choose_device(settings.device, ranks)
    return settings, ranks


def _launched(job: Job, cfg: DictConfig, *, checked: bool) -> float:
    """Start torchrun's agent for one Hydra job; return the objective of its ranks.

    A job of a sweep is checked here; a single one was, before Hydra made its folder.
    """
    settings = config.to_object(job.name, cfg)
    config.VALIDATORS[job.name](settings)
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    settings, ranks = _placed(settings)
    if not checked:
        job.prepare(settings, run_dir)
    if not THREADS_GIVEN:  # of this job alone: the next of a sweep may have other ranks
        os.environ["OMP_NUM_THREADS"] = str(max(1, host.cores() // ranks))
    # A restarted pair that shares the agent's store reads stale addresses and hangs.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Inside joblib's workers the default is a context of joblib's own, which has no processes.
    multiprocessing.set_start_method("spawn", force=True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.CRITICAL)  # we say it in one line
    # Ranks that end by themselves leave a semaphore to Python's tracker, which tells of it.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port: parallel jobs do not collide
        max_restarts=getattr(settings, "restarts", 0),
        signals_to_handle=",".join(number.name for number in HANDLED),
        shutdown_timeout=SHUTDOWN,
    )
    kept = run_dir if job.keeps_runs else None
    ends.forget(kept)
    with _signals_restored():
        try:
            results = elastic_launch(agent, _rank)(job, asdict(settings), str(run_dir))
        except SignalException as error:  # Hydra would take it for a failed job and go on
            ends.raise_final(kept)
            message = f"signal {error.sigval}"
            raise KeyboardInterrupt(message) from None
        except ChildFailedError as error:
            ends.raise_final(kept)
            cause = ends.cause(error)
            rank, _ = error.get_first_failure()
            ends.record(kept, cause.status, str(cause), rank)
            raise cause from None
    ends.raise_final(kept)
    return next(iter(results.values()))


@contextmanager
def _signals_restored() -> Generator[None]:
    """Give back the handlers that the agent replaces and never restores."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(ValueError):  # not the main thread: nothing was replaced
                signal.signal(number, handler)


def _rank(job: Job, plain: dict[str, Any], run_dir: str) -> float:
    """Run in each process that the agent starts."""
    settings = config.to_object(job.name, OmegaConf.create(plain))
    host.die_with_launcher()
    kept = Path(run_dir) if job.keeps_runs else None
    attempt = host.place().attempt
    if attempt and ends.final(ends.recorded(kept)):
        return math.nan  # not to be tried again: the agent takes any end but 0 for a failure
    try:
        store = mesh.meet({}, settings.comm.timeout).store
        prepared = job.prepare(settings, None)
        with _opened(settings, store) as ranks:
            return _work(job, prepared, settings, ranks, Path(run_dir), attempt)
    except StoppedError as error:
        # Each says so: the first that leaves may take the others along.
        ends.record(kept, error.status, str(error), host.place().rank)
        # To return would be to wait for an agent that is shutting down and asks for no result.
        sys.exit(error.status)
    except PeerLostError as error:
        _let_others_speak(error)  # the lost rank's own end comes first
        raise
    except RunError as error:
        ends.record(kept, error.status, str(error), host.place().rank)
        raise


def _let_others_speak(error: BaseException) -> None:
    if not (isinstance(error, PeerLostError) and error.asked):
        time.sleep(PATIENCE)


# -- both ----------------------------------------------------------------------------------------


def _opened(settings: Any, store: Store | None = None) -> AbstractContextManager[Mesh]:
    device = host.choose_device(settings.device, host.place().local_size)
    host.check_precision(device, getattr(settings, "precision", ""))
    return mesh.opened(
        settings.columns,
        settings.device,
        settings.comm.timeout,
        threads=settings.threads,
        tf32=settings.tf32,
        checked=settings.comm.check,
        store=store,
    )


def _work(
    job: Job, prepared: Any, settings: Any, ranks: Mesh, run_dir: Path, attempt: int
) -> float:
    if ranks.rank == 0:
        print(f"modelpar: {ranks.describe()}, {settings.precision}", flush=True)  # noqa: T201
        if complaint := host.crowding(ranks.threads):
            ends.say(complaint)
        if attempt:
            ends.say(f"a process was lost; all were started again, for the {attempt}. time")
    try:
        objective = job.work(prepared, settings, ranks, run_dir)
        # All leave together: an agent waits without end for one that stands still after the rest.
        mesh.gather_text("", ranks)
        return objective  # noqa: TRY300
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        message = f"{run_dir}: {error.strerror}; make room, what is saved is as it was"
        raise CheckpointError(message) from None
    except RuntimeError as error:
        if not host.is_out_of_memory(error):
            raise
        message = (
            f"rank {ranks.rank}: out of memory on {host.memory(ranks.device)} at "
            f"batch_size={settings.batch_size}; give a smaller one, or more replicas"
        )
        raise LaunchError(message) from None
