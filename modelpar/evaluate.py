"""Exact top-1 and top-5 error of a checkpoint: ``python -m modelpar.evaluate checkpoint=RUN_DIR``.

On two processes or one, under torchrun or not, with one view or the paper's ten.
"""

from pathlib import Path
from typing import NoReturn

from modelpar import launch
from modelpar.distributed import Mesh
from modelpar.jobs import Job
from modelpar.settings import EvaluateSettings
from modelpar.training import evaluation


def prepare(settings: EvaluateSettings, run_dir: Path | None) -> evaluation.Prepared:
    """Open all that the evaluation needs; it writes nothing."""
    del run_dir
    return evaluation.prepare(settings)


def work(
    prepared: evaluation.Prepared, settings: EvaluateSettings, mesh: Mesh, run_dir: Path
) -> float:
    """Evaluate on this rank; rank 0 prints; return the top-1 error in %."""
    del run_dir
    errors = evaluation.evaluate_checkpoint(settings, prepared, mesh)
    if mesh.rank == 0:
        print(evaluation.describe(errors, settings.views), flush=True)  # noqa: T201
    return errors.top1


def main() -> NoReturn:
    """Enter through either door."""
    launch.enter(Job("evaluate", prepare, work, keeps_runs=False))


if __name__ == "__main__":
    from modelpar.evaluate import main as installed_main  # spawn finds functions by module name

    installed_main()
