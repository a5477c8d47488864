"""A whole training: epochs, evaluations, checkpoints, and going on where one was stopped."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Final, NoReturn

import torch
from torch import Tensor

from modelpar import shutdown
from modelpar.analysis.activations import ActivationStats
from modelpar.analysis.neighbours import figure4, random_subset
from modelpar.config import without_secrets
from modelpar.distributed import Mesh, all_reduce_sum, first_complaint
from modelpar.errors import CheckpointError, DivergedError, StoppedError
from modelpar.images.augment import Augmentation, Statistics
from modelpar.images.loader import Batch, TestLoader, TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.net.alexnet import Column
from modelpar.net.plan import settings_of
from modelpar.net.weights import check_state
from modelpar.seeding import digest
from modelpar.settings import TrainSettings
from modelpar.training import checkpoint
from modelpar.training.consistency import StepCheck, signal_name
from modelpar.training.engine import Learner, all_finite, evaluate
from modelpar.training.metrics import Errors, rank_of_label
from modelpar.training.monitor import Meter, Monitor, image_grid, show
from modelpar.training.nonfinite import first_nonfinite
from modelpar.training.prepare import Prepared, chosen_data, last_error, resume_point
from modelpar.training.run_dir import locked, trajectory_changes, write_config
from modelpar.training.saver import Checkpointer, Retention

WATCHED: Final = 128  # test images of an evaluation whose activations are looked at: one batch
LOOKED_AT: Final = 512  # training images, for figure 4 at a run's end: a few seconds


def train(settings: TrainSettings, prepared: Prepared, mesh: Mesh, run_dir: Path) -> float:
    """Train in ``run_dir`` until epochs or steps are over; return the last top-1 error in %.

    Goes on from the run's newest checkpoint where there is one; a run that is over already is
    left as it is.  A collective of the whole mesh.
    """
    with shutdown.signals_noted() as request, locked(run_dir, mesh):
        start = resume_point(settings, prepared, run_dir)
        stats = _agreed_statistics(start, prepared, mesh)
        top1 = last_error(prepared, start)
        if start is not None and top1 is not None:
            if mesh.rank == 0:
                show(f"finished: {run_dir} is at step {start.step} of {prepared.steps}")
            return top1
        training = _Training(settings, prepared, stats, mesh, run_dir, StepCheck(mesh, request))
        if start is not None:
            training.resume(start)
        if mesh.rank == 0:
            for change in trajectory_changes(run_dir, asdict(settings)):
                show(f"modelpar: {run_dir} goes on with {change}: another trajectory")
        write_config(run_dir, asdict(settings), mesh)
        try:
            if mesh.rank == 0:
                training.open_monitor()
            return training.run()
        finally:
            training.close()


def _agreed_statistics(
    start: checkpoint.Checkpoint | None, prepared: Prepared, mesh: Mesh
) -> Statistics:
    """Return mean image and colours, the checkpoint's own where there is one.

    A collective of the whole mesh: raises CheckpointError, on every process alike, where they
    would not start from the same.
    """
    stats, complaint = prepared.statistics, ""
    try:
        if start is not None:
            stats = Statistics(**checkpoint.read_statistics(start))
    except CheckpointError as error:
        complaint = str(error)
    if complaint := first_complaint(complaint, mesh):
        raise CheckpointError(complaint)
    own = (start.digest if start else "none", digest([stats.mean, stats.std, stats.axes]))
    if len(set(mesh.gather_text(repr(own)))) > 1:
        raise CheckpointError(
            "the processes see different checkpoints or mean images; give them one disk to share, "
            "or one cache_dir"
        )
    return stats


class _Training:
    """The state of one run: what ``train`` holds between steps."""

    def __init__(
        self,
        settings: TrainSettings,
        prepared: Prepared,
        stats: Statistics,
        mesh: Mesh,
        run_dir: Path,
        watch: StepCheck,
    ) -> None:
        self.settings, self.mesh, self.run_dir, self.watch = settings, mesh, run_dir, watch
        images, plan = prepared.images, prepared.plan
        self.images, self.stats, self.plan = images, stats, plan
        data, device = chosen_data(settings.data, settings.model), mesh.device
        self.data = data
        workers = data.workers if settings.workers is None else settings.workers
        self.workers = workers
        recipe = plan.recipe
        if mesh.rank == 0 and settings.compile:
            show("modelpar: compiling; later starts on this machine reuse the result")
        self.learner = Learner.create(plan, settings, mesh, compiled=settings.compile)
        net = self.learner.net
        self.link = net.link if isinstance(net, Column) else None
        scaled = recipe.colour_noise == "added_and_scaled"
        self.lens = Augmentation(stats, plan.image_size, scaled=scaled, device=device)
        self.order = BatchOrder(
            len(images.train),
            settings.batch_size,
            settings.seed,
            replica=mesh.replica,
            replicas=mesh.replicas,
            shuffle=recipe.shuffle if images.shuffled else "never",
        )
        self.loader = TrainLoader(
            images.train, self.order, self.lens, device, crops=recipe.crops, workers=workers
        )
        self.tests = TestLoader(
            images.test,
            settings.batch_size,
            device,
            replica=mesh.replica,
            replicas=mesh.replicas,
            workers=workers,
        )
        self.total = prepared.steps
        every = settings.checkpoint_every
        self.save_every = data.checkpoint_every if every is None else every
        self.step = 0
        self.last = math.nan  # top-1 error in %
        self.tested = -1  # the step it was measured at
        self.untested = False  # stopped where an evaluation was due
        # Rank 0's word for all: hosts may differ, and what it shows takes both columns.
        self.shows = bool(mesh.gather_ints([int(settings.monitor.tensorboard)])[0][0])
        self.monitor: Monitor | None = None
        keep = Retention(settings.keep_last, settings.keep_every, best=settings.keep_best)
        self.saver = Checkpointer(run_dir / "checkpoints", mesh, keep)

    def open_monitor(self) -> None:
        """Check the disk and open what the run shows of itself: rank 0."""
        own = checkpoint.num_bytes(self._parts())
        checkpoint.check_space(self.run_dir, own * self.mesh.columns)
        self.monitor = Monitor(
            self.run_dir,
            self.step,
            self.total,
            tested=not self.untested,
            progress=self.settings.monitor.progress,
            tensorboard=self.settings.monitor.tensorboard,
        )

    def run(self) -> float:
        """Train to the end; return the last top-1 error in %.  Raises StoppedError."""
        if self.untested:
            asked = self._evaluate()
            self._save(last=True)
            if asked:
                self._stop(asked)
        while self.step < self.total:
            self._epoch()
        self._show_figure4()
        if self.monitor:
            self.monitor.say(
                f"{self.run_dir}: checkpoints, metrics.jsonl, conv1.png; "
                f"tensorboard --logdir {self.run_dir}"
            )
        return self.last

    def close(self) -> None:
        """End what the run shows of itself, and let a save under way finish."""
        self.saver.close()
        if self.monitor:
            self.monitor.close()

    def _epoch(self) -> None:
        """Train from where the run stands to the end of its epoch, or of the run."""
        epoch, start = divmod(self.step, len(self.order))
        rates = self.learner.schedule.rates(epoch)
        meter = Meter(self.link, self.settings.batch_size, self.mesh.device)
        noise = self.learner.schedule.colour_noise(epoch)
        for batch in self.loader.epoch(epoch, start, noise):
            if self.monitor and self.step == 0:
                self.monitor.images("batch/augmented", image_grid(batch.images), 0)
            loss, asked = self._learn(batch, rates)
            meter.add(batch)
            ends = self.step == self.total
            due = self._due()
            saves = ends or asked or bool(self.save_every and self.step % self.save_every == 0)
            logs = (self.step - 1) % self.settings.log_every == 0
            if logs:
                row = self._row(batch, loss, epoch, rates)
                if self.monitor:
                    shown = {name: rates[name] for name in self.learner.schedule.shown}
                    self.monitor.train(row | meter.take(), shown)
            if due or ends:
                asked = asked or self._evaluate()
                self.untested = bool(asked)
            if saves or self.untested:
                self._save(last=ends or bool(asked))
            if asked:
                self._stop(asked)
            if due or saves:
                meter.pause()
            if ends:
                return

    def _learn(self, batch: Batch, rates: dict[str, float]) -> tuple[Tensor, int]:
        """Do one step; return its loss, and the signal that asked any process to stop.

        What the processes do not agree on, or what is not finite, changes no weight.
        """
        loss = self.learner.gradients(batch, self.step)
        told = self.watch.agree(
            self.step + 1,
            batch,
            self.learner.optimizer.weights(),
            finite=self.learner.finite(loss),
            failed=self.saver.failed(),
        )
        if not told.finite:
            self._diverged(self.step + 1, first_nonfinite(self.learner, batch, self.step, loss))
        self.learner.update(rates)
        self.step += 1
        self._show(self.saver.end() if told.failed else self.saver.take())
        return loss, told.asked

    def _due(self) -> bool:
        """Whether an evaluation is due by the epochs done, not because the run ends."""
        epochs, rest = divmod(self.step, len(self.order))
        return rest == 0 and epochs % self.settings.data.evaluate_every == 0

    def _stop(self, asked: int) -> NoReturn:
        how = f"run_dir={self.run_dir}"
        if self.settings.resume != "auto":
            how += " resume=auto"
        raise StoppedError(
            f"{self.run_dir}: asked to stop ({signal_name(asked)}), saved at step {self.step} of "
            f"{self.total}; the same command with {how} goes on"
        )

    def _row(
        self, batch: Batch, loss: Tensor, epoch: int, rates: dict[str, float]
    ) -> dict[str, float]:
        """Return step, epoch, loss and top-1 error in % over all replicas, and rate.

        The error is that of this step's batch as it was trained on: augmented, with dropout.
        """
        mesh = self.mesh
        wrong = (rank_of_label(self.learner.last_logits, batch.labels) > 0).sum()
        both = all_reduce_sum(torch.stack([loss.double(), wrong.double()]), mesh.replica_group)
        total, mistakes = both.tolist()
        return {
            "step": self.step,
            "epoch": epoch,
            "loss": total / mesh.replicas,
            "top1": 100 * mistakes / (len(batch.labels) * mesh.replicas),
            "lr": rates[self.learner.schedule.shown[1]],
        }

    def _diverged(self, step: int, what: str) -> NoReturn:
        """Raise DivergedError, the same on every process."""
        saved = checkpoint.steps(self.run_dir / "checkpoints")
        kept = "the last checkpoint is good, but the same rate diverges again: "
        raise DivergedError(
            f"step {step}: {what}; {kept if saved else ''}start a new run_dir with a "
            "lower recipe.lr"
        )

    def _evaluate(self) -> int:
        """Evaluate, record, tell the schedule; return the signal that broke it off, else 0."""
        views = self.settings.views if self.step >= self.total else 1
        due = self._due()  # never at an end that a longer run would not have
        try:
            errors = central = self._errors(1) if due or views == 1 else None
            if views > 1:
                errors = self._errors(views, watched=central is None)
        except _BrokenOffError as broken:
            return broken.asked
        assert errors is not None  # noqa: S101 - by one view or by several
        self.last, self.tested, self.untested = errors.top1, self.step, False
        if self.monitor:
            self.monitor.test(self.step, errors, self.plan.num_classes, views)
        if due and central is not None:
            epoch = self.step // len(self.order) - 1
            self.learner.schedule.plateau.observe(epoch, central.top1)
        return 0

    def _errors(self, views: int, *, watched: bool = True) -> Errors:
        """Return the errors over the test images; raises DivergedError, _BrokenOffError.

        ``watched``: TensorBoard shows what the layers of replica 0 gave meanwhile.
        """
        net, mesh = self.learner.net, self.mesh
        seen = None
        if watched and self.shows and mesh.replica == 0:
            seen = ActivationStats(net, self.plan.columns, mesh, -(-WATCHED // len(self.tests)))
        with seen or nullcontext():
            errors = evaluate(
                net,
                mesh,
                self._watched_tests(),
                self.lens,
                views=views,
                precision=self.settings.precision,
            )
        if not math.isfinite(errors.loss):
            self._diverged(self.step, f"the test loss is {errors.loss}")
        activity = seen.result() if seen else []
        if self.monitor:
            self.monitor.activity(activity, self.step)
        return errors

    def _watched_tests(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test batches; an evaluation may take longer than a scheduler waits."""
        for number, batch in enumerate(self.tests):
            asked = self.watch.asked() if number < self.tests.common else 0
            if asked:
                raise _BrokenOffError(asked)
            yield batch

    def _show_figure4(self) -> None:
        """Show figure 4 in TensorBoard as the run ends; a collective of replica 0's pair."""
        if not self.shows or self.mesh.replica:
            return
        rows = random_subset(len(self.images.train), LOOKED_AT, self.settings.seed)
        how = (self.settings.batch_size, self.workers)
        found = figure4(self.learner.net, self.mesh, self.images, self.lens, rows, *how)
        if self.monitor and found:
            self.monitor.figure4(found, self.images.classes, self.step)

    def _parts(self) -> dict[checkpoint.Kind, dict[str, Tensor]]:
        return {
            "weights": self.learner.state(),
            "velocities": self.learner.optimizer.velocities(),
        }

    def _save(self, *, last: bool = False) -> None:
        """Start a checkpoint of this step; the ``last`` one is waited for."""
        finite = all_finite(list(self._parts()["weights"].values()))
        if first_complaint("" if finite else "not finite", self.mesh):
            self._diverged(self.step, "a weight is not finite after its update")
        self._show(self.saver.end())
        if self.monitor:
            self.monitor.flush()
        self.saver.start(
            self._parts(),
            {"mean": self.stats.mean, "std": self.stats.std, "axes": self.stats.axes},
            {
                "step": self.step,
                "epoch": self.step // len(self.order),
                "schedule": self.learner.schedule.state(),
                "top1": None if math.isnan(self.last) else self.last,
                "tested": self.tested,
                "untested": self.untested,
                "seed": self.settings.seed,
                "images_a_step": self.settings.batch_size * self.mesh.replicas,
                "precision": self.settings.precision,
                "plan": settings_of(self.plan),
                "data": without_secrets(asdict(self.data)),
                "fingerprint": self.images.fingerprint,
            },
        )
        if last:
            self._show(self.saver.end())

    def _show(self, folder: Path | None) -> None:
        """Show the kernels of a step that was published, if one was."""
        if self.monitor and folder is not None:
            saved = checkpoint.open_step(folder)
            self.monitor.kernels(checkpoint.read_conv1(saved), saved.step, self.plan.columns)

    def resume(self, start: checkpoint.Checkpoint) -> None:
        """Take up a checkpoint; nothing changes before all ranks have read theirs, and it fits.

        Raises CheckpointError, on every process alike.
        """
        column = self.mesh.column if self.mesh.pair is not None else None
        weights, velocities = dict[str, Tensor](), dict[str, Tensor]()
        complaint = ""
        try:
            weights = checkpoint.read_part(start, "weights", column)
            velocities = checkpoint.read_part(start, "velocities", column)
            check_state(self.learner.net, weights, str(start.folder))
            check_state(self.learner.net, velocities, f"{start.folder}, velocities", learnt=True)
        except CheckpointError as error:
            complaint = str(error)
        if complaint := first_complaint(complaint, self.mesh):
            raise CheckpointError(complaint)
        self.learner.load(weights, velocities)
        self.learner.schedule.load(start.manifest["schedule"])
        self.step = start.step
        self.tested = int(start.manifest.get("tested", -1))
        top1 = start.manifest["top1"]
        self.last = math.nan if top1 is None else float(top1)
        over = self.step >= self.total and self.tested != self.step  # an evaluation ends each run
        self.untested = over or bool(start.manifest.get("untested"))


class _BrokenOffError(Exception):
    """An evaluation was left because some process was asked to stop."""

    def __init__(self, asked: int) -> None:
        self.asked = asked
