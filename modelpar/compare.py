"""Compare runs: ``python -m modelpar.compare runs=[RUN,SWEEP,'runs/*',AVERAGE.json]``."""

from functools import partial

from modelpar import launch, tables
from modelpar.files import write_texts
from modelpar.settings import CompareSettings
from modelpar.studies import averages, comparison, page, runs


def compare(settings: CompareSettings) -> None:
    """Print the tables as Markdown; write them as CSV and as an HTML page with curves."""
    patterns, files = averages.find(settings.runs)
    sets = comparison.group([runs.read(folder) for folder in runs.find(patterns)])
    rows = averages.rows(files)
    texts = {"compare.html": page.page(sets, rows)}
    if sets:
        print(comparison.markdown(sets))  # noqa: T201
        texts["compare.csv"] = comparison.as_csv(sets)
    if rows:
        table = tables.markdown(averages.HEAD, rows)
        print(f"\n**{averages.TITLE}**\n\n{table}\n\n{averages.NOTE}")  # noqa: T201
        texts["averages.csv"] = tables.comma_separated(averages.HEAD, rows)
    write_texts(settings.out, texts)
    print(f"\n{settings.out}: {', '.join(texts)}")  # noqa: T201


main = partial(launch.main_single, "compare", compare)

if __name__ == "__main__":
    main()
