"""Train the two-column net: ``modelpar-train [key=value ...]`` starts its two processes.

Or ``torchrun --nproc-per-node 2 -m modelpar.train [key=value ...]``.
"""

from pathlib import Path
from typing import Final, NoReturn

from modelpar import launch
from modelpar.distributed import Mesh
from modelpar.files import check_space, check_writable
from modelpar.settings import TrainSettings
from modelpar.training import trainer
from modelpar.training.prepare import Prepared, prepare, resume_point
from modelpar.training.run_dir import check_compatible

LOG_BYTES: Final = 10**6  # that a run writes besides its checkpoints


def open_run(settings: TrainSettings, run_dir: Path | None) -> Prepared:
    """Open everything that the training needs; raises if ``run_dir`` or ``resume`` do not fit."""
    if run_dir is not None:
        check_writable("run_dir", run_dir)
        check_space(run_dir, LOG_BYTES, "what a run writes down")
        check_compatible(run_dir, settings)
    prepared = prepare(settings)
    resume_point(settings, prepared, run_dir)
    return prepared


def work(settings: TrainSettings, prepared: Prepared, mesh: Mesh, run_dir: Path) -> None:
    """Train on this rank."""
    trainer.train(settings, prepared, mesh, run_dir)


def main() -> NoReturn:
    """Run as the launcher or, under torchrun, as a rank."""
    launch.main(launch.Command("train", open_run, work))


if __name__ == "__main__":
    main()
