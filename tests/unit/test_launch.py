"""How a rank exits: its line, its status and log/exit.json; and words on a command line."""

import gc
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import Ranks

from modelpar import config, launch, overrides
from modelpar.distributed import Mesh
from modelpar.environment import Environment
from modelpar.errors import (
    CheckpointError,
    DataError,
    InUseError,
    LaunchError,
    PeerLostError,
    RunError,
    StoppedError,
)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that ranks wait before they report."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def recorded(run_dir: Path) -> dict[str, object]:
    row = json.loads((run_dir / launch.EXIT).read_text())
    assert row.pop("time")
    return row


@pytest.mark.parametrize("kind", RunError.__subclasses__())
def test_an_error_keeps_its_kind_when_it_is_sent(kind: type[RunError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("two  blanks")))
    assert type(copy) is kind
    assert str(copy) == "two  blanks"


def test_local_rank_0_reports_at_once_and_leaves_its_status(
    tmp_path: Path, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    status = launch.report_from_rank(DataError("no\nimages"), tmp_path)
    assert status == launch.recorded_status(tmp_path) == 3
    assert recorded(tmp_path) == {"status": 3, "line": "no images", "rank": 0}
    assert capfd.readouterr().err == "modelpar: no images\n"
    assert waits == []


def test_other_ranks_wait_before_they_report(
    monkeypatch: pytest.MonkeyPatch, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launch.report_from_rank(DataError("no images"), None) == 3
    assert waits == [launch.FIRST_ERROR_SECONDS]
    assert launch.report_from_rank(StoppedError("saved"), None) == 75
    assert capfd.readouterr().err == "modelpar: no images\n"  # all ranks stop, one reports


def test_a_lost_rank_is_reported_last_and_never_replaces_its_cause(
    tmp_path: Path, waits: list[float]
) -> None:
    launch.report_from_rank(PeerLostError("another rank has exited"), tmp_path)
    assert waits == [2 * launch.FIRST_ERROR_SECONDS]
    assert recorded(tmp_path)["status"] == 6
    launch.report_from_rank(DataError("no images"), tmp_path)
    launch.report_from_rank(PeerLostError("another rank has exited"), tmp_path)
    assert recorded(tmp_path)["status"] == 3
    waits.clear()
    stopped = PeerLostError("another rank has exited")
    stopped.stop_requested = True  # its launcher waits for it
    launch.report_from_rank(stopped, None)
    assert waits == []


def test_a_second_start_leaves_no_status_in_the_run_that_it_finds(
    tmp_path: Path, waits: list[float]
) -> None:
    assert launch.report_from_rank(InUseError("in use by another run"), tmp_path) == 4
    assert launch.recorded_status(tmp_path) == 0
    assert waits == []


def test_a_bug_brings_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch.report_from_rank(ZeroDivisionError("a bug"), None) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2:] == ["ZeroDivisionError: a bug", "modelpar: ZeroDivisionError: a bug"]


def test_no_status_is_recorded_where_no_run_is(tmp_path: Path) -> None:
    assert launch.report_from_rank(DataError("no images"), tmp_path / "new") == 3
    assert launch.recorded_status(tmp_path / "new") == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path", ["a b", "a,b", "it's", 'say "x"', "back\\slash", "$HOME", "end\\", "[x]", "día", "~x"]
)
def test_a_quoted_word_is_read_as_it_was(path: str) -> None:
    settings = config.read("train", [overrides.quoted("run_dir", f"/a/{path}")])
    assert settings.run_dir == f"/a/{path}"


def test_a_full_disk_and_full_memory_are_one_line(tmp_path: Path) -> None:
    settings, mesh = SimpleNamespace(batch_size=8), Mesh(torch.device("cpu"))
    for error, kind, line in (
        (OSError(28, "No space left on device"), CheckpointError, "free some space"),
        (torch.OutOfMemoryError("CUDA out of memory"), LaunchError, "batch_size=8; use a smaller"),
        (OSError(2, "No such file"), OSError, "No such file"),
        (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),
    ):
        with pytest.raises(kind, match=line), launch.resource_errors(settings, mesh, tmp_path):
            raise error


