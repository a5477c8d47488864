"""Two faults of each kind at random moments; ``inject.py`` makes the full table."""

import pytest
from inject import KINDS, inject


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_runs_survive_two_faults_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():  # shows the table
        faults = inject(2, seed=1, only=list(KINDS))
    for fault in faults:
        assert not fault.failures, fault.row()
