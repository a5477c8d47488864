"""Atomic sharded checkpoints: one safetensors file a column, a JSON manifest, one rename.

A step's folder is whole or it is not there.  No pickle anywhere.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from modelpar import __version__
from modelpar.distributed import Mesh, first_complaint
from modelpar.errors import CheckpointError, one_line
from modelpar.net.paper import COLUMNS
from modelpar.net.weights import column_state, location, merge

FORMAT: Final = 2
MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "sha256"  # in a manifest: of all else in it
STATISTICS: Final = "statistics.safetensors"
STEP_NAME: Final = re.compile(r"step-(\d{8})")
SPARE: Final = 1.1  # free space asked for, as a multiple of what is written
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

    @property
    def digest(self) -> str:
        """A hash of the manifest, which holds those of all files."""
        text = json.dumps(self.manifest, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def part_name(columns: int, column: int, kind: Kind) -> str:
    """Return the file name of one column's weights or velocities, or of the whole net's."""
    owner = f"column-{column}" if columns > 1 else "whole"
    return f"{owner}.{kind}.safetensors"


# -- writing -------------------------------------------------------------------------------------


def save(
    folder: Path,
    mesh: Mesh,
    parts: Mapping[Kind, Mapping[str, Tensor]],
    statistics: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
) -> Path:
    """Publish ``folder``/step-######## with every column's ``parts``.

    A collective of the whole mesh.  All write into one temporary folder; when all agree that
    theirs is whole, rank 0 adds the manifest and renames.  Raises CheckpointError on every
    process, with older checkpoints as they were.
    """
    final = folder / f"step-{int(manifest['step']):08d}"
    saving = _Saving(final, folder / f".tmp-{final.name}", mesh, parts, statistics, manifest)
    for work, mine in (
        (saving.begin, mesh.rank == 0),
        (saving.write, mesh.replica == 0),
        (saving.publish, mesh.rank == 0),
    ):
        failure = ""
        try:
            if mine:
                work()
        except (OSError, ValueError, SafetensorError, CheckpointError) as error:
            failure = one_line(error)
        if complaint := first_complaint(failure, mesh):
            if mesh.rank == 0:
                shutil.rmtree(saving.unfinished, ignore_errors=True)
            raise CheckpointError(
                f"{final}: not saved, {complaint}; older checkpoints are as they were"
            )
    return final


@dataclass(frozen=True)
class _Saving:
    """One save under way: three stages, each agreed on before the next."""

    final: Path
    unfinished: Path
    mesh: Mesh
    parts: Mapping[Kind, Mapping[str, Tensor]]
    statistics: Mapping[str, Tensor]
    manifest: Mapping[str, Any]

    def begin(self) -> None:
        """Check the space and make the temporary folder: rank 0."""
        folder = self.final.parent
        if not folder.exists():
            folder.mkdir()  # in the run's directory, which must be there: it holds the settings
            _sync_folder(folder.parent)
        _sweep(folder)
        check_space(folder, self.mesh.columns * num_bytes(self.parts))
        self.unfinished.mkdir()

    def write(self) -> None:
        """Write this column's files, and what they should hash to."""
        files: dict[str, Any] = {}
        for kind, tensors in self.parts.items():
            name = part_name(self.mesh.columns, self.mesh.column, kind)
            files[name] = _write_tensors(self.unfinished / name, tensors)
            files[name]["tensors"] = {
                key: {
                    "dtype": str(value.dtype).removeprefix("torch."),
                    "shape": list(value.shape),
                    **location(key, value.shape, self.mesh.columns, self.mesh.column),
                }
                for key, value in tensors.items()
            }
        if self.mesh.rank == 0:
            files[STATISTICS] = _write_tensors(self.unfinished / STATISTICS, self.statistics)
        _write_text(self.unfinished / f"files-{self.mesh.column}.json", json.dumps(files))

    def publish(self) -> None:
        """Write the manifest last, then give the folder its name: rank 0."""
        files: dict[str, Any] = {}
        for column in range(self.mesh.columns):
            listed = self.unfinished / f"files-{column}.json"
            files |= json.loads(listed.read_text())
            listed.unlink()
        whole = {
            "format": FORMAT,
            "versions": {
                "modelpar": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            **self.manifest,
            "columns": self.mesh.columns,
            "files": files,
        }
        if self.final.exists():
            self._amend()
            return
        _write_text(self.unfinished / MANIFEST, json.dumps(signed(whole), indent=1))
        _sync_folder(self.unfinished)
        self.unfinished.rename(self.final)
        _sync_folder(self.final.parent)

    def _amend(self) -> None:
        """Tell more of a step that is published already, as of its evaluation: rank 0.

        A run saves a step twice only where it went on from it: the weights are those that lie
        there, and stay untouched.  The manifest alone is replaced, at once.
        """
        told = {**open_step(self.final).manifest, **self.manifest}
        amended = self.unfinished / MANIFEST
        _write_text(amended, json.dumps(signed(told), indent=1))
        amended.replace(self.final / MANIFEST)
        _sync_folder(self.final)
        shutil.rmtree(self.unfinished, ignore_errors=True)


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``manifest`` with a hash of all else in it: it may be damaged like any file."""
    content = {key: value for key, value in manifest.items() if key != SIGNATURE}
    text = json.dumps(content, sort_keys=True)
    return {**content, SIGNATURE: hashlib.sha256(text.encode()).hexdigest()}


def _sweep(folder: Path) -> None:
    """Remove what saves and prunings that were cut off have left."""
    for left in folder.glob(".*-step-*"):
        shutil.rmtree(left, ignore_errors=True)


def check_space(folder: Path, needed: int, what: str = "a checkpoint") -> None:
    """Raise CheckpointError where ``folder``'s disk has less than ``needed`` bytes to spare."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed * SPARE:
        raise CheckpointError(
            f"{folder}: {what} needs {needed * SPARE / 1e6:.0f} MB, {free / 1e6:.0f} MB are "
            "free; make room or give another run_dir"
        )


def num_bytes(parts: Mapping[Kind, Mapping[str, Tensor]]) -> int:
    """Return the bytes of one column's tensors."""
    tensors = (value for part in parts.values() for value in part.values())
    return sum(value.numel() * value.element_size() for value in tensors)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write, flush to disk, and return size and hash of what was meant to be written."""
    content = safetensors.torch.save(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    )
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- finding and reading -------------------------------------------------------------------------


def steps(folder: Path) -> list[Path]:
    """Return the published step folders, oldest first; one without a manifest is none."""
    if not folder.is_dir():
        return []
    named = sorted(path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name))
    whole = [path for path in named if (path / MANIFEST).is_file()]
    for path in set(named) - set(whole):
        logging.getLogger(__name__).warning("%s: passed over, it has no %s", path, MANIFEST)
    return whole


def newest(run_dir: Path) -> Checkpoint | None:
    """Return the newest published step of a run, None where it has none."""
    found = steps(run_dir / "checkpoints")
    return open_step(found[-1]) if found else None


def open_step(folder: Path) -> Checkpoint:
    """Read a step's manifest; raises CheckpointError where it is damaged or from the future."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names, version = manifest["files"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST}: not a readable manifest ({one_line(error)}); {_older(folder)}"
        ) from None
    if version != FORMAT:
        raise CheckpointError(
            f"{folder}: format {version}, this modelpar reads {FORMAT}; install its modelpar"
        )
    if signed(manifest) != manifest:
        raise CheckpointError(
            f"{folder / MANIFEST}: damaged, its hash is not its own; {_older(folder)}"
        )
    for name in names:
        if Path(name).name != name or name.startswith("."):
            raise CheckpointError(f"{folder / MANIFEST}: {name!r} is not a plain file name")
    named = STEP_NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest["step"]:
        raise CheckpointError(
            f"{folder}: holds step {manifest['step']}; give the folder its own name back"
        )
    return Checkpoint(folder, manifest)


