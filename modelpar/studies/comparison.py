"""Compare runs: a table per data set of mean errors over seeds, controls and published errors."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final

from modelpar import config, tables
from modelpar.errors import SettingsError
from modelpar.studies.runs import SIZES, Run, identity
from modelpar.tables import mean_std

HEAD: Final = (
    "experiment", "seeds", "steps", "views", "top-1 error, %", "top-5 error, %",
    "against", "difference, top-1", "published difference, top-1", "published",
)  # fmt: skip
NOTE: Final = (
    "Each data set has its own table, since errors on different images cannot be compared. "
    "Published errors are for the images that they name. If ours are for other images, compare "
    "only the sign of a difference with the published one."
)
NET: Final = ("recipe.", "model.", "crossing.")  # what experiments are about


@dataclass(frozen=True)
class Group:
    """The runs of one experiment on one data set, sorted by seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def counted(self) -> dict[int, Run]:
        """The finished runs by seed; for each seed the first."""
        return {run.seed: run for run in reversed(self.runs) if run.finished}

    def errors(self, which: int) -> dict[int, float]:
        """Return the last top-1 (1) or top-5 (2) error in % by seed."""
        return {seed: run.tests[-1][which] for seed, run in sorted(self.counted.items())}


def group(runs: Sequence[Run]) -> dict[str, list[Group]]:
    """Return the groups of each data set, in the order of the runs."""
    sets: dict[str, dict[Any, list[Run]]] = {}
    for run in runs:
        kind = (run.label, frozenset(run.identity.items()))
        sets.setdefault(run.data, {}).setdefault(kind, []).append(run)
    return {data: _labelled(list(groups.values())) for data, groups in sets.items()}


def _labelled(groups: list[list[Run]]) -> list[Group]:
    """Label each group by experiment and overrides; if that is taken, by its first folder too."""
    found: dict[str, Group] = {}
    for runs in groups:
        label = " ".join([runs[0].label, *overrides(runs[0])])
        label = f"{label} ({runs[0].folder})" if label in found else label
        found[label] = Group(label, tuple(sorted(runs, key=lambda run: run.seed)))
    return list(found.values())


# -- experiments and their controls --------------------------------------------------------------


@cache
def experiment(name: str | None) -> dict[str, Any] | None:
    """Return the settings of an experiment of ``conf/experiment/``; None if there is none."""
    try:
        return asdict(config.read("train", [f"experiment={name}"])) if name else None
    except SettingsError:
        return None


def overrides(run: Run) -> list[str]:
    """Return the settings of net and recipe with which a run overrides its experiment."""
    settings = experiment(run.settings.get("experiment"))
    expected = identity(settings) if settings else {}
    other = {
        key: run.identity[key].replace('"', "")
        for key in expected.keys() & run.identity.keys() - set(SIZES)
        if key.startswith(NET) and run.identity[key] != expected[key]
    }
    if name := other.pop("recipe.name", None):  # another recipe: do not list its values
        other = {key: value for key, value in other.items() if not key.startswith("recipe.")}
        other["recipe"] = name
    return [f"{key}={value}" for key, value in sorted(other.items())]


def changes(name: str | None, control: str | None) -> dict[str, tuple[str, str]] | None:
    """Return what differs between an experiment and its control; None if either is unknown."""
    ours, theirs = experiment(name), experiment(control)
    return _different(identity(ours), identity(theirs)) if ours and theirs else None


def _different(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, tuple[str, str]]:
    shared = ours.keys() & theirs.keys()  # old runs lack the newest settings
    return {key: (ours[key], theirs[key]) for key in shared if ours[key] != theirs[key]}


def is_control(run: Run, other: Run) -> bool:
    """Whether ``other`` is the control of ``run``, and they differ as their experiments do."""
    name, control = run.settings.get("experiment"), run.settings.get("control")
    if control is None or other.settings.get("experiment") != control:
        return False
    found, expected = _different(run.identity, other.identity), changes(name, control)
    if expected is None:
        return all(key.startswith(NET) for key in found)
    shared = run.identity.keys() & other.identity.keys()
    return found == {key: value for key, value in expected.items() if key in shared}


def difference(of: Group, groups: Sequence[Group]) -> list[float]:
    """Return our top-1 error minus the control's, for each seed that both have."""
    control = next((one for one in groups if is_control(of.runs[0], one.runs[0])), None)
    theirs = control.errors(1) if control else {}
    return [error - theirs[seed] for seed, error in of.errors(1).items() if seed in theirs]


def published(run: Run) -> tuple[float | None, str]:
    """Return the published top-1 error minus its control's, and the published error in words.

    None if they are for different images, nothing if the run overrides its experiment.
    """
    ours = {} if overrides(run) else run.settings.get("published") or {}
    if ours.get("top1") is None:
        return None, ours.get("source") or ""
    top5 = "" if ours["top5"] is None else f" / {ours['top5']:g}"
    views = f"{ours['views']} view{'s' if ours['views'] != 1 else ''}"
    text = f"{ours['top1']:g}{top5} on {ours['set']}, {views} ({ours['source']})"
    control = run.settings.get("control")
    theirs = run.settings.get("control_published") or (experiment(control) or {}).get("published")
    if not theirs or theirs.get("top1") is None:
        return None, text
    differ = changes(run.settings.get("experiment"), control) or {}
    same = all(ours[key] == theirs[key] for key in ("set", "views") if key not in differ)
    return ours["top1"] - theirs["top1"] if same else None, text


# -- tables --------------------------------------------------------------------------------------


def rows(groups: Sequence[Group]) -> Iterator[list[str]]:
    """Yield the rows of one data set's table."""
    for one in groups:
        lengths = {run.losses[-1][0] for run in one.runs if run.losses}
        settings, (claim, source) = one.runs[0].settings, published(one.runs[0])
        yield [
            one.label,
            str(len(one.counted)),
            "-".join(str(steps) for steps in sorted({min(lengths), max(lengths)}))
            if lengths
            else "",
            str(settings.get("views", 1)),
            mean_std(list(one.errors(1).values())),
            mean_std(list(one.errors(2).values())),
            settings.get("control") or "",
            mean_std(difference(one, groups), signed=True),
            "" if claim is None else f"{claim:+.2f}",
            source,
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
        title = f"**{data}** (mean ± standard deviation over seeds)"
        blocks += [title, tables.markdown(HEAD, rows(groups))]
    return "\n\n".join([*blocks, *notes(sets)])


def as_csv(sets: dict[str, list[Group]]) -> str:
    """Return all tables as one CSV table, with the data set in the first column."""
    lines = ([data, *cells] for data, groups in sets.items() for cells in rows(groups))
    return tables.comma_separated(["data", *HEAD], lines)
