"""The fixture of the tests that start trainings on a GPU."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import children, send
from starting import Start


@pytest.fixture
def start(tmp_path: Path, images: Path, gpu_env: dict[str, str]) -> Iterator[Start]:
    start = Start(tmp_path, images, gpu_env)
    yield start
    for process in start.started:
        if process.poll() is None:
            for one in [process.pid, *children(process.pid, deep=True)]:
                send(signal.SIGKILL, one)
            process.wait()
