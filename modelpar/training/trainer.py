"""A whole training: epochs, evaluations, checkpoints, and resuming where a run was stopped.

A checkpoint of step s is the state before the evaluation that belongs to s, so a run that resumes
at s evaluates again.  metrics.jsonl alone records the errors.
"""

import math
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, NoReturn

import torch
from torch import Tensor, nn

from modelpar import shutdown
from modelpar.analysis.activations import ActivationStats
from modelpar.command import Output
from modelpar.config import without_secrets
from modelpar.distributed import Mesh, all_reduce_sum
from modelpar.errors import DivergedError, StoppedError, say
from modelpar.files import check_file_size, check_space, try_writing
from modelpar.images.augment import Augmentation
from modelpar.images.loader import Batch, TestLoader, TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.images.sets import IN_FOLDERS
from modelpar.net.weights import check_state, of_layers
from modelpar.settings import TrainSettings
from modelpar.training import checkpoint
from modelpar.training.checkpoint import Checkpoint, Checkpointer, num_bytes
from modelpar.training.consistency import StepCheck
from modelpar.training.engine import Learner, all_finite, compile_parts, evaluate
from modelpar.training.metrics import Errors, rank_of_label
from modelpar.training.monitor import Meter, Monitor, show
from modelpar.training.nonfinite import first_nonfinite
from modelpar.training.prepare import Prepared, agreed_start
from modelpar.training.readback import Launched, Readback
from modelpar.training.run_dir import locked, trajectory_changes, write_config, written
from modelpar.training.schedule import Plateau

# The ratios are those of docs/benchmarks.md, on two cores.
UNPREPARED: Final = (
    "each epoch decodes and scales the images again; after modelpar-prepare, JPEG files were read "
    "5 and pixels 47 times as fast"
)
STATS_IMAGES: Final = 128  # test images whose activations are summarized: one batch


def train(settings: TrainSettings, prepared: Prepared, mesh: Mesh, run_dir: Path) -> None:
    """Train in ``run_dir`` until epochs or steps are over, from its newest checkpoint if any.

    A finished run is left as it is.  A collective of the whole mesh.
    """
    Output.waits = False
    with shutdown.signals_noted() as request, locked(run_dir, mesh):
        prepared = agreed_start(settings, prepared, run_dir, mesh)
        start = prepared.start
        if start is not None and prepared.finished:
            if mesh.rank == 0:
                show(f"finished: {run_dir} is at step {start.step} of {prepared.steps}")
            return
        trainer = Trainer(settings, prepared, run_dir, StepCheck(mesh, request))
        if start is not None:
            trainer.resume(start)
        elif settings.init.checkpoint is not None:
            trainer.load_layers(settings.init.checkpoint, settings.init.layers)
        if mesh.rank == 0:
            if prepared.images.skipped:
                say(prepared.images.skipped)
            if prepared.data.name in IN_FOLDERS:
                show(f"modelpar: {UNPREPARED}")
            for change in trajectory_changes(run_dir, settings):
                show(f"modelpar: {run_dir} continues with {change}, which alters its trajectory")
        write_config(run_dir, settings, mesh)
        try:
            trainer.open_monitor()
            trainer.run()
        finally:
            if trainer.monitor:
                trainer.monitor.close()


