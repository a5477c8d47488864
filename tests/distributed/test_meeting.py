"""Before a group starts: who is there, whether all have the same, and what is called in it."""

import math
import os
import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from modelpar import distributed, environment
from modelpar.distributed import Mesh, all_reduce_sum, exchange
from modelpar.errors import DataError, LaunchError, RunError


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def met(ranks: Mesh, port: int, seed_of_rank_1: int = 0) -> tuple[str, float]:
    """Meet at ``port``; return the complaint, and how long it took in s."""
    before = dict(os.environ)
    os.environ["MASTER_PORT"] = str(port)
    environment.MEETING = 5.0  # type: ignore[misc]
    began = time.monotonic()
    try:
        met = distributed.meet({"torch": "2.99", "seed": ranks.rank * seed_of_rank_1}, timeout=5)
    except LaunchError as error:
        return str(error), time.monotonic() - began
    finally:
        os.environ.clear()
        os.environ.update(before)
        environment.MEETING = 25.0  # type: ignore[misc]
    assert met.store is not None
    return "", time.monotonic() - began


def test_all_meet(pair: Ranks, two_pairs: Ranks) -> None:
    assert [said for said, _ in pair.run(met, free_port())] == [""] * 2
    assert [said for said, _ in two_pairs.run(met, free_port())] == [""] * 4


def test_what_differs_is_named_on_both(pair: Ranks) -> None:
    one, other = pair.run(met, free_port(), 1)
    assert one[0] == other[0] == "rank 1 has seed=1, rank 0 has 0; start all with the same"


def alone(ranks: Mesh, port: int) -> tuple[str, float]:
    return met(ranks, port) if ranks.rank == 0 else ("", 0.0)


def astray(ranks: Mesh, port: int) -> tuple[str, float]:
    return met(ranks, port) if ranks.rank == 1 else ("", 0.0)


def test_who_waits_in_vain_says_so_in_time(pair: Ranks) -> None:
    for function in (alone, astray):
        said, took = max(pair.run(function, free_port()))
        assert said.startswith("rank ")
        assert "\n" not in said
        assert took < 15  # here it tries for 5 s, not for as long as a collective may last


def test_a_port_that_is_taken_is_told(pair: Ranks) -> None:
    with socket.create_server(("", 0)) as server:
        (said, _), _ = pair.run(alone, server.getsockname()[1])
    assert "Address already in use" in said
    assert "give another" in said


def twice(ranks: Mesh, port: int) -> tuple[str, float]:
    """Four processes, one of which says that it is another."""
    os.environ["RANK"] = str({3: 2}.get(ranks.rank, ranks.rank))
    try:
        return met(ranks, port)
    finally:
        os.environ["RANK"] = str(ranks.rank)


def test_two_of_one_number_are_told(two_pairs: Ranks) -> None:
    said = [said for said, _ in two_pairs.run(twice, free_port())]
    assert any("RANK=2: two processes say so" in one for one in said)
    assert all(said)


# -- preparing -----------------------------------------------------------------------------------


def prepared(ranks: Mesh, port: int, how: str, which: int = 1) -> tuple[str, float]:
    """Meet and prepare, rank ``which`` in its own way; return what comes of it, and the s."""
    before = dict(os.environ)
    os.environ["MASTER_PORT"] = str(port)
    odd = ranks.rank == which

    def prepare() -> str:
        if odd and how == "failed":
            raise DataError("data.root=nowhere: no such folder")
        time.sleep(3.0 if odd else 0.0)
        return "fine"

    began = time.monotonic()
    try:
        store = distributed.meet({}, timeout=30).store
        if odd and how == "silent":
            return "", 0.0
        return distributed.prepare_together(prepare, store, 1.0), time.monotonic() - began
    except RunError as error:
        return f"{error.status}: {error}", time.monotonic() - began
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_host_may_prepare_for_longer_than_another_may_be_silent(pair: Ranks) -> None:
    (one, took), (other, _) = pair.run(prepared, free_port(), "slow")
    assert one == other == "fine"
    assert took > 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_fails_to_prepare_is_named_by_the_others(pair: Ranks, rank: int) -> None:
    said = [said for said, _ in pair.run(prepared, free_port(), "failed", rank)]
    assert said[rank] == "3: data.root=nowhere: no such folder"
    assert said[1 - rank] == f"6: rank {rank} is not ready: data.root=nowhere: no such folder"


def test_a_process_that_is_lost_while_it_prepares_is_named(pair: Ranks) -> None:
    (said, took), _ = pair.run(prepared, free_port(), "silent")
    assert said.startswith("6: rank 1 is gone or silent before it is ready")
    assert took < 5


# -- comm.check -----------------------------------------------------------------------------------


def called(ranks: Mesh, how: str) -> str:
    """Do a collective that rank 1 does another way; return what that raises."""
    assert ranks.pair is not None
    twin = dist.new_group(backend="gloo")
    distributed._CHECKS[ranks.pair.group_name] = distributed._Check(twin)  # type: ignore[arg-type]
    odd = ranks.rank == 1
    try:
        all_reduce_sum(torch.ones(4), ranks.pair)  # the first of both
        if how == "operation" and odd:
            exchange(torch.ones(4), ranks.pair)
        elif how == "shape":
            all_reduce_sum(torch.ones(2, 2) if odd else torch.ones(4), ranks.pair)
        elif how == "dtype":
            all_reduce_sum(
                torch.ones(4, dtype=torch.float64 if odd else torch.float32), ranks.pair
            )
        else:
            all_reduce_sum(torch.ones(4), ranks.pair)
    except RuntimeError as error:
        return str(error)
    finally:
        distributed._CHECKS.clear()
    return ""


@pytest.mark.parametrize(
    ("how", "mine", "theirs"),
    [
        ("operation", "sum (4,) float32, call 2", "swap (4,) float32, call 2"),
        ("shape", "sum (4,) float32, call 2", "sum (2, 2) float32, call 2"),
        ("dtype", "sum (4,) float32, call 2", "sum (4,) float64, call 2"),
    ],
)
def test_calls_that_differ_are_told_before_they_garble(
    pair: Ranks, how: str, mine: str, theirs: str
) -> None:
    said = pair.run(called, how)
    expected = "the processes of a group call different collectives"
    assert said == [f"{expected} (0: {mine}; 1: {theirs})"] * 2


def test_calls_that_agree_go_on(pair: Ranks) -> None:
    assert pair.run(called, "") == ["", ""]


def counted(ranks: Mesh) -> Any:
    return ranks.gather_ints((ranks.rank,))


def test_all_are_told_in_rank_order(two_pairs: Ranks) -> None:
    assert two_pairs.run(counted) == [[(0,), (1,), (2,), (3,)]] * 4


def attempted(ranks: Mesh, port: int) -> tuple[int, str]:
    """Agents count restarts each for itself: rank 1 was started again, rank 0 was not."""
    before = dict(os.environ)
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_RESTART_COUNT=str(ranks.rank))
    try:
        met = distributed.meet({"lr": math.nan}, timeout=5)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return met.attempt, met.launcher


def test_who_was_started_again_is_met_all_the_same(pair: Ranks) -> None:
    one, other = pair.run(attempted, free_port())
    assert one == other
    assert one[0] == 1
    assert one[1].rpartition(" ")[2] == str(os.getpid())
