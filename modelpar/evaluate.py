"""Exact top-1 and top-5 error of a checkpoint: ``modelpar-evaluate checkpoint=RUN_DIR``.

With two processes or one, under torchrun or not, with one view or the paper's ten.  A list of
checkpoints gives the errors of each, and of their average.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

from modelpar import config, launch
from modelpar.distributed import Mesh
from modelpar.settings import EvaluateSettings
from modelpar.training.evaluation import (
    Evaluation,
    Prepared,
    evaluate_checkpoint,
    prepare,
    write_out,
)


def evaluate(
    settings: EvaluateSettings, prepared: list[Prepared], mesh: Mesh, _run_dir: None
) -> None:
    """Evaluate; rank 0 prints the errors with enough digits to compare two evaluations."""
    found = evaluate_checkpoint(settings, prepared, mesh)
    with mesh.all_or_none():
        if mesh.rank == 0:
            print("\n".join(lines(found)), flush=True)  # noqa: T201
            if settings.out is not None:
                content = config.without_secrets(asdict(found))
                write_out(Path(settings.out), json.dumps(content, indent=1) + "\n")


def lines(found: Evaluation) -> list[str]:
    """Return what is printed: a line for each net, and one for the average."""
    views = "the central view" if found.views == 1 else f"{found.views} views"
    each = [f"{one.text}, {one.samples} images, {views}" for one in found.members]
    if found.average is None:
        return each
    how = "equal weights"
    if found.searched:
        shares = ", ".join(f"{weight:.3f}" for weight in found.weights)
        how = f"weights {shares} searched on {found.searched} other test images"
    named = [f"{path}: {text}" for path, text in zip(found.checkpoints, each, strict=True)]
    return [*named, f"average of {len(each)} nets, {how}: {found.average.text}"]


main = partial(launch.main, "evaluate", prepare, evaluate)

if __name__ == "__main__":
    main()