def same(mesh: Mesh, key: str, other: object) -> str:
    """Compare the settings of all ranks, of which rank 1 has another value of ``key``."""
    settings = config.read("train", [])
    if mesh.rank == 1:
        setattr(settings, key, other)
    try:
        launch._check_same(settings, mesh)
    except LaunchError as error:
        return str(error)
    return ""


def test_ranks_with_other_settings_are_refused_on_all(pair: Ranks) -> None:
    line = "rank 1 has seed=1, rank 0 has 0; use the same everywhere"
    assert pair.run(same, "seed", 1) == [line] * 2
    assert pair.run(same, "workers", 1) == [""] * 2  # hosts may differ


@pytest.mark.parametrize(
    ("code", "status"), [("pass", 0), ("exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 6)]
)
def test_one_process_runs_without_an_agent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: str, status: int
) -> None:
    assert launch._run_alone(["-c", code], 1, tmp_path) == status
    killed = "modelpar: rank 0 was killed by SIGKILL, often out of memory\n"
    assert capfd.readouterr().err == killed * (status == 6)


def test_a_rank_that_finishes_after_a_signal_has_succeeded(tmp_path: Path) -> None:
    code = '''
import signal, sys
from modelpar import launch
signal.signal(signal.SIGTERM, lambda number, _: launch._stop_agent(number))
rank = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(int(sys.argv[1])))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
sys.exit(launch._run_alone(["-c", rank, sys.argv[1]], 1, None))
'''
    command = [sys.executable, "-c", code]
    for status in ("0", "75"):
        done = subprocess.run([*command, status], cwd=tmp_path, timeout=60, check=False)
        assert (done.returncode == 0) == (status == "0")


def test_ranks_that_cannot_meet_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "LOCAL", "192.0.2.1")  # no address of this host, RFC 5737
    assert launch._run_agent(["-c", "pass"], 2, None) == 5
    line = capfd.readouterr().err
    assert line.startswith("modelpar: processes of this host cannot connect to 192.0.2.1 (")
    assert line.count("\n") == 1


def test_importing_the_package_leaves_the_garbage_collector_enabled() -> None:
    assert gc.isenabled()


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("word", "columns"), [("share_gpu=true", 2), ("share_gpu=false", 1), ("device=cpu", 2)]
)
def test_the_launcher_starts_two_columns_on_one_gpu_only_if_they_share_it(
    monkeypatch: pytest.MonkeyPatch, word: str, columns: int
) -> None:
    started: list[int] = []

    def start(name: str, words: list[str], *_: object) -> int:
        started.append(config.read(name, words).columns)
        return 0

    monkeypatch.setattr(launch, "_start_ranks", start)
    assert launch.run_launcher("train", lambda *_: None, [word]) == 0
    assert started == [columns]


@pytest.mark.parametrize(
    "words",
    [
        ["run_dir=a"],
        ["++run_dir=a"],
        ["++hydra.run.dir=a"],
        ["hydra.run.dir=a", "hydra.sweep.dir=b"],  # which only a sweep uses
    ],
    ids=str,
)
def test_ranks_get_the_output_folder_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    started: list[Path | None] = []

    def start(arguments: list[str], *_: object) -> int:
        own = arguments[arguments.index("modelpar.train") + 1 :]
        started.append(config.read_run("train", own)[1])
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_run_alone", start)
    monkeypatch.setattr(launch.logging, "disable", lambda: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    words = ["columns=1", "device=cpu", *words]
    assert launch.run_launcher("train", lambda *_: None, words) == 0
    assert started == [tmp_path / "a"]


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("rank", "words", "kind", "said"),
    [
        (0, [], "cpu", "1 GPU for 2 processes, so they run on CPUs; share_gpu=true lets them"),
        (1, [], "cpu", ""),
        (0, ["device=cpu"], "cpu", ""),
        (0, ["share_gpu=true"], "cuda", ""),
    ],
)
def test_rank_0_reports_that_too_few_gpus_are_not_used(
    capfd: pytest.CaptureFixture[str], rank: int, words: list[str], kind: str, said: str
) -> None:
    env = Environment(rank, 2, rank, 2)
    settings, _ = launch._rank_settings("train", words, env)
    assert settings.device == kind
    line = capfd.readouterr().err
    assert said in line
    assert line.count("\n") == bool(said)
