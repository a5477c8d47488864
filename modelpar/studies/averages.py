"""What ``modelpar-evaluate out=FILE.json`` wrote, as a table: nets and their average."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from modelpar.errors import DataError, SettingsError, one_line
from modelpar.files import matches
from modelpar.net.paper import AVERAGES

SUFFIX: Final = ".json"
TITLE: Final = "Averaged nets"
HEAD: Final = (
    "data", "net", "weight", "images", "views", "top-1 error, %", "top-5 error, %",
    "published, top-1 / top-5",
)  # fmt: skip
PUBLISHED: Final = "; ".join(f"{name}: {one:g} / {five:g}" for name, one, five in AVERAGES)
NOTE: Final = (
    "Published averages are for the validation images of ILSVRC-2012, ten views (table 2 of the "
    "paper). Two of the seven nets had first been trained on all of ImageNet's Fall 2011 release."
)


def find(patterns: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Return the patterns of runs, and the files that the patterns ending in .json name.

    Raises SettingsError for one of the latter that names none.
    """
    ours = [pattern for pattern in patterns if pattern.endswith(SUFFIX)]
    files: dict[Path, None] = {}
    for pattern in ours:
        if not (found := matches(pattern)):
            raise SettingsError(
                f"runs={pattern}: no such file; use one that modelpar-evaluate out=FILE.json wrote"
            )
        files |= dict.fromkeys(map(Path, found))
    return [pattern for pattern in patterns if pattern not in ours], list(files)


def rows(files: Sequence[Path]) -> list[list[str]]:
    """Return the rows of all files; raises DataError for a file that is no evaluation."""
    return [row for file in files for row in _rows_of(file)]


def _rows_of(file: Path) -> list[list[str]]:
    try:
        return list(_rows(json.loads(file.read_text())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: cannot read this evaluation ({one_line(error)}); "
            "write it again with modelpar-evaluate out=FILE.json"
        ) from None


def _rows(found: dict[str, Any]) -> Iterator[list[str]]:
    def row(name: str, weight: str, errors: dict[str, Any], published: str) -> list[str]:
        spread = f"{errors['top1']:.2f} (standard error {errors['standard_error']:.2f})"
        about = [str(errors["samples"]), str(found["views"])]
        return [found["data"], name, weight, *about, spread, f"{errors['top5']:.2f}", published]

    each = zip(found["checkpoints"], found["weights"], found["members"], strict=True)
    for path, weight, errors in each:
        yield row(path, f"{weight:.3f}" if found["average"] else "", errors, "")
    if found["average"]:
        searched = found["searched"]
        how = f"weights searched on {searched} other images" if searched else "equal weights"
        name = f"average of {len(found['members'])} nets, {how}"
        yield row(name, "", found["average"], PUBLISHED)
