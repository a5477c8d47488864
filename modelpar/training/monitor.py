"""What a run shows: progress bar, metrics.jsonl and TensorBoard, all written by rank 0."""

import io
import json
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from operator import sub
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from modelpar.analysis.activations import MEASURES, Activity
from modelpar.analysis.kernels import colour_difference, kernel_picture, specialisation
from modelpar.errors import one_line, say
from modelpar.files import atomic_write
from modelpar.images.loader import Batch
from modelpar.net.exchange import Link
from modelpar.net.paper import COLUMNS
from modelpar.settings import MonitorSettings
from modelpar.training.metrics import METRICS, Errors, read_rows
from modelpar.training.run_dir import CONFIG

KERNELS: Final = "conv1.png"
LOGFILE_INTERVAL: Final = 10.0  # s between lines of the progress bar in a log file
WANDB_ID: Final = "wandb_id"  # in log/, of the run at Weights & Biases
GRID_IMAGES: Final = 16  # of a batch


class Monitor:
    """Writes rows, scalars and pictures of one run; every method is for rank 0.

    The run continues from ``step``; ``repeats``: with the evaluation that belongs to that step.
    Rows of what will come again are dropped, so that metrics.jsonl holds each of them once.
    """

    def __init__(
        self, run_dir: Path, step: int, total: int, settings: MonitorSettings, *, repeats: bool
    ) -> None:
        self.run_dir = run_dir
        last = {"train": step, "test": step - repeats}
        kept = [row for row in read_rows(run_dir) if row["step"] <= last.get(row["kind"], -1)]
        atomic_write(run_dir / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = (run_dir / METRICS).open("a", buffering=1, encoding="utf-8")
        self.tracked: Any = _tracked(run_dir) if settings.wandb else None
        self.board: SummaryWriter | None = None
        if settings.tensorboard:
            self.board = SummaryWriter(str(run_dir), purge_step=step + 1 if step else 0)
        self.bar: Any = tqdm(
            total=total,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not settings.progress,
            mininterval=0.5 if sys.stderr.isatty() else LOGFILE_INTERVAL,
        )

    def train(self, row: Mapping[str, Any], rates: Mapping[str, float]) -> None:
        """Record a training row (docs/settings.md lists its fields) and learning rates."""
        self.file.write(json.dumps({"kind": "train", **row}) + "\n")
        self.bar.set_postfix_str(
            f"epoch {row['epoch']}, loss {row['loss']:.3f}, "
            f"{row['images_per_s']:.0f} images/s, data {row['data_wait_s'] * 1e3:.0f} ms, "
            f"crossing {row['crossing_s'] * 1e3:.0f} ms",
            refresh=False,
        )
        self.bar.update(row["step"] - self.bar.n)
        keys = ("loss", "top1", "epoch", "images_per_s", "data_wait_s", "crossing_s")
        self._scalars({f"train/{key}": row[key] for key in keys}, row["step"])
        self._scalars({f"rate/{name}": rate for name, rate in rates.items()}, row["step"])

    def test(
        self,
        step: int,
        errors: Errors,
        num_classes: int,
        views: int = 1,
        averaged: Errors | None = None,
        early_stopping: int = 0,
    ) -> None:
        """Record and print an evaluation with ``views`` views: errors in %, loss in nats.

        ``averaged``: that of the moving average of the weights.  ``early_stopping``: the number of
        evaluations without a better one that end the run with this one, 0 if it does not end.
        """
        keys = ("loss", "top1", "top5", "standard_error")
        row = {"step": step, **{key: getattr(errors, key) for key in keys}}
        charts = {f"test/{key}": row[key] for key in keys[:3]}
        if averaged is not None:
            row |= {f"ema_{key}": getattr(averaged, key) for key in keys[:3]}
            charts |= {f"test_ema/{key}": getattr(averaged, key) for key in keys[:3]}
        if early_stopping:
            row["early_stopping"] = early_stopping
            show(
                f"step {step}: no better test error in {early_stopping} evaluations, the run ends"
            )
        self.file.write(json.dumps({"kind": "test", **row, "views": views}) + "\n")
        chance = 100 - 100 / num_classes
        show(
            f"step {step}: test top-1 error {errors.top1:.2f} % (standard error "
            f"{errors.standard_error:.2f} %, chance {chance:.2f} %), top-5 {errors.top5:.2f} %, "
            f"loss {errors.loss:.4f}, {errors.samples} images"
        )
        if averaged is not None:
            show(f"step {step}: the moving average of the weights: {averaged.text}")
        self._scalars(charts, step)

    @contextmanager
    def drawing(self) -> Generator[None]:
        """Report what cannot be drawn; the training does not depend on it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of any library that draws
            say(f"{self.run_dir}: no more pictures and charts ({one_line(error)})")
            self.board = None

    def batch(self, images: Tensor) -> None:
        """Show the first images of a batch (N, 3, S, S), less the mean, in TensorBoard."""
        with self.drawing():
            shown = images[:GRID_IMAGES].cpu().float() / 255 + 0.5
            if self.board:
                self.board.add_image("batch/augmented", make_grid(shown, nrow=4).clamp(0, 1), 0)

    def kernels(self, kernels: Tensor, step: int, columns: int = COLUMNS) -> None:
        """Show conv1's kernels of all columns, in TensorBoard and as ``conv1.png``.

        TensorBoard also has their means over each column, see ``specialisation``.
        """
        picture, file = kernel_picture(kernels, columns), io.BytesIO()
        save_image(picture, file, format="png")
        atomic_write(self.run_dir / KERNELS, file.getvalue())
        if self.board:
            self.board.add_image("conv1/kernels", picture, step)
        found = specialisation(kernels, columns)
        values: dict[str, float] = {}
        for column, part in enumerate(found):
            name = f"specialisation/column{column}"
            values[f"{name}_off_grey"] = float(part.colour_share.mean())
            values[f"{name}_frequency"] = float(part.frequency.mean())
            values[f"{name}_colour_kernels"] = part.colour_kernels
        if (difference := colour_difference(found)) is not None:
            values["specialisation/difference_off_grey"] = difference
        self._scalars(values, step)

    def activations(self, rows: Sequence[Activity], step: int) -> None:
        """Show statistics of the layers' outputs for test images: one group of charts a measure.

        The groups' names sort after ``train``, since they hold many charts.
        """
        for row in rows:
            name = row.layer if row.column is None else f"{row.layer}/column{row.column}"
            keys = MEASURES if row.column is not None else ("mean", "std")
            self._scalars({f"units_{key}/{name}": getattr(row, key) for key in keys}, step)

    def flush(self) -> None:
        """Write TensorBoard's events to disk, before a checkpoint; rows are there already."""
        with self.drawing():
            if self.board:
                self.board.flush()

    def close(self) -> None:
        """End the bar and close the files, as far as the disk allows."""
        for part in (self.bar, self.file, self.board):
            with suppress(OSError):
                if part is not None:
                    part.close()
        if self.tracked is not None:
            with self.drawing():
                self.tracked.finish()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        with self.drawing():
            if board := self.board:
                for name, value in values.items():
                    board.add_scalar(name, value, step)


def _tracked(run_dir: Path) -> Any:
    """Start or continue the run of Weights & Biases that copies TensorBoard's events.

    Returns None, with a line that says why, if that fails.  It must start before TensorBoard.
    """
    log = run_dir / "log"
    try:
        if not (log / WANDB_ID).is_file():
            log.mkdir(exist_ok=True)
            atomic_write(log / WANDB_ID, uuid4().hex)
        return import_module("wandb").init(
            id=(log / WANDB_ID).read_text("utf-8"),
            name=run_dir.name,
            dir=str(log),
            resume="allow",
            config=OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG)),
            sync_tensorboard=True,
            settings={"console": "off"},
        )
    except Exception as error:  # noqa: BLE001 - of a library and of its server
        say(f"{run_dir}: not sent to Weights & Biases ({one_line(error)})")
        return None


