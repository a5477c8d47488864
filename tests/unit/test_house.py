"""Imports run only downward: train, launch, training, images, net, mesh, config, errors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import modelpar

PACKAGE = Path(modelpar.__file__).parent
# From the ground up; a module may import what stands before it.
FLOORS = [
    ["errors"],
    ["config"],
    ["mesh"],
    ["net.paper"],
    ["net.crossing", "net.layers"],
    ["net.alexnet"],
    ["images.order", "images.augment"],
    ["images.sets"],
    ["images.loader"],
    ["training.schedule", "training.optimizer", "training.metrics"],
    ["training.monitor", "training.checkpoint", "training.runs"],
    ["training.engine"],
    ["training.scoring"],
    ["launch"],
    ["train", "evaluate", "export"],
]
HEIGHT = {module: height for height, floor in enumerate(FLOORS) for module in floor}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def imported(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("modelpar"):
            base = node.module.removeprefix("modelpar").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                names.add(inner if inner in HEIGHT else base)
        if isinstance(node, ast.Import):
            names |= {
                alias.name.partition(".")[2]
                for alias in node.names
                if alias.name.startswith("modelpar")
            }
    return names - {module}


def test_every_module_has_a_floor() -> None:
    assert sorted(HEIGHT) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_only_downward(module: str) -> None:
    for other in imported(module):
        assert HEIGHT[other] < HEIGHT[module], f"{module} imports {other}"


def test_the_wings_keep_apart() -> None:
    for module in MODULES:
        if module.startswith("net."):
            assert not [
                name for name in imported(module) if name.startswith(("images", "training"))
            ]
        if module.startswith("images."):
            assert not [name for name in imported(module) if name.startswith(("net", "training"))]


def source(module: str) -> str:
    return (PACKAGE / (module.replace(".", "/") + ".py")).read_text()


def test_the_environment_is_read_at_the_doors_alone() -> None:
    readers = {module for module in MODULES if "os.environ" in source(module)}
    assert readers <= {"launch", "mesh", "config"}


def test_collectives_are_called_in_mesh_alone() -> None:
    callers = {module for module in MODULES if "dist." in source(module)}
    assert callers == {"mesh"}


def test_config_and_errors_need_no_torch() -> None:
    for module in ("config", "errors", "net.paper"):
        assert "import torch" not in source(module)
