"""What needs no second process: one rank alone, and generators."""

import pytest
import torch

from modelpar import distributed, seeding
from modelpar.device import is_out_of_memory
from modelpar.errors import DataError, PeerLostError


def test_one_process_needs_no_group() -> None:
    with distributed.process_mesh(1, "cpu", 60, threads=1) as alone:
        assert (alone.world_size, alone.rank) == (1, 0)
        assert alone.pair is alone.replica_group is alone.world is None
        assert alone.describe() == "the whole net on one CPU process, 1 thread each"
        assert alone.gather_ints((1, 2)) == [(1, 2)]
        assert alone.gather_objects("here") == ["here"]
        with alone.all_or_none():
            pass
        with pytest.raises(DataError, match="no images"), alone.all_or_none():
            raise DataError("no images")


def test_ranks_that_share_a_gpu_say_that_they_are_slow() -> None:
    mesh = distributed.Mesh(torch.device("cuda"), columns=2, shares_gpu=True)
    line = "processes that share GPUs (NCCL; this shows correctness, not speed)"
    assert mesh.describe() == f"two columns on 2 {line}"


def test_generators_are_functions_of_their_keys() -> None:
    def draw(*keys: str | int) -> float:
        return float(torch.rand((), generator=seeding.generator(*keys)))  # type: ignore[arg-type]

    assert draw(0, "a", 1) == draw(0, "a", 1)
    keys = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a1")]
    assert len({draw(*key) for key in keys}) == 5


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer. More", PeerLostError),
        ("NCCL error: remote process exited", PeerLostError),
        ("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'", RuntimeError),
        ("CUDA error: the launch timed out and was terminated", RuntimeError),
    ],
)
def test_only_errors_of_a_connection_mean_a_lost_rank(text: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, distributed.comm_errors("step"):
        raise RuntimeError(text)
    assert type(caught.value) is kind
    assert is_out_of_memory(RuntimeError(text)) == ("out of memory" in text)
