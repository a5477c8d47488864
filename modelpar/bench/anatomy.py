"""Where one step's time goes, by the layer it is spent on, as the profiler saw it."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from modelpar.net.exchange import Link
from modelpar.net.paper import LAYERS

PLACES: Final = (*LAYERS, "norms", "pools", "update", "crossings", "rest")
WAIT: Final = "modelpar::wait"
TRAVELS: Final = ("gloo:send", "gloo:recv")
MATRIX: Final = 2  # dimensions
NAMES: Final = {
    "crossings": (WAIT,),
    "update": ("Optimizer.step",),
    "pools": ("max_pool2d", "MaxPool2D"),
    "norms": ("avg_pool", "AvgPool", "Pow", "aten::pow", "Response", "Compiled"),
}


class Span(NamedTuple):
    """Something that lasted: from and to in s, on the host's clock."""

    start: float
    end: float
    place: str  # one of PLACES, or "travel": a swap under way


@contextmanager
def waits_named(link: Link | None) -> Generator[None]:
    """Make the profiler see when ``link`` waits for a swap."""
    if link is None:
        yield
        return
    transport = link.transport

    def named(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        received, wait = transport(tensor)

        def seen() -> None:
            with record_function(WAIT):
                wait()

        return received, seen

    link.transport = named
    try:
        yield
    finally:
        link.transport = transport


def profiled(step: Callable[[], None], net: nn.Module) -> list[Span]:
    """Return where ``step`` spent its time on this process, in order, without gaps in between.

    The profiler itself costs some of the time it shows.
    """
    shapes = _shapes(net)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step()
    zero: int = seen.profiler.kineto_results.trace_start_ns()  # pyright: ignore[reportOptionalMemberAccess]
    spans: list[Span] = []
    for event in seen.events() or ():
        if event.is_async and event.name in TRAVELS:
            spans.append(_span(event, "travel", zero))
        elif event.cpu_parent is None and not event.is_async:
            spans += (_span(part, place, zero) for part, place in _parts(event, shapes))
    return sorted(spans)


def _span(event: Any, place: str, zero: int) -> Span:
    start, end = event.time_range.start, event.time_range.end  # us
    return Span(zero / 1e9 + start / 1e6, zero / 1e9 + end / 1e6, place)


def _parts(event: Any, shapes: dict[Any, str]) -> Iterator[tuple[Any, str]]:
    """Yield the outermost events whose place is known, and the innermost of the others."""
    place = _place(event, shapes)
    if place is not None:
        yield event, place
    elif not event.cpu_children:
        yield event, "rest"
    for child in event.cpu_children if place is None else ():
        yield from _parts(child, shapes)


def _place(event: Any, shapes: dict[Any, str]) -> str | None:
    """Return the place of an event, by its name, or by the weight among its operands."""
    name = event.name
    for place, words in NAMES.items():
        if any(word in name for word in words):
            return place
    sizes = [tuple(size) for size in event.input_shapes or () if size]
    if name in {"aten::mm", "aten::addmm"}:
        (rows, inner), (_, columns) = [size for size in sizes if len(size) == MATRIX][-2:]
        sizes = [(rows, columns), (rows, inner), (inner, columns)]
    elif "conv" not in name:
        return None
    return next((shapes[size] for size in sizes if size in shapes), None)


def _shapes(net: nn.Module) -> dict[tuple[int, ...], str]:
    """Return the layer of each shape of weight, whole or the half that reads one column."""
    shapes: dict[tuple[int, ...], str] = {}
    for name in LAYERS:
        out, inputs, *kernel = net.get_parameter(f"{name}.weight").shape
        shapes[out, inputs, *kernel] = name
        if not kernel:
            shapes[inputs, out] = name
        if name not in {"conv1", "fc8"}:
            shapes.setdefault((out, inputs // 2, *kernel), name)
            shapes.setdefault((inputs // 2, out, *kernel), name)
    return shapes


def seconds(spans: Iterable[Span]) -> dict[str, float]:
    """Return the seconds that a step spent on each of PLACES."""
    total = dict.fromkeys(PLACES, 0.0)
    for span in spans:
        if span.place in total:
            total[span.place] += span.end - span.start
    return total
