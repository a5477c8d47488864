"""Figure 3 over runs: what the kernels of each column are, and by how much the columns differ."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from modelpar.analysis.kernels import (
    COLOUR_SHARE,
    RANDOM_SHARE,
    Specialisation,
    colour_difference,
    specialisation,
)
from modelpar.net.plan import plan_of
from modelpar.studies.comparison import grid, spread
from modelpar.studies.runs import Run
from modelpar.training import checkpoint

HEAD: Final = (
    "run", "seed", "step", "off grey, column 0", "off grey, column 1", "difference",
    "colour kernels", "cycles/pixel, column 0", "cycles/pixel, column 1",
)  # fmt: skip
COLUMNS_OF_CSV: Final = (
    "run", "seed", "step", "column", "kernels", "off_grey", "off_grey_std", "colour",
    "frequency", "frequency_std",
)  # fmt: skip
BELOW: Final = (
    f"Mean ± standard deviation over a column's kernels. Off grey: the share of a kernel's energy "
    f"off the axis of greys, {RANDOM_SHARE:.2f} where nothing is learnt; "
    f"colour: over {COLOUR_SHARE:g}. "
    "Difference ± standard error: column 0 less column 1."
)


@dataclass(frozen=True)
class Kernels:
    """The first layer's kernels (C, 3, K, K) of one checkpoint, and where they are from."""

    name: str
    label: str  # what runs of several seeds have in common
    folder: Path | None  # of the step; None: an exported file
    seed: int
    step: int
    kernels: Tensor
    columns: int

    @property
    def found(self) -> list[Specialisation]:
        """What each column's kernels are."""
        return specialisation(self.kernels, self.columns)


def of_run(run: Run) -> Kernels | None:
    """Return the kernels of a run's newest checkpoint, None where it has none.

    Raises CheckpointError where it is damaged.
    """
    saved = checkpoint.newest(run.folder)
    if saved is None:
        return None
    columns = plan_of(saved.manifest["plan"]).columns
    kernels = checkpoint.read_conv1(saved)
    return Kernels(
        str(run.folder), run.label, saved.folder, run.seed, saved.step, kernels, columns
    )


def gathered(runs: Sequence[Run], alone: Kernels | None) -> list[Kernels]:
    """Return the kernels of ``alone`` and of the runs that have a checkpoint, each step once."""
    found = [kernels for run in runs if (kernels := of_run(run)) is not None]
    folders = {_place(one) for one in found}
    first = [alone] if alone is not None and _place(alone) not in folders else []
    return [*first, *found]


def _place(one: Kernels) -> Path | None:
    return one.folder.resolve() if one.folder is not None else None


def rows(sources: Sequence[Kernels]) -> list[list[str]]:
    """Return the cells of the table."""
    cells: list[list[str]] = []
    for one in sources:
        found = one.found
        grey = [spread(own.colour_share.tolist()) for own in found]
        cycles = [spread(own.frequency.tolist()) for own in found]
        apart = colour_difference(found)
        cells.append(
            [
                one.name,
                str(one.seed),
                str(one.step),
                *[*grey, ""][:2],
                "" if apart is None else f"{apart[0]:+.2f} ± {apart[1]:.2f}",
                " + ".join(str(own.colour_kernels) for own in found) + f" of {len(one.kernels)}",
                *[*cycles, ""][:2],
            ]
        )
    return cells


def over_seeds(sources: Sequence[Kernels]) -> list[str]:
    """Say of each experiment with several runs by how much its columns differ, either way."""
    groups: dict[str, list[float]] = {}
    for one in sources:
        if apart := colour_difference(one.found):
            groups.setdefault(one.label, []).append(abs(apart[0]))
    return [
        f"{label}: the columns are {spread(apart)} apart in {len(apart)} runs, whichever has the "
        "colours"
        for label, apart in groups.items()
        if len(apart) > 1
    ]


def report(sources: Sequence[Kernels], runs: Sequence[Run]) -> str:
    """Return what is printed: the table, what seeds have in common, which ``runs`` are not in."""
    shown = {one.name for one in sources}
    lines = [grid(HEAD, rows(sources)), "", *over_seeds(sources), BELOW] if sources else []
    lines += [
        f"{run.folder}: no checkpoint yet, it is not in figure 3"
        for run in runs
        if str(run.folder) not in shown
    ]
    return "\n".join(lines)


def as_csv(sources: Sequence[Kernels]) -> str:
    """Return a row for each column of each source."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS_OF_CSV)
    for one in sources:
        for column, own in enumerate(one.found):
            numbers = [
                f"{float(value):.4f}"
                for values in (own.colour_share, own.frequency)
                for value in (values.mean(), values.std())
            ]
            where = [one.name, one.seed, one.step, column, len(own.colour_share)]
            writer.writerow([*where, *numbers[:2], own.colour_kernels, *numbers[2:]])
    return text.getvalue()
