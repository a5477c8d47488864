"""Train the two-column net: ``torchrun --nproc-per-node 2 -m modelpar.train [key=value ...]``.

Or ``python -m modelpar.train``, which starts the two processes itself.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Final, NoReturn

from modelpar import config, launch
from modelpar.jobs import Job
from modelpar.mesh import Mesh
from modelpar.settings import TrainSettings
from modelpar.training import checkpoint, loop, runs, start

NOTES: Final = 10**6  # bytes, without checkpoints: settings, rows, what Hydra keeps


def prepare(settings: TrainSettings, run_dir: Path | None) -> start.Prepared:
    """Open all that the training needs; raise where ``run_dir`` or what it resumes do not fit."""
    if run_dir is not None:
        config.check_run_dir(run_dir)
        checkpoint.check_space(run_dir, NOTES, "what a run writes down")
        runs.check_same(run_dir, asdict(settings), settings.resume)
    prepared = start.prepare(settings)
    start.find_start(settings, prepared, run_dir)
    return prepared


def work(prepared: start.Prepared, settings: TrainSettings, mesh: Mesh, run_dir: Path) -> float:
    """Train on this rank; return the last top-1 error in %."""
    return loop.train(settings, prepared, mesh, run_dir)


def over(prepared: start.Prepared, settings: TrainSettings, run_dir: Path) -> float | None:
    """Return the last top-1 error in % of a run that is over, None of any other."""
    return start.last_error(prepared, start.find_start(settings, prepared, run_dir))


def main() -> NoReturn:
    """Enter through either door."""
    launch.enter(Job("train", prepare, work, over))


if __name__ == "__main__":
    from modelpar.train import main as installed_main  # spawn finds functions by module name

    installed_main()
