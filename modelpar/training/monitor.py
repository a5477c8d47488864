"""What a run shows: progress bar, metrics.jsonl and TensorBoard, all written by rank 0."""

import io
import json
import math
import platform
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import sub
from pathlib import Path
from textwrap import indent
from typing import Any, Final

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import save_image

import modelpar
from modelpar import environment
from modelpar.analysis.activations import MEASURES, Activity
from modelpar.analysis.histograms import Histogram
from modelpar.analysis.kernels import colour_difference, kernel_picture, specialisation
from modelpar.analysis.pictures import confusion_picture, labelled_grid
from modelpar.errors import FULL, one_line, say
from modelpar.files import atomic_write
from modelpar.groups import MonitorSettings
from modelpar.images.loader import Batch
from modelpar.net.exchange import Link
from modelpar.net.paper import COLUMNS
from modelpar.progress import progress_bar, show
from modelpar.training.metrics import METRICS, Errors, read_rows
from modelpar.training.showing import Embedding, Seen, points
from modelpar.training.tracking import track

KERNELS: Final = "conv1.png"
GRID_IMAGES: Final = 16  # of a batch
MARKDOWN: Final = "    "  # before each line of a text whose lines are kept
SPRITE: Final = 48  # pixels, the side of an image in the projector
# Settings that are no hyperparameters: names, and what was published.
NAMES: Final = ("run_dir", "control", "published", "control_published", "monitor")


