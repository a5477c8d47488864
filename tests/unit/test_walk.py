"""The notebook of docs/ runs from its first cell to its last, and has no outputs."""

import json
import re
import warnings
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from pages import ROOT

WALK = ROOT / "docs" / "walk.ipynb"
CELLS: list[dict[str, Any]] = json.loads(WALK.read_text())["cells"]


def test_it_has_no_outputs_and_its_links_exist() -> None:
    sources = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", "\n".join(sources))
    assert len(targets) >= 4
    assert all((WALK.parent / target).exists() for target in targets)
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.slow
def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    before = mpl.get_backend()
    plt.switch_backend("agg")
    try:
        for number, cell in enumerate(CELLS):
            if cell["cell_type"] == "code":
                with warnings.catch_warnings():  # of plt.show without a window
                    warnings.simplefilter("ignore", UserWarning)
                    exec(compile("".join(cell["source"]), f"{WALK}:{number}", "exec"), names)
    finally:
        plt.close("all")
        plt.switch_backend(before)
    printed = capsys.readouterr().out
    assert "sum: 230,304 bytes\n" in printed
    assert "conv3 of column 0: (4, 192, 3, 3)" in printed
    assert "same on both columns: True" in printed
    assert "model.norm: None -> none" in printed
    # conv3, fc6 and fc7 both ways, 14 logits one way
    assert f"sum: {4 * (2 * (128 * 9 + 128 + 2048) + 14):,} bytes per image" in printed
