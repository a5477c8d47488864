"""Progress bars, and the lines above them.

A bar is redrawn on a terminal.  In a log file it is a line every ten seconds.
"""

import sys
from typing import Any, Final

from tqdm import tqdm

LOG_FILE_INTERVAL: Final = 10.0  # s between the lines of a bar in a log file


class _LogFile:
    """Standard error that is no terminal: each state of a bar is a line of its own."""

    def write(self, text: str) -> None:
        """Write a state of the bar, which begins with a carriage return."""
        if line := text.strip():
            print(line, file=sys.stderr)  # noqa: T201

    def flush(self) -> None:
        """Write what is buffered."""
        sys.stderr.flush()


def progress_bar(*, shown: bool = True, **options: Any) -> Any:
    """Return a tqdm bar on standard error with tqdm's ``options``."""
    terminal = sys.stderr.isatty()
    return tqdm(
        file=None if terminal else _LogFile(),
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else LOG_FILE_INTERVAL,
        disable=not shown,
        **options,
    )


def show(line: str) -> None:
    """Print a line above the bar."""
    tqdm.write(line)