def _older(folder: Path) -> str:
    """Say how a run goes on without the step in ``folder``."""
    kept = [step for step in steps(folder.parent) if step.name < folder.name]
    if not kept:
        return "no older step is there; start a new run_dir"
    return f"move {folder.name} away, and the run goes on from {kept[-1].name}"


def find(path: str) -> Checkpoint | Path:
    """Resolve RUN_DIR (its newest step), STEP_DIR or FILE.safetensors; raises CheckpointError."""
    place = Path(path).expanduser()
    if place.is_file() and place.suffix == ".safetensors":
        return place
    if (place / MANIFEST).is_file():
        return open_step(place)
    if place.suffix in PICKLES or (place / ".metadata").is_file():
        raise CheckpointError(
            f"checkpoint={path}: may hold a pickle, which runs whatever it likes, and is never "
            "read; give a run, a step or a .safetensors"
        )
    found = newest(place)
    if found is None:
        raise CheckpointError(
            f"checkpoint={path}: no checkpoint there; give a run, a step or a .safetensors"
        )
    return found


def read_tensors(path: Path, expected: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; with ``expected``, its size and hash must be the manifest's."""
    try:
        content = path.read_bytes()
    except OSError as error:
        older = f"; {_older(path.parent)}" if expected is not None else ""
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}){older}") from None
    if expected is not None and (
        len(content) != expected["bytes"]
        or hashlib.sha256(content).hexdigest() != expected["sha256"]
    ):
        raise CheckpointError(
            f"{path}: damaged, size or hash is not the manifest's; {_older(path.parent)}"
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({one_line(error)})") from None


def read_part(source: Checkpoint, kind: Kind, column: int | None) -> dict[str, Tensor]:
    """Return a column's tensors, or the whole net's for None, however they were saved.

    Every file that is read is checked against the manifest; raises CheckpointError.
    """
    saved = int(source.manifest["columns"])

    def part(owner: int) -> dict[str, Tensor]:
        name = part_name(saved, owner, kind)
        if name not in source.manifest["files"]:
            raise CheckpointError(f"{source.folder / MANIFEST}: names no {name}")
        return read_tensors(source.folder / name, source.manifest["files"][name])

    if saved == 1:
        whole = part(0)
        if column is None:
            return whole
        return column_state(whole, column)
    if column is not None:
        return part(column)
    return merge([part(owner) for owner in range(COLUMNS)])


def read_statistics(source: Checkpoint) -> dict[str, Tensor]:
    """Return the mean image and colours the net was trained with."""
    return read_tensors(source.folder / STATISTICS, source.manifest["files"].get(STATISTICS))


def read_conv1(source: Checkpoint) -> Tensor:
    """Return the kernels of the net's first convolution, (96, 3, 11, 11) of both columns.

    Nothing else is read.
    """
    saved = int(source.manifest["columns"])
    kernels: list[Tensor] = []
    for column in range(saved):
        name = part_name(saved, column, "weights")
        tensors = source.manifest["files"][name]["tensors"]  # in the order of the net's layers
        first = next(key for key, told in tensors.items() if len(told["shape"]) == KERNEL_DIMS)
        with safetensors.safe_open(source.folder / name, framework="pt") as file:
            kernels.append(file.get_tensor(first))
    return torch.cat(kernels)
