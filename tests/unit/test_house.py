"""Imports run only downward: train, launch, training, images, net, mesh, config, errors."""

import ast
from pathlib import Path

import pytest

import modelpar
from modelpar.schemas import SCHEMAS

PACKAGE = Path(modelpar.__file__).parent
# From the ground up; a module may import what stands before it.
FLOORS = [
    [
        "limits",
        "progress",
        "seeding",
        "tables",
        "tracing",
        "net.paper",
        "gpu.language",
        "bench.contenders",
    ],
    ["errors"],
    [
        "command",
        "shutdown",
        "environment",
        "files",
        "gpu.crop",
        "gpu.update",
        "gpu.patches",
        "gpu.block_kernels",
    ],
    ["gpu.within_kernels"],
    ["gpu.block"],
    ["declare", "device"],
    ["groups"],
    ["settings"],
    ["schemas"],
    ["overrides", "checks"],
    ["config", "help"],
    ["distributed"],
    ["net.plan"],
    ["net.exchange", "net.layers", "net.weights"],
    ["net.fused"],
    ["net.blocks"],
    ["net.alexnet"],
    ["net.four_layer"],
    ["images.order", "images.augment"],
    ["images.samples"],
    ["images.archives", "images.folders", "images.parquet", "images.photos", "images.store"],
    ["images.loader", "images.sources", "images.journal"],
    ["images.statistics"],
    ["images.sets"],
    ["images.blocks"],
    ["images.packing"],
    ["training.schedule", "training.optimizer", "training.metrics", "analysis.kernels"],
    ["analysis.histograms", "analysis.pictures"],
    ["analysis.activations"],
    ["analysis.neighbours"],
    [
        "training.checkpoint",
        "training.run_dir",
        "training.consistency",
        "training.readback",
    ],
    ["training.exported", "training.graph", "training.saving"],
    ["training.engine", "training.debug"],
    ["training.nonfinite", "training.prepare", "training.dry", "training.showing"],
    ["training.tracking"],
    ["training.monitor"],
    ["training.report"],
    ["training.trainer", "training.averaging", "training.trained"],
    ["training.runner"],
    ["training.evaluation"],
    ["training.prediction"],
    ["interchange.foreign", "interchange.card"],
    ["interchange.caffe", "interchange.cuda_convnet", "interchange.exports"],
    ["interchange.imports"],
    ["studies.runs", "studies.averages", "studies.html"],
    ["studies.comparison", "studies.snapshots"],
    ["studies.plots"],
    ["studies.page", "studies.figures", "studies.predictions"],
    ["bench.steps", "bench.floor"],
    ["bench.workers"],
    ["bench.measure"],
    ["bench.reading"],
    ["bench.report"],
    ["sweep"],
    ["launch"],
    [*SCHEMAS],
]
HEIGHT = {module: height for height, floor in enumerate(FLOORS) for module in floor}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())


def imported(module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree(module)):
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
    return names - {module, ""}


def test_every_module_has_a_floor() -> None:
    assert sorted(HEIGHT) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_only_downward(module: str) -> None:
    for other in imported(module):
        assert HEIGHT[other] < HEIGHT[module], f"{module} imports {other}"


def test_packages_do_not_import_each_other() -> None:
    for module in MODULES:
        if module.startswith("net."):
            assert not [
                name for name in imported(module) if name.startswith(("images", "training"))
            ]
        if module.startswith("images."):
            assert not [name for name in imported(module) if name.startswith(("net", "training"))]
        if module.startswith("training."):
            assert not [name for name in imported(module) if name.startswith("bench")]


def names(module: str) -> set[str]:
    """Every module that is imported, whole or in part."""
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_some_modules_read_the_environment() -> None:
    readers = {
        module
        for module in MODULES
        if any(
            isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
            for node in ast.walk(tree(module))
        )
    }
    assert readers <= {
        "launch",
        "sweep",
        "command",
        "environment",
        "device",
        "distributed",
        "config",
        "bench.workers",
    }  # it launches, too


def test_only_distributed_calls_collectives() -> None:
    """Other modules may import the names of torch.distributed's types."""
    types = {"torch.distributed.ProcessGroup", "torch.distributed.Store"}
    for module in MODULES:
        uses = {name for name in names(module) if name.startswith("torch.distributed")}
        direct = {name for name in uses if name.count(".") <= 2} - types
        assert bool(direct) == (module == "distributed"), (module, direct)


def test_settings_and_numbers_need_no_torch() -> None:
    for module in ("schemas", "config", "help", "errors", "net.paper", "net.plan"):
        assert not [name for name in names(module) if name.partition(".")[0].startswith("torch")]
