"""The mesh on real processes: positions, messages between all ranks, refused tensors."""

import resource
import time

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from modelpar.distributed import Mesh, all_reduce_sum, exchange
from modelpar.errors import DataError, RunError


def place(mesh: Mesh) -> tuple[int, int, int, str]:
    return mesh.rank, mesh.replica, mesh.column, mesh.describe()


def test_columns_of_a_replica_are_neighbours(two_pairs: Ranks) -> None:
    line = "two columns x 2 replicas on 4 CPU processes (gloo), 1 thread each"
    assert two_pairs.run(place) == [
        (0, 0, 0, line),
        (1, 0, 1, line),
        (2, 1, 0, line),
        (3, 1, 1, line),
    ]


def prepared(mesh: Mesh, failing: int, seconds: float = 0.0) -> str:
    """Prepare; the ranks from ``failing`` on raise an error, after so many seconds."""
    try:
        with mesh.all_or_none(long_timeout=True):
            if mesh.rank >= failing:
                time.sleep(seconds)
                raise DataError(f"rank {mesh.rank}: no images")
    except RunError as error:
        return f"{error.status} {error}"
    return ""


def test_all_ranks_raise_if_one_raises(two_pairs: Ranks) -> None:
    assert two_pairs.run(prepared, 4) == [""] * 4
    for rank in range(4):
        lines = [f"3 rank {max(rank, other)}: no images" for other in range(4)]
        assert two_pairs.run(prepared, rank) == lines


@pytest.mark.slow
def test_a_host_may_prepare_for_longer_than_the_timeout() -> None:
    ranks = Ranks(2, timeout=2.0)
    try:
        assert ranks.run(prepared, 1, 5.0) == ["3 rank 1: no images"] * 2
    finally:
        ranks.close()


def late(mesh: Mesh) -> str:
    time.sleep(2 * mesh.rank)
    return "late"


def test_a_late_answer_is_not_taken_for_that_of_the_next_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks(2)
    try:
        ranks.run(place)
        with monkeypatch.context() as short:
            short.setattr("ranks.TIMEOUT", 0.5)
            with pytest.raises(TimeoutError, match="did not answer"):
                ranks.run(late)
        assert [rank for rank, *_ in ranks.run(place)] == [0, 1]
    finally:
        ranks.close()


def counted(mesh: Mesh) -> list[tuple[int, ...]]:
    return mesh.gather_ints((mesh.rank, 2 * mesh.rank))


def texts(mesh: Mesh) -> list[str]:
    return mesh.gather_objects("" if mesh.rank == 2 else f"runs/größe-{mesh.rank}" * 10**mesh.rank)


def test_messages_of_all_ranks_come_in_rank_order(two_pairs: Ranks) -> None:
    assert two_pairs.run(counted) == [[(0, 0), (1, 2), (2, 4), (3, 6)]] * 4
    expected = ["runs/größe-0", "runs/größe-1" * 10, "", "runs/größe-3" * 1000]
    assert two_pairs.run(texts) == [expected] * 4


def timeouts(mesh: Mesh) -> list[float]:
    groups = [dist.group.WORLD, mesh.pair, mesh.replica_group, mesh.world, mesh.slow_world]
    return [
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # type: ignore[union-attr]
        for group in groups
    ]


def test_every_group_has_its_timeout(two_pairs: Ranks) -> None:
    assert two_pairs.run(timeouts) == [[60.0] * 4 + [86400.0]] * 4


def page_faults(mesh: Mesh) -> int:
    """Of the last of many times that 64 MB are allocated and freed."""
    del mesh
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16, 1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_stays_with_the_process(pair: Ranks) -> None:
    assert max(pair.run(page_faults)) < 1000  # 16,384 pages of 4 KiB otherwise


def sums(mesh: Mesh) -> tuple[float, float]:
    one = all_reduce_sum(torch.tensor([float(10**mesh.rank)]), mesh.pair)
    two = all_reduce_sum(torch.tensor([float(10**mesh.rank)]), mesh.replica_group)
    return float(one), float(two)


def test_sums_run_over_one_axis(two_pairs: Ranks) -> None:
    assert two_pairs.run(sums) == [(11, 101), (11, 1010), (1100, 101), (1100, 1010)]


def refusals(mesh: Mesh) -> list[str]:
    assert mesh.pair is not None
    found = []
    for tensor in (torch.zeros(4, 3).t(), torch.zeros(2, dtype=torch.complex64)):
        for call in (exchange, all_reduce_sum):
            try:
                call(tensor, mesh.pair)
            except ValueError as error:
                found.append(str(error))
    return found


def test_tensors_that_gloo_would_garble_are_refused(pair: Ranks) -> None:
    for found in pair.run(refusals):
        assert found == [
            "exchange: a tensor of shape (3, 4) is not contiguous",
            "all-reduce: a tensor of shape (3, 4) is not contiguous",
            "exchange: a tensor of torch.complex64 cannot be sent",
            "all-reduce: a tensor of torch.complex64 cannot be sent",
        ]
