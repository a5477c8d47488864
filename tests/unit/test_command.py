"""The start of a command: missing streams, readers, homes and limits end no command badly."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from modelpar import command, errors, limits
from modelpar.command import Output
from modelpar.errors import LaunchError

CLOSED = """
import json, os, subprocess, sys
from modelpar import command
command.open_streams()
print("nobody reads this")
print("nor this", file=sys.stderr)
child = [sys.executable, "-c", "import os; os.fstat(0), os.fstat(1), os.fstat(2)"]
streams = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
given = {"streams": streams, "read": sys.stdin.read(), "child": subprocess.run(child).returncode}
open("found.json", "w").write(json.dumps(given))
"""
SPAWNS = """
import multiprocessing
import modelpar
from modelpar import command
def run(name, work):
    process = multiprocessing.get_context("spawn").Process(target=print, args=("child",))
    process.start()
    process.join()
    return process.exitcode
modelpar.load = lambda part: run
command.main("train", "")
"""


def python(folder: Path, *words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(command.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, text=True, check=False, timeout=60, **how
    )


def test_closed_streams_are_opened_on_the_null_device(tmp_path: Path) -> None:
    def close() -> None:
        for number in range(3):
            os.close(number)

    assert python(tmp_path, "-c", CLOSED, preexec_fn=close).returncode == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"streams": ["/dev/null"] * 3, "read": "", "child": 0}


def output(number: int, encoding: str = "utf-8") -> Output:
    return Output(open(number, "wb"), encoding, "backslashreplace", line_buffering=True)


def test_output_that_nobody_reads_is_dropped() -> None:
    readable, writable = os.pipe()
    os.close(readable)
    gone, full = output(writable), output(os.open("/dev/full", os.O_WRONLY))
    for stream, code in ((gone, errno.EPIPE), (full, errno.ENOSPC)):
        print("a line", file=stream, flush=True)
        assert stream.failure is not None
        assert stream.failure.errno == code


def test_output_escapes_what_its_encoding_lacks() -> None:
    readable, writable = os.pipe()
    print("día \udcff", file=output(writable, "ascii"))
    assert os.read(readable, 100) == b"d\\xeda \\udcff\n"


def test_a_training_does_not_wait_for_a_reader_that_has_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Output, "waits", False)
    readable, writable = os.pipe()
    stream = output(writable)
    for _ in range(2000):  # of a pipe that holds 64 KiB
        print("x" * 99, file=stream)
    assert b"x" * 99 in os.read(readable, 1 << 20)
    print("it reads again", file=stream)
    assert b"it reads again" in os.read(readable, 1 << 20)


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_script_without_a_guard_is_not_run_again_in_its_processes(
    tmp_path: Path, way: str
) -> None:
    (tmp_path / "script.py").write_text(SPAWNS)
    with (tmp_path / "script.py").open() as file:
        words = ["script.py"] if way == "file" else ["-"]
        done = python(tmp_path, *words, stdin=file, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "child\n", "")


GONE = """
import os, threading
from modelpar import train
if {thread}:
    one = threading.Thread(target=train.main)
    one.start(), one.join()
else:
    os.rmdir(os.getcwd())
    train.main()
"""


@pytest.mark.parametrize(
    ("thread", "line"),
    [
        (True, "modelpar: a command handles signals; call it in the main thread of a process\n"),
        (False, "modelpar: the working directory was deleted; change to another one\n"),
    ],
)
def test_a_place_where_a_command_cannot_run_is_one_line(
    tmp_path: Path, *, thread: bool, line: str
) -> None:
    (place := tmp_path / "place").mkdir()
    done = python(place, "-c", GONE.format(thread=thread), capture_output=True)
    assert (done.returncode, done.stderr) == (0 if thread else 5, line)


EARLY = """
import sys
from modelpar import environment, train
def tied():
    print("torch" in sys.modules)
    sys.exit()
