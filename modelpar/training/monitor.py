"""What a run shows of itself: progress bar, metrics.jsonl, TensorBoard; rank 0 alone."""

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from modelpar.analysis.activations import MEASURES, Activity
from modelpar.analysis.kernels import colour_difference, kernel_picture, specialisation
from modelpar.analysis.neighbours import Figure4, nearest_picture
from modelpar.images.loader import Batch
from modelpar.net.exchange import Link
from modelpar.net.paper import COLUMNS
from modelpar.training.metrics import Errors

METRICS: Final = "metrics.jsonl"
KERNELS: Final = "conv1.png"
LOGFILE_INTERVAL: Final = 10.0  # s between the bar's lines where nobody watches it move
SHOWN: Final = 16  # images of the sample batch


def image_grid(images: Tensor) -> Tensor:
    """Return the first images of a batch (N, 3, S, S), less the mean, as one picture in 0..1."""
    return make_grid(images[:SHOWN].cpu().float() / 255 + 0.5, nrow=4).clamp(0, 1)


class Monitor:
    """Writes rows, scalars and pictures of one run; every method is for rank 0.

    ``step`` is where the run goes on, ``tested`` whether its evaluation is over: rows and events
    beyond, left by a process that was killed, are dropped, so that each stands there once.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        total: int,
        *,
        tested: bool = True,
        progress: bool,
        tensorboard: bool,
    ) -> None:
        self.run_dir = run_dir
        self.metrics = run_dir / METRICS
        _drop_after(self.metrics, step, tested=tested)
        self.file = self.metrics.open("a", buffering=1)
        self.board = (
            SummaryWriter(str(run_dir), purge_step=step + 1 if step else 0)
            if tensorboard
            else None
        )
        self.bar: Any = tqdm(
            total=total,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not progress,
            mininterval=0.5 if sys.stderr.isatty() else LOGFILE_INTERVAL,
        )

    def train(self, row: Mapping[str, Any], rates: Mapping[str, float]) -> None:
        """Record a training row, see the README's table of fields."""
        self._write({"kind": "train", **row})
        with _shown():
            self.bar.set_postfix_str(
                f"epoch {row['epoch']}, loss {row['loss']:.3f}, "
                f"{row['images_per_s']:.0f} images/s, data {row['data_wait_s'] * 1e3:.0f} ms, "
                f"crossing {row['crossing_s'] * 1e3:.0f} ms",
                refresh=False,
            )
            self.bar.update(row["step"] - self.bar.n)
        if self.board:
            for key in ("loss", "top1", "epoch", "images_per_s", "data_wait_s", "crossing_s"):
                self.board.add_scalar(f"train/{key}", row[key], row["step"])
            for name, rate in rates.items():
                self.board.add_scalar(f"rate/{name}", rate, row["step"])

    def test(self, step: int, errors: Errors, num_classes: int, views: int = 1) -> None:
        """Record an evaluation by ``views``: errors in %, loss in nats; say it beside chance."""
        row = {"step": step, "loss": errors.loss, "top1": errors.top1, "top5": errors.top5}
        self._write({"kind": "test", **row, "views": views})
        chance = 100 - 100 / num_classes
        self.say(
            f"step {step}: test top-1 error {errors.top1:.2f} % (chance {chance:.2f} %), "
            f"top-5 {errors.top5:.2f} %, loss {errors.loss:.4f}, {errors.samples} images"
        )
        if self.board:
            for key in ("loss", "top1", "top5"):
                self.board.add_scalar(f"test/{key}", row[key], step)

    def images(self, name: str, picture: Tensor, step: int) -> None:
        """Show a picture (3, H, W) in 0..1 in TensorBoard."""
        if self.board:
            self.board.add_image(name, picture, step)

    def kernels(self, kernels: Tensor, step: int, columns: int = COLUMNS) -> None:
        """Show conv1's kernels of all columns, in TensorBoard and as ``conv1.png``.

        TensorBoard has their means over each column too, see ``specialisation``.
        """
        picture = kernel_picture(kernels, columns)
        save_image(picture, self.run_dir / KERNELS)
        self.images("conv1/kernels", picture, step)
        if not self.board:
            return
        found = specialisation(kernels, columns)
        for column, own in enumerate(found):
            for key, value in (
                ("off_grey", float(own.colour_share.mean())),
                ("frequency", float(own.frequency.mean())),
                ("colour_kernels", own.colour_kernels),
            ):
                self.board.add_scalar(f"specialisation/column{column}_{key}", value, step)
        if apart := colour_difference(found):
            self.board.add_scalar("specialisation/difference_off_grey", apart[0], step)

    def activity(self, rows: Sequence[Activity], step: int) -> None:
        """Show what the layers gave to test images: a group of charts for each measure.

        Their names come after ``train``: TensorBoard sorts groups, and these have many charts.
        """
        if not self.board:
            return
        for row in rows:
            where = row.layer if row.column is None else f"{row.layer}/column{row.column}"
            for key in MEASURES if row.column is not None else ("mean", "std"):
                self.board.add_scalar(f"units_{key}/{where}", getattr(row, key), step)

    def figure4(self, found: Figure4, classes: Sequence[str], step: int) -> None:
        """Show figure 4; its bars where matplotlib is installed."""
        if not self.board:
            return
        self.images("figure4/nearest", nearest_picture(found.neighbours), step)
        if find_spec("matplotlib"):
            from modelpar.analysis.bars import bars  # noqa: PLC0415 - of the extra plots

            self.board.add_figure("figure4/likeliest", bars(found.predictions, classes), step)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        show(line)

    def flush(self) -> None:
        """Bring everything to disk, as before a checkpoint is published."""
        self.file.flush()
        if self.board:
            self.board.flush()

    def close(self) -> None:
        """End the bar and close the files, as far as the disk allows."""
        with _shown():
            self.bar.close()
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            if self.board:
                self.board.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")


