"""What a process does, as a trace for Perfetto, chrome://tracing or TensorBoard."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile


@contextmanager
def traced(path: Path) -> Generator[None]:
    """Write a Chrome trace of the block to ``path``, which ends in ``.json.gz``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile() as profiler:
        yield
    profiler.export_chrome_trace(str(path))