class Monitor:
    """Writes rows, scalars and pictures of one run; every method is for rank 0.

    TensorBoard sorts groups by name: ``test`` and ``train`` come first, those with many charts,
    ``units_*`` and ``weights_*``, last.  The metrics that it shows of a sweep are the first ones.

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
        self.best = min((row["top1"] for row in kept if row["kind"] == "test"), default=math.inf)
        self.file = (run_dir / METRICS).open("a", buffering=1, encoding="utf-8")
        if settings.wandb:
            track(run_dir)
        self.board: SummaryWriter | None = None
        self.ending: Any = None  # what tells TensorBoard that the run has finished
        if settings.tensorboard:
            self.board = SummaryWriter(str(run_dir), purge_step=step + 1 if step else 0)
        self.bar = progress_bar(total=total, initial=step, unit="step", shown=settings.progress)

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
        groups = {
            "train": {key: row[key] for key in ("loss", "top1", "epoch")},
            "train_rate": rates,
            "train_time": {key: row[key] for key in ("images_per_s", "data_wait_s", "crossing_s")},
        }
        for group, values in groups.items():
            self._scalars({f"{group}/{key}": value for key, value in values.items()}, row["step"])

    def test(
        self,
        step: int,
        epochs: int,
        errors: Errors,
        views: int = 1,
        averaged: Errors | None = None,
        early_stopping: int = 0,
    ) -> None:
        """Record and print an evaluation with ``views`` views: errors in %, loss in nats.

        ``epochs``: how many are over.  ``averaged``: the errors of the moving average of the
        weights.  ``early_stopping``: the number of evaluations without a better one that end the
        run with this one, 0 if it does not end.
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
        mark = "  best" if errors.top1 < self.best else ""
        self.best = min(self.best, errors.top1)
        show(
            f"step {step:{len(str(self.bar.total))}}  epoch {epochs:3}  error {errors.top1:5.2f} "
            f"+- {errors.standard_error:.2f} %  top-5 {errors.top5:5.2f} %  "
            f"loss {errors.loss:.4f}{mark}"
        )
        if averaged is not None:
            show(f"step {step}: the moving average of the weights: {averaged.text}")
        self._scalars(charts, step)

    @contextmanager
    def drawing(self) -> Generator[None]:
        """Report what cannot be drawn; the training does not depend on it.

        Raises OSError for a full disk, which ends the run as it does where a row is written.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            say(f"{self.run_dir}: TensorBoard is no longer written ({one_line(error)})")
            self.board = None

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Show settings and versions as text, and the settings as hyperparameters."""
        with self.drawing():
            if not self.board:
                return
            commit = environment.commit(Path(modelpar.__file__).parent)
            made_by = {"modelpar": modelpar.__version__, "commit": commit or "not from git"}
            made_by |= {"torch": str(torch.__version__), "python": platform.python_version()}
            self.board.add_text("run/versions", indent(yaml_of(made_by), MARKDOWN), 0)
            self.board.add_text("run/settings", indent(yaml_of(settings), MARKDOWN), 0)
            kept = {key: value for key, value in settings.items() if key not in NAMES}
            _, begin, self.ending = hparams(dotted(kept), {})
            self._summary(begin)

    def finish(self) -> None:
        """End the bar, and tell TensorBoard that the run has finished."""
        self.bar.close()
        with self.drawing():
            if self.ending:
                self._summary(self.ending)

    def _summary(self, summary: Any) -> None:
        if self.board and self.board.file_writer:
            self.board.file_writer.add_summary(summary)

    def batch(self, batch: Batch, mean: Tensor, classes: Sequence[str]) -> None:
        """Show the first images of a batch with the names of their classes.

        ``mean`` (3, S, S): what was subtracted from them.
        """
        with self.drawing():
            if self.board:
                shown = (batch.images[:GRID_IMAGES].float() + mean).cpu() / 255
                names = [str(classes[int(label)]) for label in batch.labels[:GRID_IMAGES]]
                self.board.add_image("train_batch/augmented", labelled_grid(shown, names), 0)

    def seen(self, seen: Seen, classes: Sequence[str], step: int) -> None:
        """Show what an evaluation has found besides its errors."""
        self.activations(seen.activity, step)
        with self.drawing():
            for one in seen.histograms if self.board else ():
                self._histogram(one, step)
            if self.board and seen.confusion is not None:
                picture = confusion_picture(seen.confusion, classes)
                self.board.add_image("test/confusion_matrix", picture, step)
            if self.board and seen.embedding is not None:
                self._embedding(seen.embedding, classes, step)

    def _histogram(self, one: Histogram, step: int) -> None:
        """Add a histogram; the counts of a sample show the shape of a distribution."""
        assert self.board  # noqa: S101 - for the types
        limits = torch.linspace(one.least, one.most, len(one.counts) + 1, dtype=torch.float64)
        self.board.add_histogram_raw(
            f"{one.name}/column{one.column}",
            one.least,
            one.most,
            int(sum(one.counts)),
            one.total,
            one.squares,
            limits[1:].tolist(),
            one.counts,
            step,
        )

    def _embedding(self, one: Embedding, classes: Sequence[str], step: int) -> None:
        """Add images to the projector, at the end of a run."""
        assert self.board  # noqa: S101 - for the types
        sprites = functional.interpolate(
            one.images.float() / 255, (SPRITE, SPRITE), mode="bilinear", antialias=True
        )
        names = [str(classes[label]) for label in one.labels]
        self.board.add_embedding(points(one.products), names, sprites, step, "fc7")

    def kernels(self, kernels: Tensor, step: int, columns: int = COLUMNS) -> None:
        """Show conv1's kernels of all columns, in TensorBoard and as ``conv1.png``.

        TensorBoard also has their means over each column, see ``specialisation``.
        """
        picture, file = kernel_picture(kernels, columns), io.BytesIO()
        save_image(picture, file, format="png")
        atomic_write(self.run_dir / KERNELS, file.getvalue())
        if self.board:
            self.board.add_image("weights_conv1/kernels", picture, step)
        found = specialisation(kernels, columns)
        values: dict[str, float] = {}
        for column, part in enumerate(found):
            name = f"weights_conv1/column{column}"
            values[f"{name}_off_grey"] = float(part.colour_share.mean())
            values[f"{name}_frequency"] = float(part.frequency.mean())
            values[f"{name}_colour_kernels"] = part.colour_kernels
        if (difference := colour_difference(found)) is not None:
            values["weights_conv1/difference_off_grey"] = difference
        self._scalars(values, step)

    def activations(self, rows: Sequence[Activity], step: int) -> None:
        """Show statistics of the layers' outputs for test images, in a group for each measure."""
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
        """End the bar and close the files, as far as the disk allows.

        wandb sends what is left when the process exits.  The other ranks still wait for this one
        here, and an upload may take longer than ``comm.timeout``.
        """
        for part in (self.bar, self.file, self.board):
            with suppress(OSError):
                if part is not None:
                    part.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        with self.drawing():
            if board := self.board:
                for name, value in values.items():
                    board.add_scalar(name, value, step)


def yaml_of(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """Return nested settings by dotted key; null is a value like others, so runs can differ."""
    found: dict[str, bool | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= dotted(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float)):
            found[prefix + key] = value
        else:
            found[prefix + key] = "null" if value is None else str(value)
    return found


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
