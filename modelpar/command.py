"""The start of every command: makes the process usable, then imports and runs the rest.

Daemons, containers and notebooks start processes without standard streams, without a home, or
with variables for other programs.  This module needs no torch, so it corrects them before a
library reads them, and a library that cannot be imported is one line as well.
"""

import getpass
import io
import logging
import os
import resource
import select
import stat
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

import modelpar
from modelpar import errors, limits
from modelpar.errors import LaunchError

TORCH_BYTES: Final = 4 << 30  # torch 2.14 for CPUs aborts a process that may have 3 GB
# Flags that print something and exit without importing torch, and the function for each.
SHOWS: Final = {
    **dict.fromkeys(("--help", "-h"), "help:show"),
    "--version": "help:version",
    **dict.fromkeys(("--shell-completion", "-sc"), "config:complete"),
    **dict.fromkeys(("--hydra-help", "--cfg", "-c", "--info", "-i"), "config:show"),
}
# Matplotlib's notes about text: glyphs that its font lacks, names that are too long for a panel.
NOTES: Final = "Glyph|constrained_layout|Tight layout"


def main(name: str, work: str, prepare: str = "") -> NoReturn:
    """Run the command ``name``; exit with its status.

    ``work`` and ``prepare`` are the arguments of ``launch.run``, as MODULE:FUNCTION.
    """
    open_streams()
    # A process that multiprocessing starts imports the main module again, and would run a script
    # that calls this function once more.
    script, sys.modules["__main__"] = sys.modules["__main__"], sys.modules[__name__]
    status = errors.status_of(lambda: _run(name, work, prepare))
    sys.modules["__main__"] = script
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if (failure := getattr(sys.stdout, "failure", None)) and failure.errno in errors.FULL:
        errors.say(f"standard output: {failure.strerror}, so some lines are missing")
    sys.exit(status)


def _run(name: str, work: str, prepare: str) -> int:
    flags = {word.partition("=")[0] for word in sys.argv[1:] if word.startswith("-")}
    is_rank = bool(prepare) and "RANK" in os.environ
    if is_rank:  # now, since a launcher can end in the seconds in which torch is imported
        modelpar.load("environment:exit_with_parent")()
    if flags & SHOWS.keys() and not is_rank:  # a rank refuses flags
        modelpar.load(next(show for flag, show in SHOWS.items() if flag in flags))(name)
        return 0
    if threading.current_thread() is not threading.main_thread():
        raise LaunchError("a command handles signals; call it in the main thread of a process")
    try:
        Path.cwd()
    except FileNotFoundError:  # torch's libraries would end the process
        raise LaunchError("the working directory was deleted; change to another one") from None
    set_variables()
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if TORCH_BYTES > allowed != resource.RLIM_INFINITY:
        raise LaunchError(
            f"torch needs {TORCH_BYTES} bytes of addresses, and the system allows {allowed}; "
            "raise ulimit -v"
        )
    _start_threads()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its cache need not be writable
    warnings.filterwarnings("ignore", NOTES, UserWarning)
    run, *functions = [modelpar.load(part) for part in ("launch:run", prepare) if part]
    return run(name, work, *functions)


# -- standard streams -----------------------------------------------------------------------------


class Output(io.TextIOWrapper):
    """A standard stream that never ends a command: what it does not take is dropped."""

    waits = True  # for a reader that is slow; not while other ranks would wait for this one
    failure: OSError | None = None  # the last one

    def write(self, text: str, /) -> int:
        """Write ``text`` and return its length."""
        try:
            if self.waits or select.select([], [self], [], 0)[1]:
                super().write(text)
        except OSError as error:
            self.failure = error
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            super().flush()
        except OSError as error:
            self.failure = error


def open_streams() -> None:
    """Open missing standard streams on the null device; let no output end this process."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would become this stream
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)  # noqa: FBT003 - it takes no keyword
        stream = getattr(sys, name)
        if stream is None and name == "stdin":
            sys.stdin = open(number, closefd=False)  # noqa: SIM115 - a descriptor
        elif name != "stdin" and (stream is None or _is_descriptor(stream, number)):
            encoding = stream.encoding if stream else "utf-8"
            raw = open(number, "wb", closefd=False)  # noqa: SIM115
            output = Output(raw, encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, output)


def _is_descriptor(stream: object, number: int) -> bool:
    """Return whether ``stream`` is the interpreter's own and not one that captures output."""
    return type(stream) is io.TextIOWrapper and stream.fileno() == number


# -- the environment ------------------------------------------------------------------------------


def set_variables() -> None:
    """Correct variables that the libraries would read; raises LaunchError."""
    # Figures are files: neither a notebook's backend nor the user's style belongs to them.
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no messages about connections
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's log
    _set_threads()
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's user; torch.compile needs a name
        os.environ["USER"] = f"uid{os.getuid()}"
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    caches = os.environ.get("XDG_CACHE_HOME") or (home and home / ".cache")
    if not (caches and _can_write(Path(caches))):
        spare = _temporary_folder()
        os.environ["XDG_CACHE_HOME"] = str(spare)
        os.environ.setdefault("TRITON_CACHE_DIR", str(spare / "triton"))
        if home is None:
            os.environ["HOME"] = str(spare)


def _set_threads() -> None:
    """Keep the first number of OMP_NUM_THREADS; the others are for nested parallel regions."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    first = given.partition(",")[0].strip()
    if first.strip("0"):
        if not (first.isascii() and first.isdecimal() and int(first) <= limits.THREADS):
            raise LaunchError(
                f"OMP_NUM_THREADS={given}: must be a whole number up to {limits.THREADS}; correct "
                "or unset it"
            )
        os.environ["OMP_NUM_THREADS"] = first
    else:  # OpenMP would print a warning
        os.environ.pop("OMP_NUM_THREADS", None)


def _start_threads() -> None:
    """Start as many threads as OpenMP will, which ends a process that may not have them."""
    done = threading.Event()
    try:
        for _ in range(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))):
            threading.Thread(target=done.wait, daemon=True).start()
    finally:
        done.set()


def _can_write(folder: Path) -> bool:
    """Return whether files can be created in ``folder``, which need not exist yet."""
    with suppress(OSError):
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return False


def _temporary_folder() -> Path:
    """Return this user's folder among the temporary files, or a new one if it is another's."""
    folder = Path(tempfile.gettempdir(), f"modelpar-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
