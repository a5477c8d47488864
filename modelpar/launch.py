"""Start a command: the launcher, the ranks it starts, and commands of a single process.

``modelpar-train ...`` is the launcher: it checks the settings, and torchrun's agent then starts
``python -m modelpar.train ...`` once for each rank.  ``torchrun ... -m modelpar.train ...`` starts
the same ranks without it.  A rank exits with the status of its error, see ``modelpar.errors``.
"""

import errno
import gc
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import modelpar
from modelpar import config, device, environment, errors, exit_status, shutdown, sweep
from modelpar.distributed import Mesh, process_mesh
from modelpar.environment import Environment
from modelpar.errors import (
    CheckpointError,
    LaunchError,
    PeerLostError,
    RunError,
    SettingsError,
    StoppedError,
)
from modelpar.images import loader
from modelpar.settings import flatten

SHOWS: Final = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}
SAVE_SECONDS: Final = 120  # that the agent leaves the ranks to finish a step and save
# What may differ between the hosts of one run.
HOST_SETTINGS: Final = ("device", "threads", "workers", "cache_dir", "data.root", "data.workers")


@dataclass(frozen=True)
class Command:
    """A command that runs on several ranks.

    ``prepare(settings, run_dir)`` opens everything that can fail before the work starts, creates
    nothing outside the cache, and returns what ``work`` needs.  ``run_dir`` is None if it has been
    checked already.  ``work(settings, prepared, mesh, run_dir)`` runs on each rank.
    """

    name: str  # of conf/NAME.yaml and modelpar.NAME
    prepare: Callable[[Any, Path | None], Any]
    work: Callable[[Any, Any, Mesh, Path], None]
    has_run_dir: bool = True


def main(command: Command) -> NoReturn:
    """Run ``command`` as a rank, a sweep or the launcher; exit with its status."""
    gc.freeze()  # what was imported stays: no collection, the one at exit too, looks at it again
    words = sys.argv[1:]
    if "RANK" in os.environ:
        status = run_rank(command, words)
    elif sweep.requested(words) and not _only_shows(words):
        status = sweep.run(command.name, words)
    else:
        status = run_launcher(command, words)
    errors.flush_output()
    sys.exit(status)


def main_single(name: str, work: Callable[[Any], None]) -> NoReturn:
    """Run a command that needs one process only; exit with its status."""

    def run(cfg: DictConfig) -> int:
        work(config.typed(name, cfg))
        return 0

    gc.freeze()
    status = _run_hydra(name, sys.argv[1:], lambda: config.read(name, sys.argv[1:]), run)
    errors.flush_output()
    sys.exit(status)


def _only_shows(words: list[str]) -> bool:
    """Return whether Hydra is to print something and exit: ``--help``, ``--cfg`` and the like."""
    return any(word.partition("=")[0] in SHOWS for word in words)


def _run_hydra(
    name: str, words: list[str], check: Callable[[], Any], task: Callable[[DictConfig], int]
) -> int:
    """Call ``check``, and ``task`` once Hydra has made its directory; return the exit status."""
    statuses = [0]

    def run(cfg: DictConfig) -> None:
        try:
            statuses.append(task(cfg))
        except RunError as error:
            statuses.append(errors.report(error))
        except OSError as error:
            problem = f"{error.filename or name}: {error.strerror}"
            statuses.append(errors.report(SettingsError(problem)))

    try:
        if not _only_shows(words):
            if config.has_flags(words):
                raise SettingsError(f"modelpar-{name}: use key=value, -m, --cfg job or --help")
            check()
        config.run_hydra(name, run)
    except (RunError, KeyboardInterrupt) as error:
        return errors.report(error)
    return statuses[-1]


# -- the launcher ---------------------------------------------------------------------------------