class Trainer:
    """The state of one run between steps; its methods are collectives of the whole mesh."""

    def __init__(
        self, settings: TrainSettings, prepared: Prepared, run_dir: Path, check: StepCheck
    ) -> None:
        self.settings, self.prepared, self.run_dir, self.check = settings, prepared, run_dir, check
        self.mesh, self.plan, self.total = check.mesh, prepared.plan, prepared.steps
        mesh, device, images = self.mesh, self.mesh.device, prepared.images
        if mesh.rank == 0 and settings.compile:
            show("modelpar: compiling; later starts on this machine reuse the result")
        self.learner = Learner(self.plan, settings, mesh)
        recipe, size = self.plan.recipe, settings.batch_size
        stats, scaled = prepared.statistics, recipe.colour_noise == "added_and_scaled"
        dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
        self.augmentation = Augmentation(
            stats, self.plan.image_size, scaled=scaled, device=device, dtype=dtype
        )
        if settings.compile:
            compile_parts(mesh, [self.augmentation])
        self.order = BatchOrder(
            len(images.train),
            size,
            settings.seed,
            replica=mesh.replica,
            replicas=mesh.replicas,
            shuffle=recipe.shuffle if images.shuffled else "never",
        )
        workers = prepared.data.workers
        self.loader = TrainLoader(
            images.train, self.order, self.augmentation, mesh, crops=recipe.crops, workers=workers
        )
        at_once = size // settings.accumulate  # the images that have to fit into memory
        self.tests = TestLoader(images.test, at_once, mesh, workers=workers)
        last, every, best = settings.keep_last, settings.keep_every, settings.keep_best
        self.checkpointer = Checkpointer(run_dir, mesh, last=last, every=every, best=best)
        self.meter, self.readback = Meter(self.learner.link, size), Readback(mesh)
        self.monitor: Monitor | None = None  # of rank 0
        self.step = 0

    def resume(self, start: Checkpoint) -> None:
        """Load a checkpoint once all ranks have read theirs; raises CheckpointError on all."""
        column = self.mesh.column if self.mesh.pair is not None else None
        with self.mesh.all_or_none():
            kinds = self.learner.state()
            state = {kind: checkpoint.read_part(start, kind, column) for kind in kinds}
            check_state(self.learner.net, state["weights"], str(start.folder))
        self.learner.load(**state)
        self.learner.schedule.plateau = Plateau(**start.manifest["schedule"])
        self.step = start.step
        if start.folder.parent == self.checkpointer.folder:  # it need not be saved again
            self.checkpointer.last_step = start.step

    def load_layers(self, path: str, layers: list[str]) -> None:
        """Take the weights of ``layers`` from another training, once all ranks have read theirs.

        Raises CheckpointError or SettingsError on all ranks.
        """
        column = self.mesh.column if self.mesh.pair is not None else None
        with self.mesh.all_or_none():
            source = checkpoint.find(path, "init.checkpoint")
            found = checkpoint.read_part(source, "weights", column)
            found = of_layers(self.learner.net, found, layers, f"init.checkpoint={path}")
        state = self.learner.state()
        self.learner.load({**state["weights"], **found}, state["velocities"])

    def open_monitor(self) -> None:
        """Try to write where the run will write, and open what it shows, on rank 0."""
        state = self.learner.state()
        with self.mesh.all_or_none(), written(self.run_dir):
            if self.mesh.replica == 0:
                try_writing(self.checkpointer.folder)
                check_file_size(self.run_dir, num_bytes({"": state["weights"]}))
            if self.mesh.rank == 0:
                check_space(self.run_dir, num_bytes(state) * self.mesh.columns)
                shown, again = self.settings.monitor, self._evaluation_due()
                self.monitor = Monitor(self.run_dir, self.step, self.total, shown, repeats=again)

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end; raises StoppedError if a signal asked to stop, and DivergedError."""
        self.meter.pause()
        if self.step and self._evaluation_due():
            self._evaluate()
        while self.step < self.total:
            self._epoch()
        self._show_kernels(self.checkpointer.finish())
        if self.monitor:
            show(
                f"{self.run_dir}: checkpoints, metrics.jsonl, conv1.png; "
                f"tensorboard --logdir {self.run_dir}"
            )

    def _epoch(self) -> None:
        """Train from the present step to the end of its epoch, or of the run."""
        epoch, first = divmod(self.step, len(self.order))
        rates = self.learner.schedule.rates(epoch)
        noise = self.learner.schedule.colour_noise(epoch)
        every = self.prepared.data.checkpoint_every
        for batch in self.loader.epoch(epoch, first, noise):
            if self.monitor and self.step == 0:
                self.monitor.batch(batch.images)
            stop = self._train_step(batch, epoch, rates)
            if self.step == self.total or (every and self.step % every == 0):
                self._save()
            if stop:
                self._save_and_stop(stop)
            if self._evaluation_due():
                self._evaluate()
            if self.step == self.total:
                return

    def _train_step(self, batch: Batch, epoch: int, rates: dict[str, float]) -> int:
        """Launch one step; return the signal that asked any rank to stop (0: none).

        If ranks disagree the step is not launched.  On a GPU its values are read later.
        """
        weights, saved = self.learner.optimizer.weights(), self.checkpointer.status()
        status = self.check.step(self.step + 1, batch, weights, saved)
        loss = self.learner.step(batch, self.step, rates)
        values = [self.learner.good]
        if self.step % self.settings.log_every == 0:
            wrong = (rank_of_label(self.learner.last_logits, batch.labels) > 0).sum()
            sums = torch.stack([loss.double(), wrong.double()])
            values += all_reduce_sum(sums, self.mesh.replica_group)
        self.step += 1
        self.meter.add(batch)
        launched = Launched(self.step, batch, epoch, rates, self.meter.counts())
        self.readback.put(torch.stack([value.double() for value in values]), launched)
        self._read(self.readback.in_flight)
        self._show_kernels(self.checkpointer.advance(status.saves))
        return status.stop

    def _read(self, in_flight: int = 0) -> None:
        """Read the values of all steps but the newest ``in_flight``, and record their rows.

        If a value is not finite no weight has been updated since, and the run ends.
        """
        for launched, (good, *sums) in self.readback.take(in_flight):
            if not good:
                found = first_nonfinite(self.learner, launched.batch, launched.number - 1)
                self._diverged(launched.number, found)
            if sums:
                self._log(launched, *sums)

    def _log(self, launched: Launched, loss: float, wrong: float) -> None:
        """Record a step: loss and error of the batch as it was trained on, rates and speed.

        ``loss`` and ``wrong`` answers are sums over the replicas.
        """
        step, batch, epoch, rates, counts = launched
        shown, replicas = self.learner.schedule.shown, self.mesh.replicas
        row = {
            "step": step,
            "epoch": epoch,
            "loss": loss / replicas,
            "top1": 100 * wrong / (len(batch.labels) * replicas),
            "lr": rates[shown[1]],
        }
        if self.monitor:
            named = {name: rates[name] for name in shown}
            self.monitor.train(row | self.meter.take(counts), named)

    def _diverged(self, step: int, what: str) -> NoReturn:
        """Publish a save under way, which is of an earlier step, and raise DivergedError."""
        self._show_kernels(self.checkpointer.finish())
        saved = checkpoint.list_steps(self.run_dir / "checkpoints")
        kept = "the last checkpoint is good, but would diverge again: " if saved else ""
        raise DivergedError(f"step {step}: {what}; {kept}use a new run_dir with a lower recipe.lr")

    # -- evaluations -----------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        """Return whether an evaluation belongs to this step: every few epochs, and at the end."""
        every = len(self.order) * self.settings.data.evaluate_every
        return self.step >= self.total or (self.step > 0 and self.step % every == 0)

    def _evaluate(self) -> None:
        """Evaluate and record; raises StoppedError, with the step saved, and DivergedError."""
        self._read()
        net, mesh, ends = self.learner.net, self.mesh, self.step >= self.total
        views = self.settings.views if ends else 1
        stats = None
        if self.settings.monitor.tensorboard and mesh.replica == 0:
            per_batch = -(-STATS_IMAGES // len(self.tests))
            stats = ActivationStats(net, self.plan.columns, mesh, per_batch)
        with stats or nullcontext():
            errors = self._errors(net, views)
        if not ends:
            plateau = replace(self.learner.schedule.plateau)
            plateau.observe(self.step // len(self.order) - 1, errors.top1)
            if 0 < self.settings.early_stopping <= plateau.worse:
                self._save()  # the state before this evaluation, as always
                self.total = self.step
                self._evaluate()
                return
            self.learner.schedule.plateau = plateau
        averaged = self._errors(self.learner.averaged(), views) if self.plan.recipe.ema else None
        rows = stats.result() if stats else []
        if self.monitor:
            self.monitor.activations(rows, self.step)
            early = self.settings.early_stopping * (self.total < self.prepared.steps)
            self.monitor.test(self.step, errors, self.plan.num_classes, views, averaged, early)
        self.meter.pause()

    def _errors(self, net: nn.Module, views: int) -> Errors:
        batches, groups = self._test_batches(), self.prepared.images.groups
        errors = evaluate(net, self.mesh, batches, self.augmentation, groups, views)
        if not math.isfinite(errors.loss):
            self._diverged(self.step, f"the test loss is {errors.loss}")
        return errors

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test batches; stop at once if asked, since a scheduler may not wait longer."""
        for number, batch in enumerate(self.tests):
            if number < self.tests.common:
                status = self.check.poll(self.checkpointer.status())
                self._show_kernels(self.checkpointer.advance(status.saves))
                if status.stop:
                    self._save_and_stop(status.stop)
            yield batch

    # -- checkpoints -----------------------------------------------------------------------------

    def _save(self) -> None:
        """Start a checkpoint of this step if it has none, after an earlier one is published."""
        if self.checkpointer.last_step == self.step:
            return
        self._read()
        self._show_kernels(self.checkpointer.finish())
        state = self.learner.state()
        finite = all_finite(list(state["weights"].values()))
        if not all(one for (one,) in self.mesh.gather_ints((int(finite),))):
            self._diverged(self.step, "a weight is not finite after its update")
        if self.monitor:
            self.monitor.flush()
        manifest = {
            "step": self.step,
            "epoch": self.step // len(self.order),
            "schedule": asdict(self.learner.schedule.plateau),
            "data": without_secrets(asdict(self.prepared.data)),
            "classes": self.prepared.images.class_ids,
            **self.prepared.identity,
        }
        self.checkpointer.start(state, vars(self.prepared.statistics), manifest)
        self.meter.pause()

    def _save_and_stop(self, stop: int) -> NoReturn:
        self._save()
        self._show_kernels(self.checkpointer.finish())
        resume = "" if self.settings.resume == "auto" else " resume=auto"
        raise StoppedError(
            f"{self.run_dir}: asked to stop ({signal.Signals(stop).name}), saved at step "
            f"{self.step} of {self.total}; the same command with run_dir={self.run_dir}{resume} "
            "continues"
        )

    def _show_kernels(self, published: Path | None) -> None:
        """Show conv1's kernels of a step that has just been published, if one has."""
        if self.monitor and published is not None:
            with self.monitor.drawing():
                saved = checkpoint.open_step(published)
                self.monitor.kernels(checkpoint.read_conv1(saved), saved.step, self.plan.columns)
