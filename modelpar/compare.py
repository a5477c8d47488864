"""Compare runs: ``python -m modelpar.compare runs=[RUN,SWEEP,'runs/*']``."""

from pathlib import Path
from typing import NoReturn

from modelpar import launch
from modelpar.settings import CompareSettings
from modelpar.studies import comparison, page, runs


def compare(settings: CompareSettings) -> None:
    """Print the tables as Markdown; write them as CSV and as an HTML page with curves."""
    sets = comparison.group([runs.read(folder) for folder in runs.find(settings.runs)])
    print(comparison.markdown(sets))  # noqa: T201
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.csv").write_text(comparison.as_csv(sets))
    (out / "compare.html").write_text(page.page(sets))
    print(f"\n{out}: compare.csv, compare.html")  # noqa: T201


def main() -> NoReturn:
    """Run in this process: it only reads and writes files."""
    launch.main_single("compare", compare)


if __name__ == "__main__":
    main()
