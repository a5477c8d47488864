"""Recorded steps and values that are read later, without a GPU: its graphs and events are fake."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from modelpar.distributed import Mesh
from modelpar.errors import PeerLostError
from modelpar.images.loader import Batch
from modelpar.net.exchange import Link
from modelpar.net.plan import Recipe
from modelpar.training.engine import Learner
from modelpar.training.graph import EAGER_CALLS, Graphed
from modelpar.training.optimizer import MomentumDecay
from modelpar.training.readback import Launched, Readback

# -- recorded steps -------------------------------------------------------------------------------


@dataclass
class Net:
    """A step that sends four bytes per number of its images, and counts its calls."""

    link: Link
    calls: int = 0
    out: Tensor = field(default_factory=lambda: torch.zeros(3))

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.link.sent["fc6", "forward"] += images.nbytes
        self.link.swaps["fc6", "forward"] += 1
        return self.out.copy_(2 * images)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[Net], Graphed]:
    """Return how to make a Graphed whose graph is fake: a replay computes ``out`` again."""

    def graphed(net: Net) -> Graphed:
        @contextmanager
        def recording(_graph: Any, **_how: Any) -> Iterator[None]:
            yield

        def replay() -> None:
            net.out.copy_(2 * made.inputs[0])

        graph = SimpleNamespace(replay=replay, reset=lambda: net.out.fill_(torch.nan))
        monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: graph)
        monkeypatch.setattr("torch.cuda.graph", recording)
        monkeypatch.setattr("torch.cuda.current_stream", lambda: None)
        made = Graphed(net, net.link)
        return made

    return graphed


def link(column: int = 0) -> Link:
    return Link(lambda sent: (sent, lambda: None), column=column)


def test_a_recorded_step_reads_its_inputs_and_counts_what_it_sends(
    record: Callable[[Net], Graphed],
) -> None:
    net = Net(link())
    step = record(net)
    for number in range(1, 9):
        assert torch.equal(step(torch.full((3,), float(number))), torch.full((3,), 2.0 * number))
        assert net.link.bytes_sent == 12 * number
        assert net.link.swaps.total() == number
    assert net.calls == EAGER_CALLS + 1  # the last one was the recording
    assert step.graph is not None
    step.close()
    assert step.graph is None
    assert net.out.isnan().all()  # the graph no longer holds its memory


def test_a_step_that_cannot_be_recorded_runs_as_before_with_one_line(
    record: Callable[[Net], Graphed],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = Net(link(column=1))
    step = record(net)

    @contextmanager
    def refused(_graph: Any, **_how: Any) -> Iterator[None]:
        yield
        error = RuntimeError("operation failed due to a previous error")  # at the end
        error.__context__ = RuntimeError("operation not permitted when capturing\nmore lines")
        raise error

    monkeypatch.setattr("torch.cuda.graph", refused)
    for number in range(1, 9):
        assert torch.equal(step(torch.full((3,), float(number))), torch.full((3,), 2.0 * number))
        assert net.link.bytes_sent == 12 * number
    (line,) = capsys.readouterr().err.splitlines()
    said = "modelpar: column 1: cuda_graph is not used and steps are slower (operation not"
    assert line.startswith(said)


# -- values that are read later -------------------------------------------------------------------


def launched(number: int) -> Launched:
    return Launched(number, Batch(torch.zeros(1), torch.zeros(1), 0.0), 0, {}, ())


def test_values_are_read_in_order_and_the_newest_later() -> None:
    readback = Readback(Mesh(torch.device("cpu")))
    assert readback.in_flight == 0
    read: list[tuple[int, list[float]]] = []
    for number in (1, 2, 3):
        readback.put(torch.tensor([1.0, number / 2]), launched(number))
        read += [(done.number, values) for done, values in readback.take(in_flight=1)]
        assert len(read) == number - 1
    read += [(done.number, values) for done, values in readback.take()]
    assert read == [(number, [1.0, number / 2]) for number in (1, 2, 3)]
    assert list(readback.take()) == []


def test_a_step_that_does_not_end_means_that_a_rank_is_lost() -> None:
    readback = Readback(Mesh(torch.device("cpu"), timeout=0.05, columns=2))
    never: Any = SimpleNamespace(query=lambda: False)
    readback.queue.append((launched(7), torch.zeros(1), never))
    with pytest.raises(PeerLostError, match=r"^step 7: another rank does not respond \(0.05 s\)$"):
        list(readback.take())


def test_the_host_reads_nothing_between_backward_and_update() -> None:
    """A fake tensor has no values, so it raises an error where the host would read one."""
    trained: Any = Learner.__new__(Learner)  # of a small net
    trained.mesh, trained.link = Mesh(torch.device("cuda", 0)), None
    with FakeTensorMode():
        trained.net = nn.Linear(5, 3, device="cuda")
        trained.recipe = replace(Recipe.named("paper"), clip=1.0, ema=0.9)
        trained.optimizer = MomentumDecay(trained.net, trained.recipe)
        trained.good = torch.ones((), dtype=torch.int32, device="cuda")
        for weight in trained.net.parameters():
            weight.grad = torch.ones_like(weight)
        loss = torch.ones((), device="cuda")
        with pytest.raises(DataDependentOutputException):  # so the test can fail
            bool(loss.isfinite())
        trained._check_finite(loss)
        trained._clip()
        trained.optimizer.step(trained.good)
