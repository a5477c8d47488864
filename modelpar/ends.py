"""How an end is told: an exit status, one line, and ``log/exit.json`` in the run's directory."""

import json
import os
import signal
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from modelpar.errors import LaunchError, PeerLostError, RunError, one_line

END: Final = Path("log/exit.json")  # in a run directory: how it ended, if not well


def status(error: BaseException) -> tuple[int, str]:
    """Return the exit status of ``error``, and its line."""
    if isinstance(error, RunError):
        return error.status, one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped"  # 128 + SIGINT, as shells count
    return 1, f"{type(error).__name__}: {one_line(error)}"


def say(line: str) -> None:
    """Write the line that a user sees, if one does: a file's name may not be fit to be printed."""
    with suppress(OSError):
        sys.stderr.write(f"modelpar: {' '.join(line.split())}\n")
        sys.stderr.flush()


def let_go() -> None:
    """Let this process end as it does where nobody reads it any more, as behind ``| head``."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again, and end with a status of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def record(run_dir: Path | None, number: int, line: str, rank: int, launcher: str = "") -> None:
    """Leave status and line in the run directory, where it exists."""
    if run_dir is None or not run_dir.is_dir():
        return
    with suppress(OSError):
        (run_dir / "log").mkdir(exist_ok=True)
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        end = {"status": number, "line": line, "rank": rank, "time": when, "launcher": launcher}
        unfinished = run_dir / f"{END}.{rank}"  # several may write, and be ended while they do
        unfinished.write_text(json.dumps(end) + "\n")
        unfinished.replace(run_dir / END)


def recorded(run_dir: Path | None, launcher: str | None = None) -> RunError | None:
    """Return the end that another rank has left, None where none has.

    ``launcher``: of this start of it alone, not of an earlier one.
    """
    if run_dir is None:
        return None
    with suppress(OSError, ValueError, KeyError):
        end = json.loads((run_dir / END).read_text())
        if launcher is not None and end["launcher"] != launcher:
            return None
        for kind in RunError.__subclasses__():
            if kind.status == end["status"]:
                return kind(end["line"])
    return None


def final(error: BaseException | None) -> bool:
    """Whether ``error`` would come again if the processes were started again, as they are."""
    return isinstance(error, RunError) and not isinstance(error, (PeerLostError, LaunchError))


def forget(run_dir: Path | None) -> None:
    """Remove an earlier start's end."""
    if run_dir is not None:
        (run_dir / END).unlink(missing_ok=True)


def raise_final(run_dir: Path | None, launcher: str | None = None) -> None:
    """Raise what the ranks say that they ended with, where it is not to be tried again."""
    error = recorded(run_dir, launcher)
    if error is not None and final(error):
        raise error


def cause(error: ChildFailedError) -> RunError:
    """Return what the first rank to fail died of."""
    rank, failure = error.get_first_failure()
    told: Any = failure.message
    if isinstance(told, dict):
        name, _, line = one_line(Exception(told["message"])).partition(": ")
        for kind in RunError.__subclasses__():
            if kind.__name__ == name:
                return kind(line)
        sys.stderr.write(told["extraInfo"]["py_callstack"])  # a bug: once, from who failed first
        return RunError(f"rank {rank}: {name}: {line}")
    if failure.exitcode < 0:
        often = ", often out of memory" if failure.exitcode == -signal.SIGKILL else ""
        return PeerLostError(f"rank {rank} was ended by {failure.signal_name()}{often}")
    return LaunchError(f"rank {rank} ended with status {failure.exitcode}: {told}")
