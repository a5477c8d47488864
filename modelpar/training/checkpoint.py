"""Checkpoints: one safetensors file per column and a JSON manifest with a hash of each file.

A step's folder is complete or absent, and nothing in it is a pickle.  ``training.saving`` writes
it.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from modelpar.errors import CheckpointError, one_line
from modelpar.net.weights import column_state, merge

FORMAT: Final = 3
READABLE: Final = (2, 3)  # format 2 also recorded the last evaluation, which metrics.jsonl has
MANIFEST: Final = "manifest.json"
STATISTICS: Final = "statistics.safetensors"
STEP_NAME: Final = re.compile(r"step-(\d{8})")
HASH: Final = "sha256"  # in the metadata of an exported file
PICKLES: Final = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".tar")


@dataclass(frozen=True)
class Checkpoint:
    """A published step: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done since the run began."""
        return int(self.manifest["step"])


def file_name(columns: int, column: int, kind: str) -> str:
    """Return the file name of one column's weights or velocities, or of the whole net's."""
    owner = f"column-{column}" if columns > 1 else "whole"
    return f"{owner}.{kind}.safetensors"


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``manifest`` with a hash of everything else in it."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": sha256(text.encode()).hexdigest()}


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return an error that names a file or folder that may not be read."""
    reason = error.strerror or one_line(error)
    return CheckpointError(f"{path}: cannot be read ({reason}); make it readable")


def list_steps(folder: Path) -> dict[int, Path]:
    """Return the published steps by number, oldest first; those without manifest are skipped.

    Raises CheckpointError for a folder that may not be read.
    """
    steps: dict[int, Path] = {}
    try:
        for path in sorted(folder.iterdir()) if folder.exists() else []:
            named = STEP_NAME.fullmatch(path.name)
            if named and (path / MANIFEST).is_file():
                steps[int(named[1])] = path
            elif named:
                logging.getLogger(__name__).warning("%s: skipped, it has no %s", path, MANIFEST)
    except OSError as error:
        raise unreadable(folder, error) from None
    return steps


def newest(run_dir: Path) -> Checkpoint | None:
    """Return the newest published step of a run, None where it has none."""
    found = list_steps(run_dir / "checkpoints")
    return open_step(found[max(found)]) if found else None


def open_step(folder: Path) -> Checkpoint:
    """Read a step's manifest; raises CheckpointError if it is damaged or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        names, version = manifest["files"], manifest["format"]
    except PermissionError as error:
        raise unreadable(path, error) from None
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
    steps, folder = list_steps(path.parent.parent).values(), path.parent
    older = [step.name for step in steps if step.name < folder.name]
    advice = "there is no older step; start a new run_dir"
    if older:
        advice = f"move {folder.name} away to continue from {older[-1]}"
    return CheckpointError(f"{path}: {what}; {advice}")


def find(path: str, setting: str = "checkpoint") -> Checkpoint | Path:
    """Resolve RUN_DIR (its newest step), STEP_DIR or FILE.safetensors; raises CheckpointError."""
    named = Path(path)
    try:
        if named.is_file() and named.suffix == ".safetensors":
            return named
        if (named / MANIFEST).is_file():
            return open_step(named)
    except PermissionError as error:
        raise unreadable(named, error) from None
    problem = "no checkpoint there"
    if named.suffix in PICKLES or (named / ".metadata").is_file():
        problem = "may hold a pickle, which can run any code, and is never read"
    elif found := newest(named):
        return found
    raise CheckpointError(f"{setting}={path}: {problem}; use a run, a step or a .safetensors file")


def read_tensors(path: Path, expected: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, checked against its ``expected`` entry in a manifest.

    Raises CheckpointError.
    """
    try:
        content = path.read_bytes()
    except PermissionError as error:
        raise unreadable(path, error) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise (_damaged(path, what) if expected else CheckpointError(f"{path}: {what}")) from None
    if expected and sha256(content).hexdigest() != expected["sha256"]:
        raise _damaged(path, "damaged, size or hash differs from the manifest")
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({one_line(error)})") from None
    if expected is None:
        recorded, found = hashes(content)
        if recorded not in {None, found}:
            raise CheckpointError(f"{path}: damaged, its hash does not match; export it again")
    return tensors


def hashes(content: bytes) -> tuple[str | None, str]:
    """Return the hash that a safetensors file records, and that of everything else in it."""
    end = 8 + int.from_bytes(content[:8], "little")  # of the header, which is JSON
    header: dict[str, Any] = json.loads(content[8:end])
    recorded = (header.get("__metadata__") or {}).pop(HASH, None)
    found = sha256(json.dumps(header, sort_keys=True).encode())
    found.update(memoryview(content)[end:])
    return recorded, found.hexdigest()


def read_part(source: Checkpoint | Path, kind: str, column: int | None) -> dict[str, Tensor]:
    """Return a column's tensors, or the whole net's for None, whichever way they were saved.

    ``kind`` is ``weights``, ``velocities`` or ``ema``.  An exported file, a Path, holds only
    weights.  Every file that is read is checked against the manifest.  Raises CheckpointError.
    """
    if isinstance(source, Path):
        whole = read_tensors(source)
        return whole if column is None else column_state(whole, column)
    saved = int(source.manifest["columns"])
    parts: list[dict[str, Tensor]] = []
    for owner in range(saved) if column is None or saved == 1 else [column]:
        name = file_name(saved, owner, kind)
        if name not in source.manifest["files"]:
            raise CheckpointError(f"{source.folder / MANIFEST}: {name} is not listed")
        parts.append(read_tensors(source.folder / name, source.manifest["files"][name]))
    if saved == 1 and column is not None:
        return column_state(parts[0], column)
    return merge(parts) if len(parts) > 1 else parts[0]


def read_statistics(source: Checkpoint) -> dict[str, Tensor]:
    """Return the mean image and colours that the net was trained with."""
    return read_tensors(source.folder / STATISTICS, source.manifest["files"].get(STATISTICS))


def read_conv1(source: Checkpoint) -> Tensor:
    """Return the kernels of the net's first convolution, (96, 3, 11, 11), and read no more.

    Raises CheckpointError.
    """
    saved = int(source.manifest["columns"])
    kernels: list[Tensor] = []
    for column in range(saved):
        name = file_name(saved, column, "weights")
        first = next(iter(source.manifest["files"][name]["tensors"]))  # in the order of layers
        path = source.folder / name
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                kernels.append(file.get_tensor(first))
        except (OSError, SafetensorError) as error:
            raise _damaged(path, f"cannot be read ({one_line(error)})") from None
    return torch.cat(kernels)
