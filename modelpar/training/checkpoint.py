"""Checkpoints: one safetensors file per column and a JSON manifest with a hash of each file.

A step's folder is complete or absent, and nothing in it is a pickle.  Each rank writes its own
files in a thread and reports in the step message when they are on disk.  When all are, rank 0
writes the manifest and renames the folder.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from platform import python_version
from threading import Thread
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from modelpar import __version__
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, one_line
from modelpar.files import atomic_write, check_space, fsync_folder
from modelpar.net.weights import column_state, location, merge
from modelpar.training.metrics import top1_errors

FORMAT: Final = 3
READABLE: Final = (2, 3)  # format 2 also recorded the last evaluation, which metrics.jsonl has
MANIFEST: Final = "manifest.json"
STATISTICS: Final = "statistics.safetensors"
STEP_NAME: Final = re.compile(r"step-(\d{8})")
PICKLES: Final = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".tar")
PENDING, DONE, FAILED = 0, 1, 2  # what a rank reports about its share of a save
POLLS_PER_TIMEOUT: Final = 8  # how often a rank that waits for its disk shows that it is alive
Tensors = Mapping[str, Tensor]
State = Mapping[str, Tensors]  # "weights", "velocities" and perhaps "ema" of one column


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


def num_bytes(state: State) -> int:
    """Return the bytes of one column's tensors."""
    return sum(value.nbytes for tensors in state.values() for value in tensors.values())


def list_steps(folder: Path) -> dict[int, Path]:
    """Return the published steps by number, oldest first; those without manifest are skipped."""
    steps: dict[int, Path] = {}
    for path in sorted(folder.glob("step-*")):
        named = STEP_NAME.fullmatch(path.name)
        if named and (path / MANIFEST).is_file():
            steps[int(named[1])] = path
        elif named:
            logging.getLogger(__name__).warning("%s: skipped, it has no %s", path, MANIFEST)
    return steps


