"""Runs held against each other: ``python -m modelpar.compare runs=[RUN,SWEEP,'runs/*']``."""

from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from modelpar import launch
from modelpar.settings import CompareSettings
from modelpar.studies import comparison, runs


def compare(settings: CompareSettings) -> None:
    """Print the tables; write them as CSV and, where matplotlib is installed, as a page."""
    sets = comparison.group([runs.read(folder) for folder in runs.find(settings.runs)])
    print(comparison.markdown(sets))  # noqa: T201
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.csv").write_text(comparison.as_csv(sets))
    if find_spec("matplotlib"):
        from modelpar.studies import page  # noqa: PLC0415 - of the extra plots

        (out / "compare.html").write_text(page.page(sets))
        print(f"\n{out}: compare.csv, compare.html")  # noqa: T201
    else:
        print(f"\n{out}: compare.csv; pip install modelpar[plots] makes the page")  # noqa: T201


def main() -> NoReturn:
    """Run in this process: files are read, nothing is distributed."""
    launch.enter_alone("compare", compare)


if __name__ == "__main__":
    main()
