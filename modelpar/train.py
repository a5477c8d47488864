"""Train the two-column net: ``torchrun --nproc-per-node 2 -m modelpar.train [key=value ...]``.

Or ``python -m modelpar.train``, which starts the two processes itself.
"""

from pathlib import Path
from typing import Final, NoReturn

from modelpar import launch
from modelpar.distributed import Mesh
from modelpar.files import check_space, check_writable
from modelpar.jobs import Job
from modelpar.settings import TrainSettings
from modelpar.training import trainer
from modelpar.training.prepare import Prepared, final_error, prepare, resume_point
from modelpar.training.run_dir import check_compatible

NOTES: Final = 10**6  # bytes, without checkpoints: settings, rows, what Hydra keeps


def open_run(settings: TrainSettings, run_dir: Path | None) -> Prepared:
    """Open all that the training needs; raise where ``run_dir`` or what it resumes do not fit."""
    if run_dir is not None:
        check_writable("run_dir", run_dir)
        check_space(run_dir, NOTES, "what a run writes down")
        check_compatible(run_dir, settings)
    prepared = prepare(settings)
    resume_point(settings, prepared, run_dir)
    return prepared


def work(prepared: Prepared, settings: TrainSettings, mesh: Mesh, run_dir: Path) -> float:
    """Train on this rank; return the last top-1 error in %."""
    return trainer.train(settings, prepared, mesh, run_dir)


def over(prepared: Prepared, settings: TrainSettings, run_dir: Path) -> float | None:
    """Return the last top-1 error in % of a run that is over, None of any other."""
    return final_error(prepared, run_dir, resume_point(settings, prepared, run_dir))


def main() -> NoReturn:
    """Enter through either door."""
    launch.enter(Job("train", open_run, work, over))


if __name__ == "__main__":
    from modelpar.train import main as installed_main  # spawn finds functions by module name

    installed_main()
