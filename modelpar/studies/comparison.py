"""One table for each data set: our errors over the seeds, their difference, the published one."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Final

from modelpar import config
from modelpar.errors import SettingsError
from modelpar.studies import experiments
from modelpar.studies.runs import Run

HEAD: Final = (
    "experiment", "seeds", "steps", "views", "top-1 error, %", "top-5 error, %",
    "against", "difference, top-1", "published difference, top-1", "published",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The runs of one experiment on one data set, one a seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What they have in common."""
        return self.runs[0].settings

    @property
    def counted(self) -> dict[int, Run]:
        """The runs that came to their end, by seed; of one seed the first."""
        return {run.seed: run for run in reversed(self.runs) if run.ended}

    def errors(self, which: int) -> dict[int, float]:
        """Return the last top-1 (1) or top-5 (2) error in % by seed."""
        return {seed: run.tests[-1][which] for seed, run in sorted(self.counted.items())}

    @property
    def steps(self) -> str:
        """How long they ran."""
        lengths = sorted({run.losses[-1][0] for run in self.runs if run.losses})
        return "-".join(str(length) for length in dict.fromkeys((*lengths[:1], *lengths[-1:])))

    @property
    def claim(self) -> dict[str, Any]:
        """What was published of it, nothing where it was told otherwise than its experiment."""
        return {} if experiments.overridden(self.runs[0]) else self.settings.get("published") or {}

    @property
    def published(self) -> dict[str, Any] | None:
        """The error that was published of it, None where none was."""
        return self.claim if self.claim.get("top1") is not None else None


def group(runs: Sequence[Run]) -> dict[str, list[Group]]:
    """Return the groups of each data set, in the order in which the runs came."""
    sets: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        sets.setdefault(run.data, {}).setdefault(run.key, []).append(run)
    return {data: _named(list(groups.values())) for data, groups in sets.items()}


def _named(groups: list[list[Run]]) -> list[Group]:
    """Give each group a name of its own, however often an experiment was run another way."""
    labels = [" ".join([runs[0].label, *experiments.overridden(runs[0])]) for runs in groups]
    named: list[Group] = []
    for place, runs in enumerate(groups):
        same = labels[: place + 1].count(labels[place])
        label = labels[place] if same == 1 else f"{labels[place]} ({runs[0].folder})"
        named.append(Group(label, tuple(sorted(runs, key=lambda run: run.seed))))
    return named


def published_difference(of: Group) -> float | None:
    """Return the published top-1 error less its control's, where both are of the same images."""
    own, name = of.published, of.settings.get("control")
    if own is None or name is None:
        return None
    control = of.settings.get("control_published")
    if control is None:
        try:
            control = config.load_group("experiment", name).get("published") or {}
        except SettingsError:  # an experiment of one's own
            return None
    files = experiments.changed(of.settings.get("experiment") or "", name) or {}
    alike = [key for key in ("set", "views") if key not in files]
    if any(control.get(key) != own.get(key) for key in alike) or control.get("top1") is None:
        return None
    return float(own["top1"]) - float(control["top1"])


def difference(of: Group, groups: Sequence[Group]) -> tuple[str, list[float]]:
    """Return the control's name, and our top-1 error less its for each seed that both have.

    The control was trained as ours was, but for what the two experiments' files have differently.
    """
    name, first = of.settings.get("control"), of.runs[0]
    control = next((one for one in groups if experiments.controls(first, one.runs[0])), None)
    if name is None or control is None:
        return name or "", []
    ours, theirs = of.errors(1), control.errors(1)
    return name, [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def rows(groups: Sequence[Group]) -> list[list[str]]:
    """Return the cells of one data set's table."""
    cells: list[list[str]] = []
    for one in groups:
        name, own = difference(one, groups)
        theirs, figure = published_difference(one), one.published
        source = one.claim.get("source") or ""
        if figure:
            views = f"{figure['views']} view{'s' if figure['views'] != 1 else ''}"
            five = "" if figure["top5"] is None else f" / {figure['top5']:g}"
            source = f"{figure['top1']:g}{five} on {figure['set']}, {views} ({source})"
        cells.append(
            [
                one.label,
                str(len(one.counted)),
                one.steps,
                str(one.settings.get("views", 1)),
                spread(list(one.errors(1).values())),
                spread(list(one.errors(2).values())),
                name,
                spread(own, signed=True),
                "" if theirs is None else f"{theirs:+.2f}",
                source,
            ]
        )
    return cells


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Return mean and standard deviation over the seeds."""
    if not values:
        return ""
    sign = "+" if signed else ""
    if len(values) == 1:
        return f"{values[0]:{sign}.2f}"
    return f"{mean(values):{sign}.2f} ± {stdev(values):.2f}"


APART: Final = (
    "Errors on different images cannot be compared: each data set has a table of its own."
)
BESIDE: Final = (
    "Published errors are of the images they name. Where ours are others, only the sign of a "
    "difference can be held against the published one."
)


def left_out(sets: dict[str, list[Group]]) -> list[str]:
    """Return a line for each run that is in no mean, saying why."""
    lines: list[str] = []
    for one in (one for groups in sets.values() for one in groups):
        for run in one.runs:
            if not run.ended:
                lines.append(f"{run.folder}: has not come to its end, it is left out")
            elif one.counted[run.seed] is not run:
                lines.append(f"{run.folder}: seed {run.seed} once more, it is left out")
    return lines


def grid(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(sets: dict[str, list[Group]]) -> str:
    """Return all tables as Markdown."""
    blocks = [APART] if len(sets) > 1 else []
    for data, groups in sets.items():
        title = f"**{data}** (mean ± standard deviation over seeds)"
        blocks += [title, grid(HEAD, rows(groups))]
    return "\n\n".join([*blocks, *left_out(sets), BESIDE])


def as_csv(sets: dict[str, list[Group]]) -> str:
    """Return all tables as one CSV, the data set in the first column."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["data", *HEAD])
    for data, groups in sets.items():
        writer.writerows([data, *cells] for cells in rows(groups))
    return text.getvalue()
