"""Figures 1, 3 and 4 of trainings, and what they show as tables."""

from dataclasses import astuple
from pathlib import Path

from matplotlib.figure import Figure

from modelpar import tables
from modelpar.analysis.activations import MEASURES
from modelpar.errors import DataError
from modelpar.files import write_texts
from modelpar.schemas import FiguresSettings
from modelpar.studies import plots, snapshots
from modelpar.studies.runs import find, read


def figures(settings: FiguresSettings) -> None:
    """Write pictures and tables of the checkpoint and the runs, and print the short tables."""
    runs = [read(folder) for folder in find(settings.runs)]
    snapshot = snapshots.of_checkpoint(settings) if settings.checkpoint is not None else None
    sources = snapshots.all_kernels(snapshot, runs)
    learned = [run for run in runs if run.training]
    if not (sources or learned):
        raise DataError(f"runs={settings.runs}: none has a checkpoint or a training error yet")
    pictures: dict[str, Figure] = {}
    texts: dict[str, str] = {}
    if learned:
        pictures["figure1.png"] = plots.figure1(learned)
    if sources:
        pictures["figure3.png"] = plots.figure3(sources)
        texts["specialisation.csv"] = tables.comma_separated(
            snapshots.HEAD, snapshots.kernel_rows(sources)
        )
    if snapshot:
        pictures["figure4.png"] = plots.figure4(snapshot)
        pictures["activations.png"] = plots.activations(snapshot.activity)
        texts["activations.csv"] = tables.comma_separated(
            ("layer", "column", *MEASURES), map(astuple, snapshot.activity)
        )
    print(snapshots.report(sources, runs))  # noqa: T201
    write_texts(settings.out, texts)
    for name, picture in pictures.items():
        picture.savefig(Path(settings.out, name), dpi=plots.DPI)
    print(f"\n{settings.out}: {', '.join([*pictures, *texts])}")  # noqa: T201
