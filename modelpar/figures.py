"""Figures 1, 3 and 4 from trainings: ``python -m modelpar.figures checkpoint=RUN_DIR``.

``runs=[RUN,SWEEP,'runs/*']`` adds those runs to figure 3, and draws figure 1 of them.
"""

from pathlib import Path
from typing import NoReturn

from matplotlib.figure import Figure

from modelpar import launch
from modelpar.errors import DataError
from modelpar.settings import FiguresSettings
from modelpar.studies import curves, plots, portrait, snapshots
from modelpar.studies.runs import find, read


def figures(settings: FiguresSettings) -> None:
    """Look at the net and the runs; write pictures and tables, and print the short ones."""
    runs = [read(folder) for folder in find(settings.runs)]
    seen = portrait.portrait(settings) if settings.checkpoint is not None else None
    sources = snapshots.gathered(runs, seen.kernels if seen else None)
    learnt = [run for run in runs if run.training]
    if not (sources or learnt):
        raise DataError(f"runs={settings.runs}: none has a checkpoint or a training error yet")
    pictures: dict[str, Figure] = {}
    texts: dict[str, str] = {}
    if learnt:
        pictures["figure1.png"] = plots.figure1(learnt)
    if sources:
        pictures["figure3.png"] = plots.figure3(sources)
        texts["specialisation.csv"] = snapshots.as_csv(sources)
    if seen:
        pictures["figure4.png"] = plots.figure4(seen)
        pictures["activations.png"] = plots.activations(seen.activity)
        texts["activations.csv"] = portrait.as_csv(seen.activity)
    print(snapshots.report(sources, runs))  # noqa: T201
    if runs:
        print(f"\n{curves.report(runs)}")  # noqa: T201
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.savefig(out / name, dpi=plots.DPI)
    for name, text in texts.items():
        (out / name).write_text(text)
    print(f"\n{out}: {', '.join([*pictures, *texts])}")  # noqa: T201


def main() -> NoReturn:
    """Run in this process, with the whole net on one device."""
    launch.enter_alone("figures", figures)


if __name__ == "__main__":
    main()