class Checkpointer:
    """Saves a copy of the state in a thread while training continues; one save at a time.

    A save has two stages: all ranks write their files, then rank 0 publishes the folder.  Every
    rank sends ``status`` in its messages and passes what all ranks sent to ``advance``.  The
    threads take part in no collective, so a slow disk only delays the publication.

    The ``last`` steps stay on disk, every ``every``-th (0: none), and the ``best``.
    """

    def __init__(
        self, run_dir: Path, mesh: Mesh, *, last: int = 2, every: int = 0, best: bool = True
    ) -> None:
        self.folder, self.mesh = run_dir / "checkpoints", mesh
        self.last, self.every, self.best = last, every, best
        self.last_step = -1  # that was saved or resumed from
        self.thread: Thread | None = None  # of this rank's share of the present stage
        self.error: Exception | None = None
        if mesh.rank == 0:
            for left in self.folder.glob(".*-step-*"):  # of saves and deletions cut short
                shutil.rmtree(left, ignore_errors=True)

    def start(self, state: State, statistics: Tensors, manifest: Mapping[str, Any]) -> None:
        """Copy ``state`` and start writing this rank's share; ``finish`` an earlier save first."""
        self.manifest, self.last_step = dict(manifest), int(manifest["step"])
        self.final = self.folder / f"step-{self.last_step:08d}"
        self.unfinished = self.folder / f".tmp-{self.final.name}"
        self.publishing = False
        copies: State = {
            kind: {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}
            for kind, tensors in state.items()
            if self.mesh.replica == 0  # replicas are equal: the first one writes
        }
        self._run(lambda: self._write(copies, statistics))

    def status(self, patience: float = 0.0) -> int:
        """Return PENDING, DONE or FAILED for this rank's share; wait ``patience`` s at most."""
        if self.thread is not None:
            self.thread.join(patience)
        if self.thread is None or self.thread.is_alive():
            return PENDING
        return FAILED if self.error else DONE

    def advance(self, statuses: Sequence[int]) -> Path | None:
        """Begin the next stage if all ranks are done; return the folder once it is published.

        ``statuses`` must be the same on every rank.  Raises CheckpointError on every rank if one
        of them failed; that is a collective of the world.
        """
        if FAILED in statuses:
            self.thread = None
            if self.mesh.rank == 0:
                shutil.rmtree(self.unfinished, ignore_errors=True)
            with self.mesh.all_or_none():
                if self.error is not None:
                    raise self.error
        if self.thread is None or PENDING in statuses:
            return None
        if self.publishing:
            self.thread = None
            return self.final
        self.publishing = True
        if self.mesh.rank == 0:
            self._run(self._publish)
        return None

    def finish(self) -> Path | None:
        """Wait for the save under way; return its folder, or None if there is none.

        A collective of the world.  Raises CheckpointError on every rank if the save failed, and
        PeerLostError if a rank hangs; a slow disk does not count as hanging.
        """
        published, patience = None, self.mesh.timeout / POLLS_PER_TIMEOUT
        while self.thread is not None:
            statuses = self.mesh.gather_ints((self.status(patience),))
            published = self.advance([status for (status,) in statuses])
        return published

    def _run(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except (OSError, ValueError, SafetensorError, CheckpointError) as error:
                line = f"{self.final}: not saved, {one_line(error)}; older checkpoints are intact"
                self.error = CheckpointError(line)
            except Exception as error:  # noqa: BLE001 - raised in the main thread
                self.error = error

        self.error = None
        self.thread = Thread(target=run, name="checkpoint", daemon=True)  # exiting waits for none
        self.thread.start()

    def _write(self, state: State, statistics: Tensors) -> None:
        """Write this column's files and a list of what they should hash to."""
        if not state:
            return
        mesh, folder = self.mesh, self.unfinished
        check_space(self.folder, num_bytes(state))
        self.folder.mkdir(exist_ok=True)  # but not the run directory, which holds the settings
        folder.mkdir(exist_ok=True)
        files: dict[str, Any] = {}
        for kind, tensors in state.items():
            name = file_name(mesh.columns, mesh.column, kind)
            files[name] = _write_tensors(folder / name, tensors)
            files[name]["tensors"] = {
                key: {
                    "dtype": str(value.dtype).removeprefix("torch."),
                    "shape": list(value.shape),
                    **location(key, value.shape, mesh.columns, mesh.column),
                }
                for key, value in tensors.items()
            }
        if mesh.rank == 0:
            files[STATISTICS] = _write_tensors(folder / STATISTICS, statistics)
        atomic_write(folder / f"files-{mesh.column}.json", json.dumps(files))

    def _publish(self) -> None:
        """Write the manifest, rename the folder, and delete old steps: rank 0."""
        files: dict[str, Any] = {}
        for column in range(self.mesh.columns):
            listed = self.unfinished / f"files-{column}.json"
            files |= json.loads(listed.read_text("utf-8"))
            listed.unlink()
        made_by = {"modelpar": __version__, "torch": torch.__version__, "python": python_version()}
        manifest = {"format": FORMAT, "versions": made_by, **self.manifest}
        manifest |= {"columns": self.mesh.columns, "files": files}
        atomic_write(self.unfinished / MANIFEST, json.dumps(signed(manifest), indent=1))
        fsync_folder(self.unfinished)
        self.unfinished.rename(self.final)  # fails if that step is there already
        fsync_folder(self.folder)
        fsync_folder(self.folder.parent)
        with suppress(OSError):  # the step is saved; old ones are deleted next time
            self._prune()

    def _prune(self) -> None:
        """Delete the steps that are not to be kept: rename first, then remove."""
        steps, errors = list_steps(self.folder), top1_errors(self.folder.parent)
        kept = {*list(steps)[-self.last :], self.last_step}
        kept |= {step for step in steps if self.every and step % self.every == 0}
        if self.best and (tested := [step for step in steps if step in errors]):
            kept.add(min(tested, key=errors.__getitem__))
        for step in steps.keys() - kept:
            doomed = self.folder / f".del-{steps[step].name}"
            steps[step].rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # the rest when the run starts again


def _write_tensors(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Write and flush to disk; return size and hash of what was meant to be written."""
    content = safetensors.torch.save({key: one.contiguous() for key, one in tensors.items()})
    atomic_write(path, content)
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


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
    if named.is_file() and named.suffix == ".safetensors":
        return named
    if (named / MANIFEST).is_file():
        return open_step(named)
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
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise (_damaged(path, what) if expected else CheckpointError(f"{path}: {what}")) from None
    if expected and sha256(content).hexdigest() != expected["sha256"]:
        raise _damaged(path, "damaged, size or hash differs from the manifest")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({one_line(error)})") from None


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
    """Return the kernels of the net's first convolution, (96, 3, 11, 11), and read no more."""
    saved = int(source.manifest["columns"])
    kernels: list[Tensor] = []
    for column in range(saved):
        name = file_name(saved, column, "weights")
        first = next(iter(source.manifest["files"][name]["tensors"]))  # in the order of layers
        with safetensors.safe_open(source.folder / name, framework="pt") as file:
            kernels.append(file.get_tensor(first))
    return torch.cat(kernels)
