"""What the mesh refuses before a group starts, and what a collective checks."""

from __future__ import annotations

import pytest
import torch

from modelpar import mesh
from modelpar.errors import LaunchError, SettingsError


@pytest.mark.parametrize(
    ("columns", "replicas", "size", "made"),
    [(2, 1, 2, 1), (2, 1, 4, 2), (2, 2, 4, 2), (1, 1, 3, 3)],
)
def test_worlds_that_fit(columns: int, replicas: int, size: int, made: int) -> None:
    assert mesh.check_world(columns, replicas, size) == made


@pytest.mark.parametrize(
    ("columns", "replicas", "size"), [(2, 1, 1), (2, 1, 3), (2, 2, 2), (1, 2, 1)]
)
def test_worlds_that_do_not(columns: int, replicas: int, size: int) -> None:
    with pytest.raises(SettingsError, match=f"--nproc-per-node {columns * replicas}"):
        mesh.check_world(columns, replicas, size)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert mesh.choose_device("auto", 2) == "cpu"
    assert mesh.choose_device("auto", 1) == "cuda"
    with pytest.raises(SettingsError, match="1 GPUs for 2 processes"):
        mesh.choose_device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert mesh.choose_device("auto", 2) == "cuda"


def test_a_rank_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(LaunchError, match="WORLD_SIZE=two"):
        mesh.world_size()


def test_one_process_needs_no_group() -> None:
    with mesh.opened(1, "cpu", threads=1) as alone:
        assert (alone.world_size, alone.rank, alone.pair, alone.peers) == (1, 0, None, None)
        line = "the whole net on one CPU process, 1 thread each, freed memory kept"
        assert alone.describe() == line
        assert mesh.gather_text("here", alone) == ["here"]
        assert mesh.first_complaint("no", alone) == "no"


def test_generators_are_functions_of_their_keys() -> None:
    def draw(*keys: str | int) -> float:
        return float(torch.rand((), generator=mesh.generator(*keys)))  # type: ignore[arg-type]

    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert (
        len({draw(0, "a", 1), draw(0, "a", 2), draw(0, "b", 1), draw(1, "a", 1), draw(0, "a1")})
        == 5
    )


def test_cores_are_shared_by_the_processes_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's own default says nothing
    try:
        assert mesh.share_cores(2) == torch.get_num_threads() == 3
        assert mesh.share_cores(8) == 1
        assert mesh.share_cores(2, threads=5) == torch.get_num_threads() == 5
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        assert mesh.share_cores(2) == 4
    finally:
        torch.set_num_threads(before)


def test_a_compiler_that_does_not_work_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        message = "No working C++ compiler found\nand a page of advice"
        raise RuntimeError(message)

    mesh.compiler_complaint.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda _: broken)
    assert mesh.compiler_complaint(torch.device("cpu")).startswith("No working C++ compiler found")
    mesh.compiler_complaint.cache_clear()
