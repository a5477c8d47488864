"""One job: a main of ``conf/``, what it needs before its ranks start, and what each rank does."""

import errno
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch.distributed import Store

from modelpar import device, distributed, ends, environment
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, LaunchError, PeerLostError
from modelpar.images import loader

PATIENCE: Final = 5.0  # s that a rank waits for local rank 0 to speak first


@dataclass(frozen=True)
class Job:
    """One main: its name in ``conf/``, what it needs before a group starts, what every rank runs.

    ``prepare`` gets settings and run directory (None: a new one, or one that was checked), raises
    for all that can be known before a process starts, creates nothing but what the cache holds,
    and returns what ``work`` needs.  ``work`` gets that, the settings, the mesh and the run
    directory, and returns the objective.  ``over`` gets the same without the mesh, and returns the
    objective of a run that is over already, None where there is something to do.  All must be
    functions of a module, for ``spawn`` to find them.  ``keeps_runs``: whether it has a run
    directory at all.
    """

    name: str
    prepare: Callable[[Any, Path | None], Any]
    work: Callable[[Any, Any, Mesh, Path], float]
    over: Callable[[Any, Any, Path], float | None] | None = None
    keeps_runs: bool = True


def opened(settings: Any, store: Store | None = None) -> AbstractContextManager[Mesh]:
    """Join the mesh that the settings ask for, on this rank's device."""
    kind = device.choose_device(settings.device, environment.read().local_size)
    device.check_precision(kind, getattr(settings, "precision", ""))
    return distributed.process_mesh(
        settings.columns,
        settings.device,
        settings.comm.timeout,
        threads=settings.threads,
        tf32=settings.tf32,
        store=store,
    )


def work(
    job: Job, prepared: Any, settings: Any, ranks: Mesh, run_dir: Path, attempt: int
) -> float:
    """Do the job's work on this rank; return its objective.

    Raises CheckpointError where the disk is full, LaunchError where memory is.
    """
    if ranks.rank == 0:
        with suppress(OSError):  # nobody reads it
            print(f"modelpar: {ranks.describe()}, {settings.precision}", flush=True)  # noqa: T201
        if complaint := device.oversubscription_warning(ranks.threads):
            ends.say(complaint)
        if attempt:
            ends.say(f"a process was lost; all were started again, for the {attempt}. time")
    try:
        objective = job.work(prepared, settings, ranks, run_dir)
        # All leave together: an agent waits without end for one that stands still after the rest.
        ranks.gather_text("")
        return objective  # noqa: TRY300
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise CheckpointError(
            f"{run_dir}: {error.strerror}; make room, what is saved is as it was"
        ) from None
    except RuntimeError as error:
        if ended := loader.worker_killed_message(
            error
        ):  # torch's signal handler speaks up in any step
            raise LaunchError(ended) from None
        if not device.is_out_of_memory(error):
            raise
        raise LaunchError(
            f"rank {ranks.rank}: out of memory on {device.memory(ranks.device)} at "
            f"batch_size={settings.batch_size}; give a smaller one, or more replicas"
        ) from None


def let_others_speak(error: BaseException) -> None:
    """Wait for the rank whose end comes first, but where the launcher ends this one."""
    if not (isinstance(error, PeerLostError) and error.asked):
        time.sleep(PATIENCE)