def run_launcher(command: Command, words: list[str]) -> int:
    """Check everything in this process, then start the ranks; return the exit status."""
    settings: Any = None

    def check() -> None:
        nonlocal settings
        settings = config.read(command.name, words)
        if _has_one_gpu(settings):
            words.append("columns=1")
            settings = config.read(command.name, words)
        device.choose_device(settings.device, settings.columns * settings.replicas)
        given = config.new_run_dir(command.name, words) if command.has_run_dir else None
        command.prepare(settings, given)

    def start(cfg: DictConfig) -> int:
        del cfg
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        return _start_ranks(command, words, settings, run_dir)

    return _run_hydra(command.name, words, check, start)


def _has_one_gpu(settings: Any) -> bool:
    """Return whether the pair would leave the only GPU unused, so that one column is better."""
    return (
        settings.device == "auto"
        and (settings.columns, settings.replicas) == (2, 1)
        and device.choose_device("auto", 2) == "cpu"
        and device.choose_device("auto", 1) == "cuda"
    )


def _start_ranks(command: Command, words: list[str], settings: Any, run_dir: Path) -> int:
    """Run torchrun's agent, again after a lost rank ``restarts`` times; return the exit status."""
    ranks = settings.columns * settings.replicas
    logging.disable()  # the agent's pages: the ranks report in one line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, device.num_cores() // ranks)))
    os.environ[environment.LAUNCHER] = str(os.getpid())
    words = [word for word in words if not word.startswith(("run_dir=", "hydra.run.dir="))]
    # -m adds the working directory to the path, which the launcher may not have in its own.
    path = ["-m"] if sys.path[0] in {"", str(Path.cwd())} else ["-P", "-m"]
    entry = [*path, f"modelpar.{command.name}", *words]
    if command.has_run_dir:
        entry.append(config.quoted("run_dir", run_dir))
    status, restarts = 0, getattr(settings, "restarts", 0)
    try:
        # A rank that is blocked in a collective runs no signal handler: a second signal kills it.
        with shutdown.signals_noted(_stop_agent, shutdown.kill_children):
            for attempt in range(restarts + 1):
                if attempt:
                    errors.say(f"a rank was lost; starting again ({attempt} of {restarts})")
                exit_status.exit_file(run_dir).unlink(missing_ok=True)
                status = _run_agent(entry, ranks, run_dir if command.has_run_dir else None)
                if status != PeerLostError.status:
                    break
    except SignalException as error:
        status = exit_status.read(run_dir)
        if not status:
            errors.say(f"stopped ({error.sigval.name})")
            status = 128 + error.sigval
    return status


def _run_agent(entry: list[str], ranks: int, run_dir: Path | None) -> int:
    """Run one agent of torchrun until its ranks have exited; return the first failed status."""
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port; the host's name need not resolve
        local_addr="127.0.0.1",
        max_restarts=0,  # the agent would also restart after errors that come again
        signals_to_handle="SIGQUIT",  # the others are handled here
    )
    if hasattr(agent, "shutdown_timeout"):  # torch 2.11 always waits 30 s
        agent.shutdown_timeout = SAVE_SECONDS
    try:
        elastic_launch(agent, sys.executable)(*entry)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # it has reported its error itself
        hint = ", often out of memory" if failure.exitcode == -signal.SIGKILL else ""
        lost = PeerLostError(f"rank {rank} was killed by {failure.signal_name()}{hint}")
        exit_status.record(lost, run_dir, rank)
        return errors.report(lost)
    except (RuntimeError, OSError, RendezvousError) as error:
        return errors.report(LaunchError(f"cannot start the ranks ({errors.one_line(error)})"))
    return 0


def _stop_agent(number: int) -> NoReturn:
    """Make the agent forward the signal to the ranks, wait until they have exited, and return."""
    raise SignalException(f"signal {number}", signal.Signals(number))


# -- a rank ---------------------------------------------------------------------------------------