environment.exit_with_parent = tied
train.main()
"""


def test_a_rank_is_tied_to_its_launcher_before_torch_is_imported(tmp_path: Path) -> None:
    """Importing torch takes seconds, in which torchrun may be killed."""
    done = subprocess.run(
        [sys.executable, "-c", EARLY],
        cwd=tmp_path,
        env={**os.environ, "RANK": "0", "PYTHONPATH": str(Path(command.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


# -- variables ------------------------------------------------------------------------------------


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A copy of the environment, and a folder for temporary files."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("4,2", "4"),
        (" 3 , 1", "3"),
        (" 2", "2"),
        ("", None),
        ("  ", None),
        ("0", None),
        ("8", "8"),
    ],
)
def test_the_first_number_of_threads_counts(
    variables: pytest.MonkeyPatch, given: str, kept: str | None
) -> None:
    variables.setitem(os.environ, "OMP_NUM_THREADS", given)
    command.set_variables()
    assert os.environ.get("OMP_NUM_THREADS") == kept


@pytest.mark.parametrize("given", ["-1", "two", "1.5", "\u0663", "1025", "9" * 20])
def test_an_impossible_number_of_threads_is_one_line(
    variables: pytest.MonkeyPatch, given: str
) -> None:
    variables.setitem(os.environ, "OMP_NUM_THREADS", given)
    with pytest.raises(LaunchError, match=f"OMP_NUM_THREADS={given}: must be a whole number"):
        command.set_variables()


def test_a_user_without_home_and_name_has_folders(
    variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        variables.delitem(os.environ, name, raising=False)
    variables.setattr("pwd.getpwuid", {}.__getitem__)  # not in /etc/passwd
    command.set_variables()
    spare = tmp_path / f"modelpar-{os.getuid()}"
    assert os.environ["HOME"] == os.environ["XDG_CACHE_HOME"] == str(spare)
    assert spare.stat().st_mode & 0o777 == 0o700
    assert os.environ["USER"] == f"uid{os.getuid()}"
    spare.chmod(0o777)  # others could have put files there
    del os.environ["HOME"], os.environ["XDG_CACHE_HOME"]
    command.set_variables()
    assert Path(os.environ["HOME"]).parent == tmp_path
    assert os.environ["HOME"] != str(spare)


def test_a_cache_that_cannot_be_written_is_replaced(
    variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    variables.setitem(os.environ, "HOME", str(tmp_path / "file"))
    variables.delitem(os.environ, "XDG_CACHE_HOME", raising=False)
    command.set_variables()
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / f"modelpar-{os.getuid()}")
    assert os.environ["HOME"] == str(tmp_path / "file")  # of paths that the user writes


def test_a_cache_that_can_be_written_stays(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    command.set_variables()
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "new" / "cache")
    assert not list(tmp_path.iterdir())


def test_figures_ignore_the_backend_of_a_notebook(variables: pytest.MonkeyPatch) -> None:
    variables.setitem(os.environ, "MPLBACKEND", "module://matplotlib_inline.backend_inline")
    command.set_variables()
    assert os.environ["MPLBACKEND"] == "agg"


def test_too_little_address_space_for_torch_is_one_line(
    variables: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    variables.setattr(resource, "getrlimit", lambda _: (10**9, 10**9))
    variables.setattr(sys, "argv", ["modelpar-train"])
    with pytest.raises(SystemExit) as end:
        command.main("train", "nothing:needed")
    assert end.value.code == 5
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("modelpar: torch needs 4294967296 bytes of addresses")


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "name", "line"),
    [
        (OSError(errno.EMFILE, "x"), "NOFILE", "allows 77 open files; raise ulimit -n"),
        (RuntimeError("unable to open: Too many open files (24)"), "NOFILE", "77 open files"),
        (RuntimeError("can't start new thread"), "NPROC", "77 processes and threads"),
        (BlockingIOError(errno.EAGAIN, "x"), "NPROC", "77 processes and threads"),
        (OSError(errno.EFBIG, "x"), "FSIZE", "77 bytes in one file; raise ulimit -f"),
        (MemoryError(), "AS", "77 bytes of memory in one process; raise ulimit -v"),
        (ImportError("failed to map segment from shared object"), "AS", "77 bytes of memory"),
        (RuntimeError("std::bad_alloc"), "AS", "77 bytes of memory"),
        (RuntimeError("allocate shared memory: No space left"), "AS", "shared memory is full"),
        (RuntimeError("can't start new thread"), "", "can start no more processes or threads"),
    ],
)
def test_a_limit_of_the_system_is_status_5_and_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, name: str, line: str
) -> None:
    def allowed(number: int) -> tuple[int, int]:
        size = 77 if name and number == getattr(resource, f"RLIMIT_{name}") else -1
        return size, size

    monkeypatch.setattr(resource, "getrlimit", allowed)
    status, said = errors.describe(error)
    assert status == 5
    assert line in said


@pytest.mark.parametrize("error", [ValueError("too many open files"), RuntimeError("a bug")])
def test_other_errors_are_no_limit(error: Exception) -> None:
    assert not limits.reached(error)
    assert errors.describe(error)[0] == 1


def test_a_path_that_cannot_be_written_is_one_line() -> None:
    status, line = errors.describe(PermissionError(errno.EACCES, "Permission denied", "run/log"))
    assert status == 2
    assert line.startswith("run/log: Permission denied; change its permissions")
    assert errors.describe(OSError(errno.ENOSPC, "No space left on device", "out"))[0] == 4
    assert errors.describe(ConnectionResetError(errno.ECONNRESET, "Connection reset"))[0] == 1


def test_threads_that_the_system_does_not_allow_are_noticed_before_torch_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError) as error:
        command._start_threads()
    assert errors.describe(error.value)[0] == 5
