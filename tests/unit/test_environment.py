"""torchrun's variables and this machine's resources, checked before ranks start."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from modelpar import device, distributed, environment
from modelpar.environment import Environment
from modelpar.errors import LaunchError, SettingsError
from modelpar.images import loader


@pytest.mark.parametrize(
    ("columns", "replicas", "size", "expected"),
    [(2, 1, 2, 1), (2, 1, 4, 2), (2, 2, 4, 2), (1, 1, 3, 3)],
)
def test_replicas_follow_from_the_world_size(
    columns: int, replicas: int, size: int, expected: int
) -> None:
    assert Environment(world_size=size).num_replicas(columns, replicas) == expected


@pytest.mark.parametrize(
    ("columns", "replicas", "size"), [(2, 1, 1), (2, 1, 3), (2, 2, 2), (1, 2, 1)]
)
def test_a_world_that_does_not_fit_is_refused(columns: int, replicas: int, size: int) -> None:
    with pytest.raises(LaunchError, match=f"--nproc-per-node {columns * replicas}"):
        Environment(world_size=size).num_replicas(columns, replicas)


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("RANK", None, "RANK is not set"),
        ("RANK", "2", "RANK=2: must be less than WORLD_SIZE=2"),
        ("RANK", "-1", "RANK=-1: must be a whole number"),
        ("WORLD_SIZE", None, "WORLD_SIZE is not set"),
        ("WORLD_SIZE", "", "WORLD_SIZE is not set"),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two: must be a whole number"),
        ("MASTER_ADDR", None, "MASTER_ADDR is not set"),
        ("MASTER_PORT", "http", "MASTER_PORT=http: must be a whole number"),
    ],
)
def test_an_impossible_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, line: str
) -> None:
    for key, good in LAUNCHED.items():
        monkeypatch.setenv(key, good)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=line):
        environment.read()


def test_variables_of_torchrun_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.read() == Environment()
    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    assert environment.read() == Environment(1, 2, 0, 2, one_host=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert environment.read() == Environment(1, 2, 1, 2, one_host=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert environment.read().run_dir_checked


def test_a_rank_without_its_launcher_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: None)  # this process keeps its parent
    environment.exit_with_parent()  # torchrun or a shell started it
    monkeypatch.setenv(environment.LAUNCHER, str(os.getppid()))
    environment.exit_with_parent()
    monkeypatch.setattr("os.getppid", lambda: 1)
    with pytest.raises(LaunchError, match="the launcher has ended"):
        environment.exit_with_parent()


# -- devices, cores and memory --------------------------------------------------------------------


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.choose_device("auto", 2) == "cpu"
    assert device.choose_device("auto", 1) == "cuda"
    with pytest.raises(SettingsError, match=r"1 GPU for 2 processes.*share_gpu=true to share"):
        device.choose_device("cuda", 2, share_gpu=False)
    with pytest.raises(SettingsError, match=r"1 GPU for 2 processes on this host; use device=cpu"):
        device.choose_device("cuda", 2)  # the benchmark, which has none of these settings
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.choose_device("auto", 2) == "cuda"


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_one_gpu_is_enough_for_ranks_that_share_it(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.choose_device(kind, 4, share_gpu=True) == "cuda"
    with pytest.raises(SettingsError, match="share_gpu=true: needs a GPU, and device=cpu uses"):
        device.choose_device("cpu", 1, share_gpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SettingsError, match="share_gpu=true: needs a GPU, and this host has none"):
        device.choose_device(kind, 1, share_gpu=True)


@pytest.mark.parametrize(("gpus", "expected"), [(1, "cuda:0"), (2, "cuda:1")])
def test_only_ranks_that_share_a_gpu_name_hosts_of_their_own(
    monkeypatch: pytest.MonkeyPatch, gpus: int, expected: str
) -> None:
    joined: list[str] = []

    def join(*_: object, device_id: torch.device, **__: object) -> None:
        joined.append(str(device_id))
        raise ValueError("only its arguments matter here")

    for key, value in {**LAUNCHED, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    for name in ("NCCL_HOSTID", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("set_device", "set_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", join)
    threads = torch.get_num_threads()
    mesh = distributed.process_mesh(2, "cuda", 60, threads=threads)
    with pytest.raises(LaunchError, match="rank 1 of 2: cannot join"), mesh:
        pass
    assert joined == [expected]
    shared = ("modelpar-1", "lo") if gpus == 1 else (None, None)
    assert (os.environ.get("NCCL_HOSTID"), os.environ.get("NCCL_SOCKET_IFNAME")) == shared


@pytest.mark.parametrize(
    ("kind", "error", "expected"),
    [
        ("cpu", None, ["graph", "groups"]),
        ("cpu", KeyError, ["graph", "groups"]),
        ("cuda", None, ["graph", "groups"]),
        ("cuda", KeyError, []),
    ],
)
def test_how_process_groups_end(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    error: type[Exception] | None,
    expected: list[str],
) -> None:
    """NCCL waits for the CUDA graphs that hold its kernels, and for ranks that may be lost."""
    ended: list[str] = []
    monkeypatch.setattr(distributed, "set_up", lambda *_, **__: torch.device("cpu"))
    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", lambda *_, **__: (None, None))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("groups"))
    mesh = distributed.process_mesh(2, kind, 60, threads=torch.get_num_threads())
    with suppress(KeyError), mesh as ranks:
        ranks.closing.callback(ended.append, "graph")
        if error:
            raise error
    assert ended == expected


def test_a_process_exits_at_once_if_process_groups_remain(tmp_path: Path) -> None:
    code = (
        "import atexit, sys, torch.distributed as dist\n"
        "from modelpar.distributed import exit_if_groups_remain\n"
        "atexit.register(print, 'an ordinary end')\n"
        "exit_if_groups_remain(7)\n"
        "print('no groups')\n"
        f"dist.init_process_group('gloo', 'file://{tmp_path}/store', rank=0, world_size=1)\n"
        "print('a buffered line', end='')\n"
        "exit_if_groups_remain(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (7, "no groups\na buffered line"), done.stderr


def test_the_processes_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's default, not a choice of the user
    try:
        assert device.set_threads(2) == torch.get_num_threads() == 3
        assert device.set_threads(8) == 1
        assert device.set_threads(2, threads=5) == torch.get_num_threads() == 5
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        assert device.set_threads(2) == 4
        for limit, found in (("2", 2), ("1", 1), ("8", 4), ("0", 4), ("x", 4)):
            monkeypatch.setenv("OMP_THREAD_LIMIT", limit)
            assert device.set_threads(2) == torch.get_num_threads() == found
    finally:
        torch.set_num_threads(before)


def test_more_threads_than_cores_bring_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    assert not device.oversubscription_warning(2)
    for threads, cores, line in (
        (3, 4, "3 threads each oversubscribe 4 cores; unset threads and OMP_NUM_THREADS"),
        (1, 1, "1 thread each oversubscribe 1 core; start fewer processes"),
    ):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert device.oversubscription_warning(threads) == f"2 processes with {line}"


def test_a_rank_that_needs_more_open_files_than_allowed_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (31, 31))
    loader.check_open_files(1)
    line = "a rank opens up to 32 files, and the system allows 31; raise ulimit -n"
    with pytest.raises(LaunchError, match=line):
        loader.check_open_files(2)
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    loader.check_open_files(2)


def test_out_of_memory_is_recognised() -> None:
    assert device.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not device.is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert device.is_out_of_memory(error.value)
    assert device.memory(torch.device("cpu")) == "this host (cpu)"


def test_the_commit_of_a_package_is_not_that_of_a_project_around_it(tmp_path: Path) -> None:
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        words = ("git", "-C", str(tmp_path / "project"), *who, *words)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    assert environment.commit(package) is None
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert environment.commit(package) is None  # installed there, but not of this project
    git("add", "package")
    git("commit", "-m", "second")
    assert environment.commit(package) == git("rev-parse", "--short", "HEAD")
    (package / "__init__.py").write_text("changed")
    assert environment.commit(package) == git("rev-parse", "--short", "HEAD") + "-dirty"
