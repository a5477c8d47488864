"""Writes checkpoints in a thread while training continues.

Each rank writes its own files and reports in the step message when they are on disk.  When all
are, rank 0 writes the manifest and renames the folder.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from modelpar.net.weights import location
from modelpar.training.checkpoint import (
    FORMAT,
    MANIFEST,
    STATISTICS,
    file_name,
    list_steps,
    signed,
)
from modelpar.training.metrics import evaluations

PENDING, DONE, FAILED = 0, 1, 2  # what a rank reports about its share of a save
EXPECTED: Final = (OSError, ValueError, SafetensorError, CheckpointError)  # no bugs of ours
EXIT_SECONDS: Final = 10.0  # that a failed rank leaves its thread
POLLS_PER_TIMEOUT: Final = 8  # how often a rank that waits for its disk shows that it is alive
Tensors = Mapping[str, Tensor]
State = Mapping[str, Tensors]  # "weights", "velocities" and perhaps "ema" of one column


def num_bytes(state: State) -> int:
    """Return the bytes of one column's tensors."""
    return sum(value.nbytes for tensors in state.values() for value in tensors.values())


class Checkpointer:
    """Saves a copy of the state in a thread while training continues; one save at a time.

    A save has two stages: all ranks write their files, then rank 0 publishes the folder.  Every
    rank sends ``status`` in its messages and passes what all ranks sent to ``advance``.  The
    threads take part in no collective, so a slow disk only delays the publication, and the first
    evaluation, which waits for it.

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

    def join(self) -> None:
        """Wait some seconds for the thread: Python aborts if one is in torch while it exits."""
        if self.thread is not None:
            self.thread.join(EXIT_SECONDS)

    def _run(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised in the main thread
                # Where memory is full, safetensors raises what is no Exception.
                if isinstance(error, EXPECTED) or not isinstance(error, Exception):
                    why = one_line(error)
                    line = f"{self.final}: not saved, {why}; older checkpoints are intact"
                    error = CheckpointError(line)
                self.error = error

        self.error = None
        thread = Thread(target=run, name="checkpoint", daemon=True)  # exiting waits for none
        thread.start()
        self.thread = thread

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
        with suppress(OSError, CheckpointError):  # old steps are deleted next time
            self._prune()

    def _prune(self) -> None:
        """Delete the steps that are not to be kept: rename first, then remove."""
        steps, tests = list_steps(self.folder), evaluations(self.folder.parent)
        kept = {*list(steps)[-self.last :], self.last_step}
        kept |= {step for step in steps if self.every and step % self.every == 0}
        if self.best and (tested := [step for step in steps if step in tests]):
            kept.add(min(tested, key=lambda step: tests[step]["top1"]))
        for step in steps.keys() - kept:
            doomed = self.folder / f".del-{steps[step].name}"
            steps[step].rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # the rest when the run starts again


def _write_tensors(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Write and flush to disk; return size and hash of what was meant to be written."""
    content = safetensors.torch.save({key: one.contiguous() for key, one in tensors.items()})
    atomic_write(path, content)
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}
