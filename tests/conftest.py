"""Fixtures of all tests: processes held for a module, seeds, a cache of the run's own."""

import os
from collections.abc import Iterator
from pathlib import Path

# Threads of OpenMP would wait by computing, which takes the processor from what they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import pytest
import torch
from catalogue import write_images
from ranks import Ranks, return_memory

from modelpar import device

# Only the processes that GPU tests start see a GPU, by the fixture gpu_env.
GPUS = torch.cuda.device_count()
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")

device.set_up("cpu")  # keeps freed memory, as a rank does: nets train faster


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, but not from the workers of pytest-xdist, which start later."""
    if not config.getoption("numprocesses", None):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_report_header() -> str:
    """Name what the results depend on."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """Keep freed memory within a test only: tests/distributed would need 12 GB."""
    yield
    return_memory()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that every test and every command it starts shares."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder / "modelpar"


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    """Two gloo processes: the pair."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_pairs() -> Iterator[Ranks]:
    """Four gloo processes: two replicas of the pair."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_replicas() -> Iterator[Ranks]:
    """Two gloo processes: two replicas of a net of one column."""
    ranks = Ranks(2, columns=1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty training images of two classes: five steps of eight an epoch."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, train=20, val=5)
    return root


@pytest.fixture(scope="session")
def gpu_env() -> dict[str, str]:
    """Return the environment of a process that sees the GPUs; skip the test if there are none."""
    if not GPUS:
        pytest.skip("needs a GPU, and torch finds none here")
    tests = Path(__file__).parent
    paths = [*map(str, (tests.parent, tests, tests / "distributed")), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    del env["CUDA_VISIBLE_DEVICES"]
    return env if VISIBLE_GPUS is None else {**env, "CUDA_VISIBLE_DEVICES": VISIBLE_GPUS}