def show(line: str) -> None:
    """Print a line above a progress bar, if there is one and somebody reads it."""
    with _shown():
        tqdm.write(line)


def _shown() -> suppress:
    """Let a training go on where nobody reads what it shows: a terminal or a pipe that is gone."""
    return suppress(OSError)


def _drop_after(path: Path, step: int, *, tested: bool) -> None:
    """Keep the rows up to ``step``; a last line cut off by a kill goes too."""
    if not path.exists():
        return
    kept: list[str] = []
    last = {"train": step, "test": step if tested else step - 1}
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= last[row["kind"]]:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            logging.getLogger(__name__).warning("%s: dropped a damaged line", path)
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(kept))
    unfinished.replace(path)


class Meter:
    """Time, waiting and bytes since the last row."""

    def __init__(self, link: Link | None, batch_size: int, device: torch.device) -> None:
        self.link = link
        self.batch_size = batch_size
        self.device = device
        self.pause()

    def pause(self) -> None:
        """Start anew, after an evaluation or a save that no row should count."""
        self.began = time.perf_counter()
        self.waited, self.steps = 0.0, 0
        self.crossed = self.link.seconds if self.link else 0.0
        self.sent = self.link.bytes_sent if self.link else 0

    def add(self, batch: Batch) -> None:
        """Count one step."""
        self.waited += batch.waited
        self.steps += 1

    def take(self) -> dict[str, float]:
        """Return the means a step since the last row, and start anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        steps = max(1, self.steps)
        images = steps * self.batch_size
        crossed = (self.link.seconds if self.link else 0.0) - self.crossed
        sent = (self.link.bytes_sent if self.link else 0) - self.sent
        row = {
            "images_per_s": images / (time.perf_counter() - self.began),
            "data_wait_s": self.waited / steps,
            "crossing_s": crossed / steps,
            "exchange_bytes_per_image": sent / images,
        }
        self.pause()
        return row
