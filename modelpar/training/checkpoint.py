"""A checkpoint on disk: one safetensors file per column and a JSON manifest, found and read.

A step's folder is complete or absent, and nothing in it is a pickle.  Each file is checked
against the manifest, which has a hash of its own.  ``checkpointer`` writes them.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from modelpar.errors import CheckpointError, one_line
from modelpar.net.paper import COLUMNS
from modelpar.net.weights import column_state, merge

FORMAT: Final = 3
READABLE: Final = (2, 3)  # format 2 also recorded the last evaluation, which metrics.jsonl has
MANIFEST: Final = "manifest.json"
STATISTICS: Final = "statistics.safetensors"
STEP_NAME: Final = re.compile(r"step-(\d{8})")
PICKLES: Final = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".tar")
KERNEL_DIMS: Final = 4  # of a convolution's weights
Kind = Literal["weights", "velocities"]


@dataclass(frozen=True)
class Checkpoint:
    """A published step: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done since the run began."""
        return int(self.manifest["step"])


def file_name(columns: int, column: int, kind: Kind) -> str:
    """Return the file name of one column's weights or velocities, or of the whole net's."""
    owner = f"column-{column}" if columns > 1 else "whole"
    return f"{owner}.{kind}.safetensors"


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``manifest`` with a hash of everything else in it."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def described(content: bytes) -> dict[str, Any]:
    """Return what a manifest records of a file: its size and hash."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def list_steps(folder: Path) -> list[Path]:
    """Return the published step folders, oldest first; those without a manifest are skipped."""
    if not folder.is_dir():
        return []
    named = sorted(path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name))
    whole = [path for path in named if (path / MANIFEST).is_file()]
    for path in set(named) - set(whole):
        logging.getLogger(__name__).warning("%s: skipped, it has no %s", path, MANIFEST)
    return whole


def newest(run_dir: Path) -> Checkpoint | None:
    """Return the newest published step of a run, None where it has none."""
    found = list_steps(run_dir / "checkpoints")
    return open_step(found[-1]) if found else None


def open_step(folder: Path) -> Checkpoint:
    """Read a step's manifest; raises CheckpointError if it is damaged or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        names, version = manifest["files"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"not a readable manifest ({one_line(error)})") from None
    if version not in READABLE:
        raise CheckpointError(
            f"{folder}: format {version}, but this version reads {FORMAT}; use the version of "
            "modelpar that wrote it"
        )
    if signed(manifest) != manifest:
        raise _damaged(path, "damaged, its hash does not match")
    for name in names:
        if Path(name).name != name or name.startswith("."):
            raise CheckpointError(f"{path}: {name!r} is not a plain file name")
    if (named := STEP_NAME.fullmatch(folder.name)) and int(named[1]) != manifest["step"]:
        raise CheckpointError(f"{folder}: holds step {manifest['step']}; rename the folder")
    return Checkpoint(folder, manifest)


def _damaged(path: Path, what: str) -> CheckpointError:
    """Return an error that names the file and the step that the run can continue from."""
    folder = path.parent
    older = [step.name for step in list_steps(folder.parent) if step.name < folder.name]
    advice = (
        f"move {folder.name} away to continue from {older[-1]}"
        if older
        else "there is no older step; start a new run_dir"
    )
    return CheckpointError(f"{path}: {what}; {advice}")


def find(path: str) -> Checkpoint | Path:
    """Resolve RUN_DIR (its newest step), STEP_DIR or FILE.safetensors; raises CheckpointError."""
    named = Path(path).expanduser()
    if named.is_file() and named.suffix == ".safetensors":
        return named
    if (named / MANIFEST).is_file():
        return open_step(named)
    if named.suffix in PICKLES or (named / ".metadata").is_file():
        raise CheckpointError(
            f"checkpoint={path}: may hold a pickle, which can run any code, and is never read; "
            "use a run, a step or a .safetensors file"
        )
    found = newest(named)
    if found is None:
        raise CheckpointError(
            f"checkpoint={path}: no checkpoint there; use a run, a step or a .safetensors file"
        )
    return found


def read_tensors(path: Path, expected: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, whose size and hash must be the ``expected`` ones of a manifest.

    Raises CheckpointError.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise (_damaged(path, what) if expected else CheckpointError(f"{path}: {what}")) from None
    if expected and described(content) != {key: expected[key] for key in ("bytes", "sha256")}:
        raise _damaged(path, "damaged, size or hash differs from the manifest")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({one_line(error)})") from None


def read_part(source: Checkpoint, kind: Kind, column: int | None) -> dict[str, Tensor]:
    """Return a column's tensors, or the whole net's for None, whichever way they were saved.

    Every file that is read is checked against the manifest.  Raises CheckpointError.
    """
    saved = int(source.manifest["columns"])

    def part(owner: int) -> dict[str, Tensor]:
        name = file_name(saved, owner, kind)
        if name not in source.manifest["files"]:
            raise CheckpointError(f"{source.folder / MANIFEST}: {name} is not listed")
        return read_tensors(source.folder / name, source.manifest["files"][name])

    if saved == 1:
        whole = part(0)
        return whole if column is None else column_state(whole, column)
    if column is not None:
        return part(column)
    return merge([part(owner) for owner in range(COLUMNS)])


def read_statistics(source: Checkpoint) -> dict[str, Tensor]:
    """Return the mean image and colours that the net was trained with."""
    return read_tensors(source.folder / STATISTICS, source.manifest["files"].get(STATISTICS))


def read_conv1(source: Checkpoint) -> Tensor:
    """Return the kernels of the net's first convolution, (96, 3, 11, 11), and read no more."""
    saved = int(source.manifest["columns"])
    kernels: list[Tensor] = []
    for column in range(saved):
        name = file_name(saved, column, "weights")
        tensors = source.manifest["files"][name]["tensors"]  # in the order of the net's layers
        first = next(key for key, one in tensors.items() if len(one["shape"]) == KERNEL_DIMS)
        with safetensors.safe_open(source.folder / name, framework="pt") as file:
            kernels.append(file.get_tensor(first))
    return torch.cat(kernels)
