"""The whole net as one file: ``python -m modelpar.export checkpoint=RUN_DIR out=FILE``."""

from pathlib import Path
from typing import NoReturn

from modelpar import launch
from modelpar.settings import ExportSettings
from modelpar.training import evaluation


def export(settings: ExportSettings) -> None:
    """Write the file and say so."""
    print(evaluation.export(settings.checkpoint, Path(settings.out)))  # noqa: T201


def main() -> NoReturn:
    """Run in this process: a file is merged, nothing is distributed."""
    launch.main_single("export", export)


if __name__ == "__main__":
    main()
