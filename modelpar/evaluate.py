"""Exact top-1 and top-5 error of a checkpoint: ``modelpar-evaluate checkpoint=RUN_DIR``.

With two processes or one, under torchrun or not, with one view or the paper's ten.
"""

from functools import partial

from modelpar import launch
from modelpar.distributed import Mesh
from modelpar.settings import EvaluateSettings
from modelpar.training.evaluation import Prepared, evaluate_checkpoint, prepare


def evaluate(settings: EvaluateSettings, prepared: Prepared, mesh: Mesh, _run_dir: None) -> None:
    """Evaluate; rank 0 prints the errors with enough digits to compare two evaluations."""
    errors = evaluate_checkpoint(settings, prepared, mesh)
    views = "the central view" if settings.views == 1 else f"{settings.views} views"
    if mesh.rank == 0:
        print(  # noqa: T201
            f"{errors.text}, {errors.samples} images, {views}",
            flush=True,
        )


main = partial(launch.main, "evaluate", prepare, evaluate)

if __name__ == "__main__":
    main()
