"""What a training prints around its progress bar: a block at the start, and one at the end."""

import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final

from modelpar.distributed import Mesh
from modelpar.overrides import shell_word
from modelpar.progress import show
from modelpar.settings import TrainSettings
from modelpar.training.checkpoint import list_steps
from modelpar.training.metrics import evaluations
from modelpar.training.prepare import Prepared

LABEL: Final = 9  # columns of a row's name


def show_rows(rows: Mapping[str, str]) -> None:
    """Print a line for each row; on a terminal its words are wrapped, below each other."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for name, text in rows.items():
        label = f"{name:<{LABEL}} "
        lines = textwrap.wrap(
            label + text,
            width,
            subsequent_indent=" " * len(label),
            break_long_words=False,
            break_on_hyphens=False,
        )
        show("\n".join(lines))


def started(
    settings: TrainSettings, prepared: Prepared, mesh: Mesh, run_dir: Path, own: int
) -> None:
    """Print what will be trained, from where, and how long; ``own``: this column's parameters."""
    plan, images, start = prepared.plan, prepared.images, prepared.start
    # The columns share no parameter, and only this one has the bias of the logits.
    parameters = mesh.columns * own - (mesh.columns - 1) * plan.num_classes
    batch = settings.batch_size * mesh.replicas
    epochs = prepared.steps / prepared.epoch_steps
    begins = "new run"
    if start is not None:
        begins = f"continues from step {start.step} ({start.folder})"
    elif settings.init.checkpoint is not None:
        begins += f", {', '.join(settings.init.layers)} of {settings.init.checkpoint}"
    named = f"experiment {settings.experiment}, " if settings.experiment else ""
    show_rows(
        {
            "net": f"{named}{plan.net}, recipe {plan.recipe.name}, {parameters:,} parameters",
            "data": f"{prepared.data.name}, {len(images.train):,} training and "
            f"{len(images.test):,} test images, {plan.num_classes:,} classes, "
            f"crops of {plan.image_size} pixels",
            "length": f"{prepared.steps:,} steps of {batch:,} images, {epochs:.4g} epochs",
            "run_dir": str(run_dir),
            "start": begins,
        }
    )


def ended(
    settings: TrainSettings, prepared: Prepared, run_dir: Path, seconds: float | None = None
) -> None:
    """Print the last error, the best checkpoint, and commands that use the run.

    ``seconds``: the training time of this process; None: the run was already finished.
    """
    tests = evaluations(run_dir)
    last = tests[max(tests)]
    saved = [step for step in list_steps(run_dir / "checkpoints") if step in tests]
    best = min(saved, key=lambda step: tests[step]["top1"], default=last["step"])
    plan, images = prepared.plan, prepared.images
    done = f"step {last['step']:,} of {prepared.steps:,}"
    if seconds is not None:
        before = prepared.start.step if prepared.start else 0
        steps = f"{last['step'] - before:,} steps"
        done += f"; {steps} in {timedelta(seconds=round(seconds))}"
    chance = 100 - 100 / plan.num_classes
    views = f", {last['views']} views" if last.get("views", 1) > 1 else ""
    if "standard_error" in last:  # a run of an older version has none
        views += f" (standard error {last['standard_error']:.2f} %)"
    show_rows(
        {
            "finished": done,
            "error": f"{last['top1']:.2f} % of {len(images.test):,} test images{views}; "
            f"guessing: {chance:.2f} %",
            "top-5": f"{last['top5']:.2f} %",
            "best": f"{tests[best]['top1']:.2f} % at step {best:,}",
        }
    )
    for command in commands(run_dir, columns=settings.columns):
        show(f"  {command}")


def commands(run_dir: Path, columns: int) -> list[str]:
    """Return commands that use a run, as a shell reads them."""
    checkpoint, alone = shell_word("checkpoint", str(run_dir)), " columns=1" * (columns == 1)
    return [
        f"modelpar-evaluate {checkpoint}{alone} views=10",
        f"modelpar-predict {checkpoint} images=[FILE]",
        f"modelpar-export {checkpoint} out=net.safetensors",
        f"tensorboard --logdir {shlex.quote(str(run_dir))}",
    ]
