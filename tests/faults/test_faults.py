"""Five of each kind of fault, at random moments; the full table is made by ``inject.py``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from inject import KINDS, inject


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_of_each_are_survived(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():  # the table is worth reading
        kinds = inject(5, seed=1, only=list(KINDS))
    for kind in kinds:
        assert not kind.failures, kind.row()
