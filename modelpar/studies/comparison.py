"""Compare runs: a table per data set of mean errors over seeds, controls and published errors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import mean, stdev
from typing import Any, Final

from modelpar import config, tables
from modelpar.errors import SettingsError
from modelpar.studies.runs import SIZES, Run, identity
from modelpar.tables import mean_std

HEAD: Final = (
    "experiment", "seeds", "steps", "views", "top-1 error, %", "top-5 error, %",
    "control", "difference to control, top-1", "95 % interval",
    "published difference, top-1", "published",
)  # fmt: skip
NOTE: Final = (
    "Each data set has its own table, since errors on different images cannot be compared. "
    "Published errors are for the images that they name. If ours are for other images, compare "
    "only the sign of a difference with the published one."
)
CONFIDENCE: Final = 0.95
NET: Final = ("recipe.", "model.", "crossing.", "init.")  # what experiments are about


@dataclass(frozen=True)
class Group:
    """The runs of one experiment on one data set, sorted by seed."""

    label: str
    runs: list[Run]

    @property
    def counted(self) -> dict[int, Run]:
        """The finished runs by seed; for each seed the first."""
        return {run.seed: run for run in reversed(self.runs) if run.finished}

    def errors(self, which: int) -> dict[int, float]:
        """Return the last top-1 (1) or top-5 (2) error in % by seed."""
        return {seed: run.tests[-1][which] for seed, run in sorted(self.counted.items())}


def group(runs: Sequence[Run]) -> dict[str, list[Group]]:
    """Return the groups of each data set, in the order of the runs.

    A label has the experiment, its overrides, the net whose weights it started with, and the
    first folder if these do not tell the groups apart.
    """
    kinds: dict[Any, list[Run]] = {}
    for run in runs:
        kind = (run.data, run.label, frozenset(run.identity.items()), run.initial)
        kinds.setdefault(kind, []).append(run)
    sets: dict[str, list[Group]] = {}
    for same in kinds.values():
        groups = sets.setdefault(same[0].data, [])
        initial = [f"init.checkpoint={same[0].initial}"] if same[0].initial else []
        label = " ".join([same[0].label, *overrides(same[0]), *initial])
        if label in [one.label for one in groups]:
            label += f" ({same[0].folder})"
        groups.append(Group(label, sorted(same, key=lambda run: run.seed)))
    return sets


# -- experiments and their controls --------------------------------------------------------------


@cache
def experiment(name: str | None) -> dict[str, Any]:
    """Return the settings of an experiment of ``conf/experiment/``; nothing if there is none."""
    try:
        return asdict(config.read("train", [f"experiment={name}"]))
    except SettingsError:
        return {}


def overrides(run: Run) -> list[str]:
    """Return the settings of net and recipe with which a run overrides its experiment."""
    name = run.settings.get("experiment")
    ours = {key: value for key, value in run.identity.items() if key.startswith(NET)}
    found = set(_different(ours, _identity(name))) - set(SIZES)
    if "recipe.name" in found:  # another recipe: do not list its values
        found = {key for key in found if not key.startswith("recipe.")} | {"recipe.name"}
    texts = (f"{key}={ours[key]}".replace('"', "") for key in sorted(found))
    return [text.replace("recipe.name", "recipe") for text in texts]


def changes(name: str | None, control: str | None) -> dict[str, tuple[str, str]]:
    """Return what differs between an experiment and its control; nothing if one is unknown."""
    return _different(_identity(name), _identity(control))


def _identity(name: str | None) -> dict[str, str]:
    settings = experiment(name)
    return identity(settings) if settings else {}


def _different(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, tuple[str, str]]:
    shared = ours.keys() & theirs.keys()  # old runs lack the newest settings
    return {key: (ours[key], theirs[key]) for key in shared if ours[key] != theirs[key]}


def is_control(run: Run, other: Run) -> bool:
    """Whether ``other`` is the control of ``run``, and they differ as their experiments do."""
    control = run.settings.get("control")
    if control is None or other.settings.get("experiment") != control:
        return False
    shared = run.identity.keys() & other.identity.keys()
    expected = changes(run.settings.get("experiment"), control)
    expected = {key: value for key, value in expected.items() if key in shared}
    return _different(run.identity, other.identity) == expected


def difference(of: Group, groups: Sequence[Group]) -> list[float]:
    """Return our top-1 error minus the control's, for each seed that both have."""
    control = next((one for one in groups if is_control(of.runs[0], one.runs[0])), None)
    theirs = control.errors(1) if control else {}
    return [error - theirs[seed] for seed, error in of.errors(1).items() if seed in theirs]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the confidence interval of the mean of at least two paired differences.

    That is mean ± t s / sqrt(n) for n seeds, where s is their sample standard deviation and t the
    quantile of Student's distribution with n - 1 degrees of freedom.  It is exact if the
    differences are independent and normally distributed.
    """
    from scipy.special import stdtrit  # noqa: PLC0415 - takes most of a second

    seeds = len(differences)
    quantile = float(stdtrit(seeds - 1, (1 + CONFIDENCE) / 2))
    half = quantile * stdev(differences) / math.sqrt(seeds)
    return mean(differences) - half, mean(differences) + half


def _interval_text(differences: Sequence[float]) -> str:
    if len(differences) < 2:  # noqa: PLR2004 - an interval needs a standard deviation
        return "none for one seed" if differences else ""
    low, high = interval(differences)
    return f"{low:+.2f} to {high:+.2f}{', includes zero' if low <= 0 <= high else ''}"


def published(run: Run) -> tuple[str, str]:
    """Return the published top-1 error minus its control's, and the published error in words.

    The difference is empty if they are for different images, both are if the run overrides its
    experiment.
    """
    ours = {} if overrides(run) else run.settings.get("published") or {}
    if ours.get("top1") is None:
        return "", ours.get("source") or ""
    top5 = "" if ours["top5"] is None else f" / {ours['top5']:g}"
    views = f"{ours['views']} view{'s' if ours['views'] != 1 else ''}"
    text = f"{ours['top1']:g}{top5} on {ours['set']}, {views} ({ours['source']})"
    control = run.settings.get("control")
    theirs = run.settings.get("control_published") or experiment(control).get("published")
    if not theirs or theirs.get("top1") is None:
        return "", text
    differ = changes(run.settings.get("experiment"), control)
    same = all(ours[key] == theirs[key] for key in ("set", "views") if key not in differ)
    return f"{ours['top1'] - theirs['top1']:+.2f}" if same else "", text


# -- tables --------------------------------------------------------------------------------------


def rows(groups: Sequence[Group]) -> Iterator[list[str]]:
    """Yield the rows of one data set's table."""
    for one in groups:
        settings, differences = one.runs[0].settings, difference(one, groups)
        lengths = sorted({run.tests[-1][0] for run in one.counted.values()})
        yield [
            one.label,
            str(len(one.counted)),
            ", ".join(map(str, lengths)),
            str(settings.get("views", 1)),
            mean_std(list(one.errors(1).values())),
            mean_std(list(one.errors(2).values())),
            settings.get("control") or "",
            f"{mean(differences):+.2f}" if differences else "",
            _interval_text(differences),
            *published(one.runs[0]),
        ]


def notes(sets: dict[str, list[Group]]) -> Iterator[str]:
    """Yield what to know about the tables, and each run that no mean includes."""
    for one in (one for groups in sets.values() for one in groups):
        for run in one.runs:
            if not run.finished:
                yield f"{run.folder}: left out, it is not finished"
            elif one.counted[run.seed] is not run:
                yield f"{run.folder}: left out, another run has the same seed {run.seed}"
    yield NOTE


def markdown(sets: dict[str, list[Group]]) -> str:
    """Return all tables as Markdown."""
    blocks: list[str] = []
    for data, groups in sets.items():
        title = f"**{data}** (mean ± standard deviation over seeds; {CONFIDENCE:.0%} intervals)"
        blocks += [title, tables.markdown(HEAD, rows(groups))]
    return "\n\n".join([*blocks, *notes(sets)])


def as_csv(sets: dict[str, list[Group]]) -> str:
    """Return all tables as one CSV table, with the data set in the first column."""
    lines = ([data, *cells] for data, groups in sets.items() for cells in rows(groups))
    return tables.comma_separated(["data", *HEAD], lines)
