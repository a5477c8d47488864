"""The model card beside an exported file: the net, its data, its errors, how it was made."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import modelpar
from modelpar import environment
from modelpar.config import without_secrets
from modelpar.tables import markdown
from modelpar.training.checkpoint import Checkpoint
from modelpar.training.metrics import evaluations
from modelpar.training.run_dir import CONFIG
from modelpar.training.trained import TrainedNet

TERMS: Final = {  # of the images; those of the photographs are in docs/data.md
    "imagenet": "ImageNet's terms of access: non-commercial research and education; the images "
    "belong to their owners",
    "imagenette": "a part of ImageNet, whose terms hold",
    "photos": "photographs of scikit-image, each under its own terms, see docs/data.md",
    "fashion_mnist": "MIT license",
    "synthetic": "noise, without a license",
}
UNKNOWN: Final = "not known to modelpar; see where the images come from"


def history(trained: TrainedNet, checkpoints: int = 1) -> dict[str, Any]:
    """Return how a net was made, as far as it is recorded: ``made``, ``errors`` and ``settings``.

    Weights that are the mean of several ``checkpoints``, or a moving average, have no errors yet.
    """
    past = _recorded(trained)
    averages = []
    if trained.kind == "ema":
        averages.append("moving average of the weights")
    if checkpoints > 1:
        averages.append(f"mean of {checkpoints} checkpoints")
    if averages:
        past["made"] = ", ".join([past["made"] or "training not recorded", *averages])
        past["errors"] = None
    return past


def _recorded(trained: TrainedNet) -> dict[str, Any]:
    """Return the history in the record of an exported file, or in the run of a checkpoint."""
    if not isinstance(trained.source, Checkpoint):
        return {key: trained.record.get(key) for key in ("made", "errors", "settings")}
    folder, versions = trained.source.folder, trained.record.get("versions", {})
    run_dir = folder.parent.parent
    config = run_dir / CONFIG
    programs = ", ".join(f"{name} {version}" for name, version in versions.items())
    made = f"trained for {trained.step} steps from seed {trained.seed} with {programs}"
    return {
        "made": made,
        "errors": evaluations(run_dir).get(trained.step),
        "settings": config.read_text("utf-8", "replace") if config.is_file() else None,
    }


def card(out: str, trained: TrainedNet, parameters: int, what: str, checkpoints: int) -> str:
    """Return the card of ``out``, a file that takes and returns ``what``, as Markdown.

    ``checkpoints``: how many the weights are the mean of.
    """
    plan, stats, past = trained.plan, trained.statistics, history(trained, checkpoints)
    program = Path(sys.argv[0]).stem.removeprefix("modelpar-")
    words = [f"modelpar-{program}", *sys.argv[1:]]
    columns = "two columns" if plan.columns > 1 else "one column"
    rows = [
        ("net", f"`{plan.net}`, {columns}, {parameters:,} parameters"),
        ("recipe", f"`{plan.recipe.name}`"),
        ("file", what),
    ]
    if stats is not None:
        means = ", ".join(f"{one:.2f}" for one in stats.mean.flatten(1).mean(1).tolist())
        rows.append(("mean colour", f"{means} (red, green, blue, 0-255)"))
    rows += [
        ("data", f"`{trained.data.name}`, {plan.num_classes} classes"),
        ("terms of the data", TERMS.get(trained.data.name, UNKNOWN)),
        ("error", _error(past["errors"])),
        ("made", past["made"] or "not recorded"),
        ("written", f"by {_program()}: `{shlex.join(words)}`"),
    ]
    text = f"# {Path(out).name}\n\n{markdown(('', ''), rows)}\n"
    if past["settings"]:
        text += f"\n## Settings of the training\n\n```yaml\n{past['settings'].rstrip()}\n```\n"
    return without_secrets(text)


def _error(row: Mapping[str, Any] | None) -> str:
    """Return the errors of an evaluation in words."""
    if row is None:
        return "not recorded; modelpar-evaluate measures it"
    views = {1: "the central view"}.get(row.get("views", 1), f"{row.get('views')} views")
    return f"top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, {views} per test image"


def _program() -> str:
    """Return the version of this package, and its commit where it is a checkout."""
    commit = environment.commit(Path(modelpar.__file__).parent)
    return f"modelpar {modelpar.__version__}{f' (commit {commit})' if commit else ''}"
