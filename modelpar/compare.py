"""Runs held against each other: ``python -m modelpar.compare runs=[RUN,SWEEP,'runs/*']``."""

from pathlib import Path
from typing import NoReturn

from modelpar import launch
from modelpar.settings import CompareSettings
from modelpar.studies import comparison, page, runs


def compare(settings: CompareSettings) -> None:
    """Print the tables; write them as CSV and as a page."""
    sets = comparison.group([runs.read(folder) for folder in runs.find(settings.runs)])
    print(comparison.markdown(sets))  # noqa: T201
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.csv").write_text(comparison.as_csv(sets))
    (out / "compare.html").write_text(page.page(sets))
    print(f"\n{out}: compare.csv, compare.html")  # noqa: T201


def main() -> NoReturn:
    """Run in this process: files are read, nothing is distributed."""
    launch.enter_alone("compare", compare)


if __name__ == "__main__":
    main()
