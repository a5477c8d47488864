"""A whole training: epochs, evaluations, checkpoints, and resuming where a run was stopped.

A checkpoint of step s is the state before the evaluation that belongs to s, so a run that resumes
at s evaluates again.  metrics.jsonl alone records the errors.
"""

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from modelpar.config import without_secrets
from modelpar.distributed import all_reduce_sum
from modelpar.errors import DivergedError, StoppedError
from modelpar.files import check_file_size, check_space, try_writing
from modelpar.images.augment import Augmentation
from modelpar.images.loader import Batch, TestLoader, TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.net.weights import check_state, of_layers
from modelpar.overrides import shell_word
from modelpar.progress import show
from modelpar.settings import TrainSettings
from modelpar.training import checkpoint, report
from modelpar.training.checkpoint import Checkpoint
from modelpar.training.consistency import StepCheck
from modelpar.training.debug import Debugging
from modelpar.training.engine import Learner, all_finite, compile_parts, evaluate
from modelpar.training.metrics import Errors, rank_of_label
from modelpar.training.monitor import Meter, Monitor
from modelpar.training.nonfinite import first_nonfinite
from modelpar.training.prepare import Prepared
from modelpar.training.readback import Launched, Readback
from modelpar.training.run_dir import written
from modelpar.training.saving import Checkpointer, num_bytes
from modelpar.training.schedule import Plateau
from modelpar.training.showing import Watch


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
            shuffle=recipe.shuffle if images.may_shuffle else "never",
        )
        workers = prepared.data.workers
        self.loader = TrainLoader(
            images.train,
            self.order,
            self.augmentation,
            mesh,
            crops=recipe.crops,
            workers=workers,
            resident=prepared.data.resident == "auto",
        )
        at_once = size // settings.accumulate  # the images that have to fit into memory
        self.tests = TestLoader(images.test, at_once, mesh, workers=workers)
        last, every, best = settings.keep_last, settings.keep_every, settings.keep_best
        self.checkpointer = Checkpointer(run_dir, mesh, last=last, every=every, best=best)
        self.meter, self.readback = Meter(self.learner.link, size), Readback(mesh)
        self.monitor: Monitor | None = None  # of rank 0
        self.debug = Debugging(settings.debug, run_dir, mesh.rank)
        shown = settings.monitor.tensorboard
        self.watch = Watch(
            self.learner.net, self.plan, mesh, images.test, self.augmentation, at_once, on=shown
        )
        self.step = 0
        self.evaluated = False

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
                shown, again = self.settings.monitor, self._evaluation_due(self.step)
                self.monitor = Monitor(self.run_dir, self.step, self.total, shown, repeats=again)
                self.monitor.describe(without_secrets(asdict(self.settings)))

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end; raises StoppedError if a signal asked to stop, and DivergedError."""
        began = time.perf_counter()
        self.meter.pause()
        if self.step and self._evaluation_due(self.step):
            self._evaluate()
        while self.step < self.total:
            self._epoch()
        found = self.debug.end(self.step)
        self._show_kernels(self.checkpointer.finish())
        if self.monitor:
            self.monitor.finish()
            seconds = time.perf_counter() - began
            report.ended(self.settings, self.prepared, self.run_dir, seconds)
            report.show_rows(found)

    def _epoch(self) -> None:
        """Train from the present step to the end of its epoch, or of the run."""
        epoch, first = divmod(self.step, len(self.order))
        rates = self.learner.schedule.rates(epoch)
        noise = self.learner.schedule.colour_noise(epoch)
        every = self.prepared.data.checkpoint_every
        for batch in self.debug.batches(self.loader, epoch, first, noise):
            if self.monitor and self.step == 0:
                classes = self.prepared.images.classes
                self.monitor.batch(batch, self.augmentation.mean, classes)
            stop = self._train_step(batch, epoch, rates)
            if self.step == self.total or (every and self.step % every == 0):
                self._save()
            if stop:
                self._save_and_stop(stop)
            if self._evaluation_due(self.step):
                self._evaluate()
            if self.step == self.total:
                return

    def _train_step(self, batch: Batch, epoch: int, rates: dict[str, float]) -> int:
        """Launch one step; return the signal that asked any rank to stop (0: none).

        If ranks disagree the step is not launched.  On a GPU its values are read later.
        """
        weights, saved = self.learner.optimizer.weights(), self.checkpointer.status()
        status = self.check.step(self.step + 1, batch, weights, saved)
        shows = self.watch.first and self._evaluation_due(self.step + 1)
        see = self.watch.see_gradients if shows else None
        loss = self.learner.step(batch, self.step, rates, see)
        values = [self.learner.good]
        # The last step tells readers of metrics.jsonl that its epoch was reached.
        if self.step % self.settings.log_every == 0 or self.step + 1 == self.total:
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
        if self.debug.learned(loss / replicas):
            self.total = self.step
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

    def _evaluation_due(self, step: int) -> bool:
        """Return whether an evaluation belongs to ``step``: every few epochs, and at the end."""
        every = len(self.order) * self.settings.data.evaluate_every
        return step >= self.total or (step > 0 and step % every == 0)

    def _evaluate(self) -> None:
        """Evaluate and record; raises StoppedError, with the step saved, and DivergedError."""
        self._read()
        if not self.evaluated:  # a test image that cannot be read would end the run now
            self._show_kernels(self.checkpointer.finish())
        self.evaluated = True
        ends = self.step >= self.total
        views = self.settings.views if ends else 1
        confusion = self.watch.counts() if ends else None
        errors = self._errors(self.learner.net, views, confusion)
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
        if self.monitor:
            early = self.settings.early_stopping * (self.total < self.prepared.steps)
            epochs = self.step // len(self.order)
            self.monitor.test(self.step, epochs, errors, views, averaged, early)
        seen = self.watch.result(ends=ends)
        if self.monitor:
            self.monitor.seen(seen, self.prepared.images.classes, self.step)
        self.meter.pause()

    def _errors(self, net: nn.Module, views: int, confusion: Tensor | None = None) -> Errors:
        batches, augmentation = self._test_batches(), self.augmentation
        groups = self.prepared.images.groups
        errors = evaluate(
            net, self.mesh, batches, augmentation, groups, views, confusion=confusion
        )
        if not math.isfinite(errors.loss):
            self._diverged(self.step, f"test loss is {errors.loss}")
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
            "names": list(self.prepared.images.classes),
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
            f"{self.step} of {self.total}; the same command with "
            f"{shell_word('run_dir', str(self.run_dir))}{resume} continues"
        )

    def _show_kernels(self, published: Path | None) -> None:
        """Show conv1's kernels of a step that has just been published, if one has."""
        if self.monitor and published is not None:
            with self.monitor.drawing():
                saved = checkpoint.open_step(published)
                self.monitor.kernels(checkpoint.read_conv1(saved), saved.step, self.plan.columns)
