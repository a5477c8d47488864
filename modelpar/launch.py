"""Start a command: the launcher, the ranks it starts, and commands of a single process.

``modelpar-train ...`` is the launcher: it checks the settings, and torchrun's agent then starts
``python -m modelpar.train ...`` once for each rank.  ``torchrun ... -m modelpar.train ...`` starts
the same ranks without it.  A rank exits with the status of its error, see ``modelpar.errors``.
torchrun itself always exits with 1, so the status of a failed run is also in ``log/exit.json``.
"""

import gc
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import modelpar
from modelpar import config, device, environment, errors, limits, overrides, shutdown, sweep
from modelpar.declare import flatten
from modelpar.distributed import Mesh, exit_if_groups_remain, process_mesh
from modelpar.environment import Environment
from modelpar.errors import CheckpointError, InUseError, LaunchError, PeerLostError, StoppedError
from modelpar.files import atomic_write
from modelpar.settings import TrainSettings

EXIT: Final = "log/exit.json"  # in the directory of a run that failed
LOCAL: Final = "127.0.0.1"  # rendezvous of the ranks of one host
CONNECT_SECONDS: Final = 5.0  # in which this host must connect to itself
SAVE_SECONDS: Final = 120  # that the agent leaves the ranks to finish a step and save
FIRST_ERROR_SECONDS: Final = 5.0  # that other ranks leave local rank 0 to report the same error
PLACES: Final = ("cache_dir", "data.root", "search_root")
HOST_SETTINGS: Final = ("threads", "workers", "data.workers", *PLACES)  # hosts may differ in them
Prepare = Callable[[Any, Path | None], Any]


def run(name: str, work: str, prepare: Prepare | None = None) -> int:
    """Run a command, as a rank, a sweep, the launcher or a single process; return its status.

    ``work`` names a function, which the launcher need not import.  ``work(settings)`` is a command
    of one process.  With ``prepare`` a command has several ranks: ``prepare(settings, run_dir)``
    opens everything that can fail before the work starts, creates nothing outside the cache, and
    returns what ``work(settings, prepared, mesh, run_dir)`` needs on each rank.  ``prepare`` gets
    None for a ``run_dir`` that has been checked already.
    """
    words = sys.argv[1:]
    if "RANK" in os.environ and prepare is not None:
        return run_rank(name, prepare, _load(work), words)
    if prepare is None:
        _load(work)(config.read(name, overrides.with_search_path(words)))
        return 0
    if sweep.FLAGS & set(words):
        return sweep.run(name, overrides.with_search_path(words))
    return run_launcher(name, prepare, overrides.with_search_path(words))


def _load(function: str) -> Any:
    found = modelpar.load(function)
    gc.freeze()  # imported objects live until exit, so no collection needs to search them
    return found


# -- the launcher ---------------------------------------------------------------------------------


def run_launcher(name: str, prepare: Prepare, words: list[str]) -> int:
    """Check everything in this process, then start the ranks; return the exit status."""
    settings, run_dir = config.read_run(name, words)
    if isinstance(settings, TrainSettings) and settings.debug.dry:
        modelpar.load("training.dry:show")(settings)
        return 0
    one_gpu = settings.device == "auto" and torch.cuda.device_count() == 1
    pair = (settings.columns, settings.replicas) == (2, 1)
    if one_gpu and pair and not settings.share_gpu:  # the pair would not use it
        words = [*words, "columns=1"]
        settings = config.read(name, words)
    ranks = settings.columns * settings.replicas
    device.choose_device(settings.device, ranks, share_gpu=settings.share_gpu)
    prepare(settings, run_dir)
    return _start_ranks(name, words, settings, run_dir and run_dir.absolute())


def _start_ranks(name: str, words: list[str], settings: Any, run_dir: Path | None) -> int:
    """Run torchrun's agent, again after a lost rank ``restarts`` times; return the exit status."""
    ranks = settings.columns * settings.replicas
    logging.disable()  # the agent's multi-line log: the ranks report in one line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, device.num_cores() // ranks)))
    os.environ[environment.LAUNCHER] = str(os.getpid())
    if run_dir is not None:
        words = [word for word in words if not overrides.FOLDER.match(word)]
        words.append(overrides.quoted("run_dir", run_dir))
    arguments = environment.python_arguments(name, words)
    status, restarts = 0, getattr(settings, "restarts", 0)
    # A rank that is blocked in a collective runs no signal handler: a second signal kills it.
    request = shutdown.Request(_stop_agent, shutdown.kill_children)
    try:
        with shutdown.signals_noted(request):
            for attempt in range(restarts + 1):
                if attempt:
                    errors.say(f"a rank was lost; starting again ({attempt} of {restarts})")
                _forget(run_dir)
                start = _run_agent if ranks > 1 else _run_alone
                status = start(arguments, ranks, run_dir)
                if status != PeerLostError.status:
                    break
    except SignalException as error:
        status = recorded_status(run_dir)
        if not status:
            errors.say(f"stopped ({error.sigval.name})")
            status = 128 + error.sigval
    return status


