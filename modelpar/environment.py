"""The variables that torchrun sets for each rank, and the rank's tie to its launcher."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelpar.errors import LaunchError

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
LAUNCHER: Final = "MODELPAR_LAUNCHER"  # process id of our launcher, set for the ranks it starts


@dataclass(frozen=True)
class Environment:
    """This process among those that torchrun started; 0 of 1 without torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    one_host: bool = True  # all ranks are known to run on this host
    run_dir_checked: bool = False  # by our launcher, or before torchrun restarted this rank

    def num_replicas(self, columns: int, replicas: int = 1) -> int:
        """Return how many replicas there are: any number for replicas 1; raises LaunchError."""
        wanted = columns * replicas
        if self.world_size % columns or (replicas > 1 and self.world_size != wanted):
            raise LaunchError(
                f"columns={columns} replicas={replicas}: a world of {self.world_size} does not "
                f"fit; use --nproc-per-node {wanted}"
            )
        return self.world_size // columns

    def has_ranks(self, ranks: Sequence[int]) -> bool:
        """Return whether all ``ranks`` run on the host of this one."""
        first = self.rank - self.local_rank
        return first <= min(ranks) and max(ranks) < first + self.local_size


def read() -> Environment:
    """Return what torchrun's variables say; raises LaunchError for impossible values."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Environment()
    rank, size = integer("RANK"), integer("WORLD_SIZE")
    if rank >= size:
        raise LaunchError(f"RANK={rank}: must be less than WORLD_SIZE={size}; use torchrun")
    if size > 1 and integer("MASTER_PORT") and "MASTER_ADDR" not in os.environ:
        raise LaunchError("MASTER_ADDR is not set; use torchrun")
    return Environment(
        rank,
        size,
        local_rank=integer("LOCAL_RANK", 0),
        local_size=integer("LOCAL_WORLD_SIZE", size),
        one_host=integer("LOCAL_WORLD_SIZE", 0) == size,
        run_dir_checked=LAUNCHER in os.environ or integer("TORCHELASTIC_RESTART_COUNT", 0) > 0,
    )


def integer(name: str, default: int | None = None) -> int:
    """Return a whole number from the environment; raises LaunchError if it is none."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdecimal()):
        problem = f"{name}={text}" if text else f"{name} is not set"
        raise LaunchError(f"{problem}: must be a whole number; use torchrun, which sets it")
    return int(text)


def python_arguments(command: str, words: Sequence[str]) -> list[str]:
    """Return the arguments for Python to run ``modelpar.COMMAND`` from where this process does."""
    # -m adds the working directory to the path, where this process may not look for modules.
    path = ["-m"] if sys.path[0] in {"", str(Path.cwd())} else ["-P", "-m"]
    return [*path, f"modelpar.{command}", *words]


def exit_with_parent() -> None:
    """Have the kernel send SIGTERM to this rank when its launcher ends, even by SIGKILL.

    Raises LaunchError if our launcher has ended already.
    """
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):  # Linux
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
        raise LaunchError("the launcher has ended; start the run again")


def commit(package: Path) -> str | None:
    """Return the commit that ``package`` is at, with ``-dirty`` if files differ; None: no commit.

    A package that is installed inside another project's working tree is not of its commits.
    """
    git = ["git", "-C", str(package)]
    for words in (
        ["ls-files", "--error-unmatch", "__init__.py"],
        ["describe", "--always", "--dirty"],
    ):
        try:
            found = subprocess.run(  # noqa: S603
                [*git, *words], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
    return found.stdout.strip()
