"""Saving while the training goes on, and which steps stay on the disk."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Final

from torch import Tensor

from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError
from modelpar.training import checkpoint
from modelpar.training.checkpoint import Kind

CLOSING: Final = 10.0  # s that a run which ends badly waits for a save under way


@dataclass(frozen=True)
class Retention:
    """What pruning leaves: the ``last`` steps, each ``every``-th (0: none), the ``best``."""

    last: int = 2
    every: int = 0
    best: bool = True


class Checkpointer:
    """Saves from a copy, in a thread, while the training goes on; one save at a time.

    Every process starts and ends its saves in the same order.
    """

    def __init__(self, folder: Path, mesh: Mesh, keep: Retention) -> None:
        self.folder = folder
        self.mesh = mesh
        self.keep = keep
        self.thread: Thread | None = None
        self.saved: Path | None = None
        self.error: Exception | None = None

    def start(
        self,
        parts: Mapping[Kind, Mapping[str, Tensor]],
        statistics: Mapping[str, Tensor],
        manifest: Mapping[str, Any],
    ) -> None:
        """Copy ``parts`` and start writing them; waits for an earlier save first."""
        self.end()
        copies: dict[Kind, dict[str, Tensor]] = {
            kind: {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}
            for kind, tensors in parts.items()
        }
        beside = self.mesh.beside()

        def work() -> None:
            try:
                self.saved = checkpoint.save(self.folder, beside, copies, statistics, manifest)
                if self.mesh.rank == 0:
                    with suppress(OSError):  # it is saved; what is old goes next time
                        prune(self.folder, self.keep, self.saved)
            except Exception as error:  # noqa: BLE001 - raised where the training sees it
                self.error = error

        self.thread = Thread(target=work, name="saver", daemon=True)
        self.thread.start()

    def failed(self) -> bool:
        """Whether a save is over and did not succeed."""
        return self.error is not None

    def end(self) -> Path | None:
        """Wait for the save under way; return what was published since the last call, if any.

        A collective of the whole mesh, also where a process has no save under way any more.
        Raises what the save raised, CheckpointError on every process alike; PeerLostError where a
        process stands still, not where its disk does.
        """
        self.mesh.wait_until_all(self._over)
        return self._taken()

    def close(self) -> None:
        """Let a save under way finish, where the others still answer; never raises."""
        self._over(CLOSING)

    def take(self) -> Path | None:
        """Return what was published since the last call; neither waits nor raises."""
        return self._taken() if self._over(0) and not self.failed() else None

    def _over(self, patience: float) -> bool:
        """Whether no save is under way any more, after ``patience`` s at most."""
        if self.thread is not None:
            self.thread.join(patience)
        return self.thread is None or not self.thread.is_alive()

    def _taken(self) -> Path | None:
        saved, error = self.saved, self.error
        self.thread = self.saved = self.error = None
        if error is not None:
            raise error
        return saved


def prune(folder: Path, keep: Retention, saved: Path | None = None) -> None:
    """Remove the steps that ``keep`` does not name: first out of sight by a rename, then gone.

    The one just ``saved`` stays, whatever newer ones somebody has put beside it.
    """
    steps = checkpoint.steps(folder)
    kept = {*steps[-keep.last :], saved}
    kept |= {step for step in steps if keep.every and _number(step) % keep.every == 0}
    if keep.best:
        kept |= set(_best(steps))
    for old in steps:
        if old not in kept:
            doomed = old.with_name(f".del-{old.name}")
            with suppress(OSError):  # swept before the next save
                old.rename(doomed)
                shutil.rmtree(doomed)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _best(steps: Sequence[Path]) -> list[Path]:
    """Return the step with the lowest top-1 error of those that were tested themselves."""
    errors: list[tuple[float, Path]] = []
    for step in steps:
        with suppress(CheckpointError):
            manifest = checkpoint.open_step(step).manifest
            if manifest.get("tested") == manifest["step"] and manifest["top1"] is not None:
                errors.append((manifest["top1"], step))
    return [min(errors)[1]] if errors else []