def _run_agent(arguments: list[str], ranks: int, run_dir: Path | None) -> int:
    """Run one agent of torchrun until its ranks have exited; return the first failed status."""
    try:  # torch would try again for minutes
        with socket.create_server((LOCAL, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        line = limits.reached(error) or (
            f"processes of this host cannot connect to {LOCAL} ({error.strerror or error}); "
            "bring up the interface lo, or use columns=1 replicas=1"
        )
        return errors.report(LaunchError(line))
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOCAL}:0",  # a free port; the host's name need not resolve
        local_addr=LOCAL,
        max_restarts=0,  # the agent would also restart after errors that come again
        signals_to_handle="SIGQUIT",  # the others are handled here
    )
    if hasattr(agent, "shutdown_timeout"):  # torch 2.11 always waits 30 s
        agent.shutdown_timeout = SAVE_SECONDS
    lookup, socket.getfqdn = socket.getfqdn, lambda name="": name or socket.gethostname()
    try:  # the agent records the host's name, and a name that nothing resolves takes half a minute
        elastic_launch(agent, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _status(failure.exitcode, rank, run_dir)
    except (RuntimeError, OSError, RendezvousError) as error:
        line = limits.reached(error) or f"cannot start the ranks ({errors.one_line(error)})"
        return errors.report(LaunchError(line))
    finally:
        socket.getfqdn = lookup
    return 0


def _run_alone(arguments: list[str], _ranks: int, run_dir: Path | None) -> int:
    """Run a single rank, which needs no network, until it has exited; return its status."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    command = [sys.executable, *arguments]
    with subprocess.Popen(  # noqa: S603 - our command
        command, env={**os.environ, **world}, start_new_session=True
    ) as rank:
        try:
            code = rank.wait()
        except SignalException as error:
            rank.send_signal(error.sigval)
            with suppress(subprocess.TimeoutExpired):
                rank.wait(SAVE_SECONDS)
            rank.kill()
            if (code := rank.returncode) != 0:  # else it has finished its work
                raise
    return _status(code, 0, run_dir)


def _status(code: int, rank: int, run_dir: Path | None) -> int:
    """Return the status of a run from the ``code`` with which the first rank has exited."""
    if code >= 0:
        return code  # it has reported its error itself
    hint = ", often out of memory" if code == -signal.SIGKILL else ""
    lost = PeerLostError(f"rank {rank} was killed by {signal.Signals(-code).name}{hint}")
    _record(lost, run_dir, rank)
    return errors.report(lost)


def _stop_agent(number: int) -> NoReturn:
    """Make the agent forward the signal to the ranks, wait until they have exited, and return."""
    raise SignalException(f"signal {number}", signal.Signals(number))


# -- a rank ---------------------------------------------------------------------------------------


def run_rank(name: str, prepare: Prepare, work: Callable[..., None], words: list[str]) -> int:
    """Run one rank from start to end; return its exit status."""
    run_dir: Path | None = None
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit without a traceback
        env = environment.read()
        settings, place = _rank_settings(name, words, env)
        with process_mesh(
            settings.columns,
            settings.device,
            settings.comm.timeout,
            threads=settings.threads,
            tf32=settings.tf32,
            deterministic=settings.deterministic,
        ) as mesh:
            _check_same(settings, mesh)
            starts = mesh.gather_objects((place, env.run_dir_checked))
            place = starts[0][0]  # a new one has the time in its name
            checked = any(flag for _, flag in starts)
            with mesh.all_or_none(long_timeout=True):
                prepared = prepare(settings, None if checked else place)
            run_dir = place
            return _work(partial(work, settings, prepared, mesh, run_dir), settings, mesh, run_dir)
    except BaseException as error:  # noqa: BLE001 - every error has its exit status
        status = report_from_rank(error, run_dir)
        exit_if_groups_remain(status)
        return status


def _rank_settings(name: str, words: list[str], env: Environment) -> tuple[Any, Path | None]:
    """Return settings fitted to the world that torchrun started, and a run directory."""
    words = overrides.with_search_path(words)
    if any(word.startswith("-") for word in words):
        fix = shlex.join(["python", "-m", f"modelpar.{name}", *words])
        raise errors.SettingsError(f"flags do not work under torchrun; use {fix}")
    settings, run_dir = config.read_run(name, words)
    if isinstance(settings, TrainSettings) and settings.debug.dry:
        raise errors.SettingsError("debug.dry=true: starts no ranks; use modelpar-train")
    settings.replicas = env.num_replicas(settings.columns, settings.replicas)
    kind = device.choose_device(settings.device, env.local_size, share_gpu=settings.share_gpu)
    note = device.unused_gpus(settings.device, env.local_size)
    if note and kind == "cpu" and env.rank == 0:
        errors.say(note)
    settings.device = kind
    device.check_precision(settings.device, settings.precision)
    return settings, run_dir


def _work(work: Callable[[], None], settings: Any, mesh: Mesh, run_dir: Path | None) -> int:
    """Do the command's work on this rank; return its exit status."""
    status = 0
    if mesh.rank == 0:
        print(f"modelpar: {mesh.describe()}, {settings.precision}", flush=True)  # noqa: T201
        if warning := device.oversubscription_warning(mesh.threads):
            errors.say(warning)
        _forget(run_dir)
    try:
        with resource_errors(settings, mesh, run_dir):
            work()
    except StoppedError as error:  # raised by all ranks, at the same step
        status = report_from_rank(error, run_dir)
    # All ranks exit together: the agent terminates the others as soon as one fails, and waits
    # without limit for one that hangs after the others have exited.
    mesh.gather_ints((status,))
    return status


def _check_same(settings: Any, mesh: Mesh) -> None:
    """Raise LaunchError on all ranks if one runs other versions or settings than rank 0."""
    mine = {"modelpar": modelpar.__version__, "torch": torch.__version__, **flatten(settings)}
    shared = {key: value for key, value in mine.items() if not key.startswith(HOST_SETTINGS)}
    first, *others = mesh.gather_objects(shared)
    for rank, other in enumerate(others, 1):
        for key in first.keys() | other.keys():
            theirs, ours = (json.dumps(one.get(key)) for one in (other, first))
            if theirs != ours:
                raise LaunchError(
                    f"rank {rank} has {key}={theirs}, rank 0 has {ours}; use the same everywhere"
                )


@contextmanager
def resource_errors(settings: Any, mesh: Mesh, run_dir: Path | None) -> Generator[None]:
    """Raise CheckpointError for a full disk, LaunchError for full memory."""
    try:
        yield
    except OSError as error:
        if error.errno not in errors.FULL or not run_dir:
            raise
        raise CheckpointError(
            f"{run_dir}: {error.strerror}; free some space, saved checkpoints are intact"
        ) from None
    except RuntimeError as error:
        if not device.is_out_of_memory(error):
            raise
        fix = "accumulate=N, " * hasattr(settings, "accumulate")
        raise LaunchError(
            f"rank {mesh.rank}: out of memory on {device.memory(mesh.device)} at "
            f"batch_size={settings.batch_size}; use {fix}a smaller one"
        ) from None


# -- the end of a rank ----------------------------------------------------------------------------


def report_from_rank(error: BaseException, run_dir: Path | None) -> int:
    """Report ``error`` from local rank 0, record it in the run directory; return its status.

    torchrun terminates all ranks as soon as one exits, so the others wait before they report an
    error of their own.  A rank that merely lost another one waits longest.
    """
    local_rank0 = os.environ.get("LOCAL_RANK", "0") == "0"
    lost = isinstance(error, PeerLostError)
    if not isinstance(error, InUseError) and not (lost and recorded_status(run_dir)):
        _record(error, run_dir, os.environ.get("RANK", "0"))
    if isinstance(error, StoppedError) and not local_rank0:
        return error.status
    if lost and not error.stop_requested:
        time.sleep(2 * FIRST_ERROR_SECONDS)
    elif not local_rank0:
        time.sleep(FIRST_ERROR_SECONDS)
    return errors.report(error)


def _record(error: BaseException, run_dir: Path | None, rank: int | str) -> None:
    """Leave exit status and line in the run directory, if there is one."""
    if run_dir is not None and run_dir.is_dir():
        status, line = errors.describe(error)
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        row = {"status": status, "line": line, "rank": int(rank), "time": when}
        with suppress(OSError):
            (run_dir / EXIT).parent.mkdir(exist_ok=True)
            atomic_write(run_dir / EXIT, json.dumps(row) + "\n")


def recorded_status(run_dir: Path | None) -> int:
    """Return the exit status that a rank left, 0 if none did."""
    with suppress(OSError, ValueError, KeyError):
        return int(json.loads((run_dir / EXIT).read_text("utf-8"))["status"]) if run_dir else 0
    return 0


def _forget(run_dir: Path | None) -> None:
    """Delete the exit status of an earlier start."""
    if run_dir is not None:
        (run_dir / EXIT).unlink(missing_ok=True)
