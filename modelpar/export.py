"""The whole net as one file: ``python -m modelpar.export checkpoint=RUN_DIR out=FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from modelpar import launch
from modelpar.training import scoring

if TYPE_CHECKING:
    from modelpar.settings import ExportSettings


def export(settings: ExportSettings) -> None:
    """Write the file and say so."""
    print(scoring.export(settings.checkpoint, Path(settings.out)))  # noqa: T201


def main() -> NoReturn:
    """Run in this process: a file is merged, nothing is distributed."""
    launch.enter_alone("export", export)


if __name__ == "__main__":
    main()
