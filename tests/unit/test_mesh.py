"""What needs no second process: generators, one process alone, what a collective refuses."""

import torch

from modelpar import distributed, seeding


def test_one_process_needs_no_group() -> None:
    with distributed.process_mesh(1, "cpu", threads=1) as alone:
        assert (alone.world_size, alone.rank, alone.pair, alone.replica_group) == (
            1,
            0,
            None,
            None,
        )
        line = "the whole net on one CPU process, 1 thread each, freed memory kept"
        assert alone.describe() == line
        assert alone.gather_text("here") == ["here"]
        assert distributed.first_complaint("no", alone) == "no"


def test_generators_are_functions_of_their_keys() -> None:
    def draw(*keys: str | int) -> float:
        return float(torch.rand((), generator=seeding.generator(*keys)))  # type: ignore[arg-type]

    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert (
        len({draw(0, "a", 1), draw(0, "a", 2), draw(0, "b", 1), draw(1, "a", 1), draw(0, "a1")})
        == 5
    )
