"""Compare runs: ``python -m modelpar.compare runs=[RUN,SWEEP,'runs/*']``."""

from functools import partial

from modelpar import launch
from modelpar.files import write_texts
from modelpar.settings import CompareSettings
from modelpar.studies import comparison, page, runs


def compare(settings: CompareSettings) -> None:
    """Print the tables as Markdown; write them as CSV and as an HTML page with curves."""
    sets = comparison.group([runs.read(folder) for folder in runs.find(settings.runs)])
    print(comparison.markdown(sets))  # noqa: T201
    texts = {"compare.csv": comparison.as_csv(sets), "compare.html": page.page(sets)}
    write_texts(settings.out, texts)
    print(f"\n{settings.out}: {', '.join(texts)}")  # noqa: T201


main = partial(launch.main_single, "compare", compare)

if __name__ == "__main__":
    main()
