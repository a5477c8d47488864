"""How a rank exits: one line on stderr, an exit status, and ``log/exit.json`` of its run.

torchrun itself always exits with 1, so a script finds the status of a failed run in that file.
"""

import json
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from modelpar import environment
from modelpar.errors import PeerLostError, StoppedError, describe, report
from modelpar.files import atomic_write

FIRST_ERROR_SECONDS: Final = 5.0  # that other ranks leave local rank 0 to report the same error


def report_from_rank(error: BaseException, run_dir: Path | None) -> int:
    """Report ``error`` from local rank 0, record it in the run directory; return its status.

    torchrun terminates all ranks as soon as one exits, so the others wait before they report an
    error of their own.  A rank that merely lost another one waits longest.
    """
    local_rank0 = environment.is_local_rank0()
    lost = isinstance(error, PeerLostError)
    if run_dir is not None and not (lost and exit_file(run_dir).exists()):
        record(error, run_dir, environment.read().rank)
    if isinstance(error, StoppedError) and not local_rank0:
        return error.status
    if lost and not error.stop_requested:
        time.sleep(2 * FIRST_ERROR_SECONDS)
    elif not local_rank0:
        time.sleep(FIRST_ERROR_SECONDS)
    return report(error)


def exit_file(run_dir: Path) -> Path:
    """Return where a run that failed leaves its exit status."""
    return run_dir / "log" / "exit.json"


def record(error: BaseException, run_dir: Path | None, rank: int) -> None:
    """Leave exit status and line in the run directory, if there is one."""
    if run_dir is None or not run_dir.is_dir():
        return
    status, line = describe(error)
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    row = {"status": status, "line": line, "rank": rank, "time": when}
    with suppress(OSError):
        exit_file(run_dir).parent.mkdir(exist_ok=True)
        atomic_write(exit_file(run_dir), json.dumps(row) + "\n")


def read(run_dir: Path) -> int:
    """Return the exit status that a rank left, 0 if none did."""
    with suppress(OSError, ValueError, KeyError):
        return int(json.loads(exit_file(run_dir).read_text())["status"])
    return 0