def run_rank(command: Command, words: list[str]) -> int:
    """Run one rank from start to end; return its exit status."""
    run_dir: Path | None = None
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit without a traceback
        environment.exit_with_parent()
        env = environment.read()
        settings = _rank_settings(command.name, words, env)
        with process_mesh(
            settings.columns,
            settings.device,
            settings.comm.timeout,
            threads=settings.threads,
            tf32=settings.tf32,
        ) as mesh:
            _check_same(settings, mesh)
            place = config.new_run_dir(command.name, words) if command.has_run_dir else Path()
            place = Path(mesh.gather_text(str(place))[0])  # a new one has the time in its name
            checked = any(flag for (flag,) in mesh.gather_ints((env.run_dir_checked,)))
            with mesh.all_or_none(patient=True):
                prepared = command.prepare(settings, None if checked else place)
            if command.has_run_dir:
                run_dir = place
            return _work(command, settings, prepared, mesh, place)
    except BaseException as error:  # noqa: BLE001 - every error has its exit status
        return exit_status.report_from_rank(error, run_dir)


def _rank_settings(name: str, words: list[str], env: Environment) -> Any:
    """Return the settings of one rank, fitted to the world that torchrun started."""
    if config.has_flags(words):
        shown = " ".join(f"'{word}'" if "," in word else word for word in words)
        raise SettingsError(
            f"flags do not work under torchrun; use python -m modelpar.{name} {shown}"
        )
    settings = config.read(name, words)
    settings.replicas = env.num_replicas(settings.columns, settings.replicas)
    settings.device = device.choose_device(settings.device, env.local_size)
    device.check_precision(settings.device, settings.precision)
    return settings


def _work(command: Command, settings: Any, prepared: Any, mesh: Mesh, run_dir: Path) -> int:
    """Do the command's work on this rank; return its exit status."""
    status = 0
    if mesh.rank == 0:
        with suppress(OSError):  # nobody reads it
            print(f"modelpar: {mesh.describe()}, {settings.precision}", flush=True)  # noqa: T201
        if warning := device.oversubscription_warning(mesh.threads):
            errors.say(warning)
        if command.has_run_dir:
            exit_status.exit_file(run_dir).unlink(missing_ok=True)
    try:
        with resource_errors(settings, mesh, run_dir):
            command.work(settings, prepared, mesh, run_dir)
    except StoppedError as error:  # raised by all ranks, at the same step
        status = exit_status.report_from_rank(error, run_dir if command.has_run_dir else None)
    # All ranks exit together: the agent terminates the others as soon as one fails, and waits
    # without limit for one that hangs after the others have exited.
    mesh.barrier()
    return status


def _check_same(settings: Any, mesh: Mesh) -> None:
    """Raise LaunchError on all ranks if one runs other versions or settings than rank 0."""
    mine = {
        "modelpar": modelpar.__version__,
        "torch": torch.__version__,
        "device": mesh.device.type,
    }
    shared = {k: v for k, v in flatten(settings).items() if not k.startswith(HOST_SETTINGS)}
    first, *others = map(json.loads, mesh.gather_text(json.dumps(mine | shared)))
    for rank, other in enumerate(others, 1):
        for key in first.keys() | other.keys():
            theirs, ours = (json.dumps(one.get(key)) for one in (other, first))
            if theirs != ours:
                raise LaunchError(
                    f"rank {rank} has {key}={theirs}, rank 0 has {ours}; use the same everywhere"
                )


@contextmanager
def resource_errors(settings: Any, mesh: Mesh, run_dir: Path) -> Generator[None]:
    """Raise CheckpointError for a full disk, LaunchError for full memory or a killed worker."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise CheckpointError(
            f"{run_dir}: {error.strerror}; free some space, saved checkpoints are intact"
        ) from None
    except RuntimeError as error:
        if killed := loader.worker_killed_message(error):
            raise LaunchError(killed) from None
        if not device.is_out_of_memory(error):
            raise
        raise LaunchError(
            f"rank {mesh.rank}: out of memory on {device.memory(mesh.device)} at "
            f"batch_size={settings.batch_size}; use a smaller one, or more replicas"
        ) from None
