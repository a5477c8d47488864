"""The ranks of door 2: torchrun's agent, started for one job, and what each rank runs."""

import logging
import math
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any, Final

from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from modelpar import config, device, distributed, ends, environment, jobs
from modelpar.errors import PeerLostError, RunError, StoppedError
from modelpar.jobs import Job
from modelpar.settings import check
from modelpar.shutdown import DEBOUNCE_SECONDS

THREADS_GIVEN: Final = "OMP_NUM_THREADS" in os.environ
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


def place(settings: Any) -> tuple[Any, int]:
    """Fix device and number of ranks: the pair, or the whole net where there is just one GPU.

    Raises SettingsError where the whole net would ignore what the settings say of the crossings.
    """
    ranks = settings.columns * settings.replicas
    one_gpu = (
        device.choose_device("auto", ranks) == "cpu" and device.choose_device("auto", 1) == "cuda"
    )
    if settings.device == "auto" and settings.replicas == 1 and one_gpu:
        settings.columns, ranks = 1, 1
        check(settings)
    settings.device = device.choose_device(settings.device, ranks)
    return settings, ranks


def launch(
    job: Job,
    settings: Any,
    ranks: int,
    run_dir: Path,
    handled: Sequence[signal.Signals] = HANDLED,
) -> float:
    """Start torchrun's agent for ``job`` as it was checked; return the objective of its ranks.

    Raises what the first rank to fail died of, KeyboardInterrupt where one of the signals
    ``handled`` ends the agent.
    """
    if not THREADS_GIVEN:  # of this job alone: the next of a sweep may have other ranks
        os.environ["OMP_NUM_THREADS"] = str(max(1, device.num_cores() // ranks))
    # A restarted pair that shares the agent's store reads stale addresses and hangs.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Inside joblib's workers the default is a context of joblib's own, which has no processes.
    multiprocessing.set_start_method("spawn", force=True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.CRITICAL)  # we say it in one line
    # Ranks that end by themselves leave a semaphore to Python's tracker, which tells of it.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    launcher = uuid.uuid4().hex
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=launcher,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port: parallel jobs do not collide
        max_restarts=getattr(settings, "restarts", 0),
        signals_to_handle=",".join(number.name for number in handled),
        shutdown_timeout=SHUTDOWN,
    )
    kept = run_dir if job.keeps_runs else None
    ends.forget(kept)
    with _signals_restored(), _second_signal_kills():
        try:
            results = elastic_launch(agent, _rank)(job, asdict(settings), str(run_dir))
        except SignalException as error:  # Hydra would take it for a failed job and go on
            ends.raise_final(kept, launcher)
            raise KeyboardInterrupt(f"signal {error.sigval}") from None
        except ChildFailedError as error:
            ends.raise_final(kept, launcher)
            cause = ends.cause(error)
            rank, _ = error.get_first_failure()
            ends.record(kept, cause.status, str(cause), rank, launcher)
            raise cause from None
    ends.raise_final(kept, launcher)
    ends.forget(kept)  # of a process that was lost, and started again
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


@contextmanager
def _second_signal_kills() -> Generator[None]:
    """Kill the ranks at a signal that is no echo of the first: one that is blocked hears none.

    The agent would give them its whole patience, from the beginning.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    before = -1
    with suppress(ValueError):  # not the main thread: signals are another's
        before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)

    def listen() -> None:
        first = 0.0
        while number := os.read(readable, 1):
            now = time.monotonic()
            if number[0] in HANDLED:
                first = first or now
            if first and now - first > DEBOUNCE_SECONDS:
                for rank in multiprocessing.active_children():
                    rank.kill()
        os.close(readable)

    Thread(target=listen, name="second signal", daemon=True).start()
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.set_wakeup_fd(before)
        os.close(writable)


def _rank(job: Job, plain: dict[str, Any], run_dir: str) -> float:
    """Run in each process that the agent starts."""
    settings = config.typed(job.name, OmegaConf.create(plain))
    environment.exit_with_parent()
    kept = Path(run_dir) if job.keeps_runs else None
    where, launcher = environment.read(), os.environ["TORCHELASTIC_RUN_ID"]
    if where.attempt and ends.final(ends.recorded(kept, launcher)):
        return math.nan  # not to be tried again: the agent takes any end but 0 for a failure
    try:
        store = distributed.meet({}, settings.comm.timeout).store
        prepared = distributed.prepare_together(
            lambda: job.prepare(settings, None), store, settings.comm.timeout
        )
        with jobs.opened(settings, store) as ranks:
            return jobs.work(job, prepared, settings, ranks, Path(run_dir), where.attempt)
    except StoppedError as error:
        # Each says so: the first that leaves may take the others along.
        ends.record(kept, error.status, str(error), where.rank, launcher)
        # To return would be to wait for an agent that is shutting down and asks for no result.
        sys.exit(error.status)
    except PeerLostError as error:
        jobs.let_others_speak(error)  # the lost rank's own end comes first
        raise
    except RunError as error:
        ends.record(kept, error.status, str(error), where.rank, launcher)
        raise
    finally:
        ends.let_go()
