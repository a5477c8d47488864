"""What a launcher must say and a machine must have, checked before processes meet."""

import socket
import time
from types import SimpleNamespace

import pytest
import torch

from modelpar import device, environment
from modelpar.errors import LaunchError, SettingsError
from modelpar.images import loader


@pytest.mark.parametrize(
    ("columns", "replicas", "size", "made"),
    [(2, 1, 2, 1), (2, 1, 4, 2), (2, 2, 4, 2), (1, 1, 3, 3)],
)
def test_worlds_that_fit(columns: int, replicas: int, size: int, made: int) -> None:
    assert environment.check_world(columns, replicas, size) == made


@pytest.mark.parametrize(
    ("columns", "replicas", "size"), [(2, 1, 1), (2, 1, 3), (2, 2, 2), (1, 2, 1)]
)
def test_worlds_that_do_not(columns: int, replicas: int, size: int) -> None:
    with pytest.raises(LaunchError, match=f"--nproc-per-node {columns * replicas}"):
        environment.check_world(columns, replicas, size)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.choose_device("auto", 2) == "cpu"
    assert device.choose_device("auto", 1) == "cuda"
    with pytest.raises(SettingsError, match="1 GPUs for 2 processes"):
        device.choose_device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.choose_device("auto", 2) == "cuda"


def test_a_rank_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(LaunchError, match="WORLD_SIZE=two"):
        environment.read()


def test_cores_are_shared_by_the_processes_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's own default says nothing
    try:
        assert device.set_threads(2) == torch.get_num_threads() == 3
        assert device.set_threads(8) == 1
        assert device.set_threads(2, threads=5) == torch.get_num_threads() == 5
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        assert device.set_threads(2) == 4
    finally:
        torch.set_num_threads(before)


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", None, "RANK is not set"),
        ("RANK", "2", "RANK=2: there are WORLD_SIZE=2"),
        ("RANK", "-1", "RANK=-1: the launcher must set a whole number"),
        ("WORLD_SIZE", None, "WORLD_SIZE is not set"),
        ("WORLD_SIZE", "", "WORLD_SIZE is not set"),
        ("MASTER_ADDR", None, "MASTER_ADDR is not set"),
        ("MASTER_PORT", "http", "MASTER_PORT=http: the launcher must set a whole number"),
        ("MASTER_ADDR", "no-such-host.invalid", "MASTER_ADDR=no-such-host.invalid"),
        ("MASTER_PORT", "1", "Connection refused"),
        ("MASTER_PORT", "70000", "MASTER_PORT=70000: give 1 to 65535"),
        ("GLOO_SOCKET_IFNAME", "eth77", "GLOO_SOCKET_IFNAME=eth77: this host has "),
    ],
)
def test_a_launchers_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, said: str
) -> None:
    monkeypatch.setattr(environment, "MEETING", 1.0)
    for key, good in LAUNCHED.items():
        monkeypatch.setenv(key, good)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(LaunchError) as error:
        environment.check_network(environment.read(), 1.0)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 25  # however long names take to be looked up


def test_who_listens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        environment.check_network(environment.Environment(1, 2), 1.0)


def test_loaders_that_do_not_fit_into_shared_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = SimpleNamespace(free=64_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    loader.check_shared_memory(2, 1_000_000, 2)
    loader.check_shared_memory(0, 10**9, 2)
    with pytest.raises(LaunchError, match="need 100 MB, 64 MB are free"):
        loader.check_shared_memory(2, 12_500_000, 2)


def test_more_threads_than_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    assert not device.oversubscription_warning(2)
    assert (
        "2 processes with 3 threads each oversubscribe 4 cores"
        in device.oversubscription_warning(3)
    )


def test_out_of_memory_is_known() -> None:
    assert device.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not device.is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert device.is_out_of_memory(error.value)
    assert device.memory(torch.device("cpu")) == "this host (cpu)"


def test_a_rank_whose_launcher_is_gone_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not environment.orphaned()
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert not environment.orphaned()  # no torchrun: the first process of a container may start it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert environment.orphaned()
    with pytest.raises(LaunchError, match="the launcher is gone"):
        environment.exit_with_parent()
    monkeypatch.setattr("multiprocessing.parent_process", lambda: SimpleNamespace(pid=7))
    assert environment.orphaned()
    monkeypatch.setattr("os.getppid", lambda: 7)
    assert not environment.orphaned()
