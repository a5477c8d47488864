"""The whole net as one file: ``python -m modelpar.export checkpoint=RUN_DIR out=FILE``."""

from functools import partial
from pathlib import Path

from modelpar import launch
from modelpar.settings import ExportSettings
from modelpar.training import evaluation


def export(settings: ExportSettings) -> None:
    """Write the file and say so."""
    print(evaluation.export(settings.checkpoint, Path(settings.out)))  # noqa: T201


main = partial(launch.main_single, "export", export)

if __name__ == "__main__":
    main()
