"""The mesh on real processes: who is where, what all learn, what is refused."""

import resource

import torch
import torch.distributed as dist
from ranks import Ranks

from modelpar.distributed import Mesh, all_reduce_sum, exchange, first_complaint


def place(mesh: Mesh) -> tuple[int, int, int, str]:
    return mesh.rank, mesh.replica, mesh.column, mesh.describe()


def test_columns_of_a_replica_are_neighbours(two_pairs: Ranks) -> None:
    line = "two columns x 2 replicas on 4 CPU processes (gloo), 1 thread each, freed memory kept"
    assert two_pairs.run(place) == [
        (0, 0, 0, line),
        (1, 0, 1, line),
        (2, 1, 0, line),
        (3, 1, 1, line),
    ]


def complaint(mesh: Mesh, refusing: int) -> str:
    return first_complaint(f"rank {mesh.rank}: no" * (mesh.rank >= refusing), mesh)


def test_the_first_complaint_is_everyones(two_pairs: Ranks) -> None:
    assert two_pairs.run(complaint, 4) == [""] * 4
    for rank in range(4):
        assert two_pairs.run(complaint, rank) == [f"rank {rank}: no"] * 4


def told(mesh: Mesh) -> list[str]:
    return mesh.gather_text(f"runs/größe-{mesh.rank}" if mesh.rank != 2 else "")


def test_all_learn_what_each_says(two_pairs: Ranks) -> None:
    assert two_pairs.run(told) == [["runs/größe-0", "runs/größe-1", "", "runs/größe-3"]] * 4


def patience(mesh: Mesh) -> list[float]:
    groups = [dist.group.WORLD, mesh.pair, mesh.replica_group]
    return [
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # type: ignore[union-attr]
        for group in groups
    ]


def test_every_group_waits_as_long_as_it_was_told(two_pairs: Ranks) -> None:
    assert two_pairs.run(patience) == [[60.0] * 3] * 4


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


def test_a_tensor_that_gloo_would_get_wrong_is_refused(pair: Ranks) -> None:
    for found in pair.run(refusals):
        assert found == [
            "swap: a tensor of shape (3, 4) is not contiguous",
            "sum: a tensor of shape (3, 4) is not contiguous",
            "swap: torch.complex64 is not carried",
            "sum: torch.complex64 is not carried",
        ]