def show(line: str) -> None:
    """Print a line above the progress bar."""
    tqdm.write(line)


class Meter:
    """Time, waiting and bytes sent since the last row.

    What a step adds is counted when it is launched, and a row's time ends when its step has
    ended, which is later on a GPU.
    """

    def __init__(self, link: Link | None, batch_size: int) -> None:
        self.link, self.batch_size = link, batch_size
        self.waited, self.steps = 0.0, 0
        self.pause()

    def pause(self) -> None:
        """Start again, after an evaluation or a save that no row should count."""
        self.before = (time.perf_counter(), *self.counts())

    def add(self, batch: Batch) -> None:
        """Count one step."""
        self.waited += batch.waited
        self.steps += 1

    def counts(self) -> tuple[float, ...]:
        """Return what the run has waited, done and sent."""
        seconds, sent = (self.link.seconds, self.link.bytes_sent) if self.link else (0.0, 0)
        return self.waited, self.steps, seconds, sent

    def take(self, counts: Sequence[float]) -> dict[str, float]:
        """Return the means per step from the last row to a step with these ``counts``."""
        now = (time.perf_counter(), *counts)
        took, waited, steps, crossed, sent = map(sub, now, self.before)
        self.before = now
        return {
            "images_per_s": steps * self.batch_size / took,
            "data_wait_s": waited / steps,
            "crossing_s": crossed / steps,
            "exchange_bytes_per_image": sent / (steps * self.batch_size),
        }
