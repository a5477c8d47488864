"""Exact top-1 and top-5 error of a checkpoint: ``modelpar-evaluate checkpoint=RUN_DIR``.

With two processes or one, under torchrun or not, with one view or the paper's ten.
"""

from pathlib import Path
from typing import NoReturn

from modelpar import launch
from modelpar.distributed import Mesh
from modelpar.settings import EvaluateSettings
from modelpar.training import evaluation


def prepare(settings: EvaluateSettings, run_dir: Path | None) -> evaluation.Prepared:
    """Open everything that the evaluation needs; writes nothing."""
    del run_dir
    return evaluation.prepare(settings)


def work(
    settings: EvaluateSettings, prepared: evaluation.Prepared, mesh: Mesh, run_dir: Path
) -> None:
    """Evaluate on this rank; rank 0 prints the errors."""
    del run_dir
    errors = evaluation.evaluate_checkpoint(settings, prepared, mesh)
    if mesh.rank == 0:
        print(evaluation.describe(errors, settings.views), flush=True)  # noqa: T201


def main() -> NoReturn:
    """Run as the launcher or, under torchrun, as a rank."""
    launch.main(launch.Command("evaluate", prepare, work, has_run_dir=False))


if __name__ == "__main__":
    main()
