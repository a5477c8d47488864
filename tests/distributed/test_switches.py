"""Training rules that 2012 did not have: each does what its hand-made form does."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import Ranks
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn import functional

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, SettingsError
from modelpar.groups import DataSettings
from modelpar.images.loader import Batch
from modelpar.interchange import exports
from modelpar.net.plan import Plan, Recipe
from modelpar.schemas import ExportSettings
from modelpar.settings import EvaluateSettings, TrainSettings
from modelpar.studies import runs
from modelpar.training import evaluation, prepare, runner, trainer
from modelpar.training.checkpoint import newest, open_step, read_part, read_tensors
from modelpar.training.engine import Learner
from modelpar.training.metrics import Errors, read_rows
from modelpar.training.trained import find

CLASSES = 10
BATCH = 4
PIXELS = 6  # of the crops of the smallest net
ALONE = Mesh(torch.device("cpu"))


def batches(steps: int, replica: int = 0, replicas: int = 1) -> list[Batch]:
    """Return this replica's part of each batch."""
    source = torch.Generator().manual_seed(7)
    shape = (BATCH, 3, PIXELS, PIXELS)
    rows = slice(replica * BATCH // replicas, (replica + 1) * BATCH // replicas)
    whole = [
        (
            torch.randn(shape, generator=source) * 60,
            torch.randint(0, CLASSES, (BATCH,), generator=source),
        )
        for _ in range(steps)
    ]
    return [Batch(images[rows], labels[rows], 0.0) for images, labels in whole]


def small(settings: dict[str, Any] | None = None, mesh: Mesh = ALONE, **rules: Any) -> Learner:
    """Return what trains the smallest net in float64, with more settings and rules."""
    recipe = Recipe(**{**vars(Recipe.named("paper")), **rules})
    plan = Plan(recipe, CLASSES, PIXELS, net="four_layer", norm="none", crossing_at=(), dropout=0)
    given = {
        "epochs": 91,
        "batch_size": BATCH // mesh.replicas,
        "precision": "float64",
        "compile": False,
    }
    return Learner(plan, TrainSettings(**{**given, **(settings or {})}), mesh)


def test_label_smoothing_spreads_a_share_of_the_target() -> None:
    (batch,) = batches(1)
    smoothed = small(label_smoothing=0.2)
    loss = smoothed.gradients(batch, 0)
    logs = functional.log_softmax(smoothed.last_logits, 1)
    own = -logs.gather(1, batch.labels[:, None]).mean()
    assert torch.allclose(loss, 0.8 * own - 0.2 * logs.mean(), rtol=1e-12)


def test_clipping_scales_the_gradients_to_the_norm() -> None:
    batch, after = batches(1)[0], dict[float, Any]()
    for clip in (0.0, 1e-3, 1e6):
        trained = small(clip=clip)
        trained.step(batch, 0, trained.schedule.rates(0))
        after[clip] = trained.optimizer.velocities()
    plain = small(weight_decay=0.0)
    plain.gradients(batch, 0)
    grads = {name: weight.grad for name, weight in plain.net.named_parameters()}
    norm = torch.cat([grad.flatten() for grad in grads.values() if grad is not None]).norm()
    assert norm > 0.1
    start = {name: weight.detach() for name, weight in plain.net.named_parameters()}
    decays = {group["name"]: group["decay"] for group in small().optimizer.param_groups}
    for name, grad in grads.items():
        assert grad is not None
        assert torch.equal(after[1e6][name], after[0.0][name]), name
        expected = -0.01 * (
            grad * 1e-3 / norm + decays[name] * start[name]
        )  # decay is not clipped
        assert (after[1e-3][name] - expected).norm() < 1e-5 * expected.norm(), name


def test_a_norm_that_overflows_changes_no_weight() -> None:
    trained = small({"precision": "float32"}, clip=1.0)
    before = {name: weight.clone() for name, weight in trained.optimizer.weights().items()}
    for weight in trained.net.parameters():
        weight.register_hook(lambda grad: grad.fill_(1e30))  # finite, and its square is not
    trained.step(batches(1)[0], 0, trained.schedule.rates(0))
    assert not trained.good
    for name, weight in trained.optimizer.weights().items():
        assert torch.equal(weight, before[name])


def trajectory(mesh: Mesh, settings: dict[str, Any], rules: dict[str, float]) -> dict[str, Any]:
    """Return what a rank has after three steps."""
    trained, losses, averaged = small(settings, mesh, **rules), list[float](), list[int]()

    def hook(group: Any, bucket: GradBucket) -> Future[torch.Tensor]:
        averaged.append(bucket.index())
        return allreduce_hook(group, bucket)

    if mesh.replicas > 1:
        trained.replicated.register_comm_hook(mesh.replica_group, hook)  # type: ignore[operator]
    for step, batch in enumerate(batches(3, mesh.replica, mesh.replicas)):
        losses.append(float(trained.step(batch, step, trained.schedule.rates(0))))
        assert trained.last_logits.shape == (BATCH // mesh.replicas, CLASSES)
    return {"losses": losses, "averaged": averaged, **trained.state()}


def assert_equal(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).norm() <= tolerance * other[name].norm(), name


def test_accumulated_parts_are_one_batch() -> None:
    whole = trajectory(ALONE, {}, {})
    for parts in (2, 4):
        found = trajectory(ALONE, {"accumulate": parts}, {})
        assert found["losses"] == pytest.approx(whole["losses"], rel=1e-12)
        assert_equal(found["weights"], whole["weights"])
        assert_equal(found["velocities"], whole["velocities"])


def test_replicas_that_accumulate_and_clip_equal_one_process(two_replicas: Ranks) -> None:
    rules = {"clip": 0.1, "label_smoothing": 0.1}
    whole = trajectory(ALONE, {}, rules)
    once, _ = two_replicas.run(trajectory, {}, rules)
    one, other = two_replicas.run(trajectory, {"accumulate": 2}, rules)
    assert len(one["averaged"]) == len(once["averaged"])  # once in a step
    means = [sum(both) / 2 for both in zip(one["losses"], other["losses"], strict=True)]
    assert means == pytest.approx(whole["losses"], rel=1e-12)
    for rank in (one, other):
        assert_equal(rank["weights"], whole["weights"])
        assert_equal(rank["velocities"], whole["velocities"])


def run(words: list[str], run_dir: Path, *more: str) -> list[dict[str, Any]]:
    """Train in ``run_dir``; return the rows of its evaluations."""
    settings = config.read("train", [*words, *more])
    runner.train(settings, prepare.prepare(settings), ALONE, run_dir)
    return [row for row in read_rows(run_dir) if row["kind"] == "test"]


def small_run(images: Path) -> list[str]:
    """Return the settings of a run with five steps an epoch."""
    net = ["model.net=four_layer", "model.norm=none", "model.image_size=8", "recipe=paper"]
    data = ["data=imagefolder", f"data.root={images}", "workers=0", "batch_size=8", "columns=1"]
    quiet = ["compile=false", "monitor.progress=false", "monitor.tensorboard=false"]
    return [*net, *data, *quiet]


class Stopped(NamedTuple):
    """A run with all rules that was stopped at step 3 and continued, and one that was not."""

    once: Path
    often: Path
    rows: list[dict[str, Any]]  # of the evaluations of the first


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    rules = ["recipe.label_smoothing=0.1", "recipe.clip=0.1", "recipe.ema=0.9", "accumulate=2"]
    words, place = [*small_run(images), *rules, "epochs=2"], tmp_path_factory.mktemp("rules")
    once, often = place / "once", place / "often"
    rows = run(words, once)
    run(words, often, "steps=3")
    assert run(words, often)[1:] == rows  # the first one is of the end at step 3
    return Stopped(once, often, rows)


def test_run_with_all_rules_resumes_bit_for_bit(stopped: Stopped) -> None:
    assert [row["step"] for row in stopped.rows] == [5, 10]
    assert all(row["ema_loss"] != row["loss"] for row in stopped.rows)
    ends = [newest(stopped.once), newest(stopped.often)]
    for kind in ("weights", "velocities", "ema"):
        one, other = (read_part(end, kind, None) for end in ends)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), kind


def test_average_of_a_checkpoint_is_evaluated_and_exported(
    stopped: Stopped, tmp_path: Path
) -> None:
    exported = tmp_path / "net.safetensors"
    exports.export(ExportSettings(str(stopped.once), ema=True, out=str(exported)))
    assert find(str(exported)).record["errors"] is None  # those of the run are of its weights
    settings = EvaluateSettings(columns=1, batch_size=8, data=DataSettings("", None))
    for path, ema in ((stopped.once, True), (exported, False)):
        settings.checkpoint, settings.ema = str(path), ema
        found = evaluation.evaluate_checkpoint(settings, evaluation.prepare(settings), ALONE)
        assert found.members[0].loss == pytest.approx(stopped.rows[-1]["ema_loss"], rel=1e-6)
    with pytest.raises(CheckpointError, match="has no moving average of the weights; use ema="):
        exports.export(
            ExportSettings(str(exported), ema=True, out=str(tmp_path / "a.safetensors"))
        )


@pytest.mark.parametrize("ema", [False, True])
def test_export_of_several_steps_has_their_mean(
    stopped: Stopped, tmp_path: Path, *, ema: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [stopped.often / "checkpoints" / f"step-{step:08d}" for step in (3, 10)]
    words = [f"checkpoint=[{steps[1]},{steps[0]}]", f"ema={ema}"]
    exports.export(config.read("export", [*words, f"out={tmp_path / 'mean.safetensors'}"]))
    assert "mean of 2 checkpoints" in capsys.readouterr().out
    parts = [read_part(open_step(step), "ema" if ema else "weights", None) for step in steps]
    mean = read_tensors(tmp_path / "mean.safetensors")
    assert mean.keys() == parts[0].keys()
    for name, value in mean.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, ((parts[0][name].double() + parts[1][name]) / 2).float())
    found = find(str(tmp_path / "mean.safetensors"))
    assert found.step == 10
    assert found.record["errors"] is None  # those of a step are not those of the mean
    assert found.record["made"].endswith("mean of 2 checkpoints")


def test_only_steps_of_one_training_are_averaged(stopped: Stopped) -> None:
    one = find(str(stopped.once))
    early = find(str(stopped.often / "checkpoints" / "step-00000003"))
    for other, line in (
        (one, "step 10 is given twice"),
        (replace(early, seed=1), "differs in its seed from"),
        (replace(early, plan=replace(early.plan, activation="tanh")), "differs in its net from"),
    ):
        with pytest.raises(SettingsError, match=f"^checkpoint={other.path}: {line}"):
            exports.mean_weights([one, other])
    batch = [
        replace(each, plan=Plan(Recipe.named("paper"), norm="batch")) for each in (one, early)
    ]
    with pytest.raises(SettingsError, match=r"statistics than those of model.norm=batch; use one"):
        exports.mean_weights(batch)


def test_run_ends_after_evaluations_without_a_better_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top1 = {5: 50.0, 10: 40.0, 12: 30.0, 15: 41.0, 20: 40.0, 25: 45.0}

    def errors(self: trainer.Trainer, _net: torch.nn.Module, views: int, *_: object) -> Errors:
        return Errors(top1[self.step] - (views > 1), 1.0, 1.0, 10, 1.0)

    monkeypatch.setattr(trainer.Trainer, "_errors", errors)
    words = [*small_run(images), "epochs=6", "views=10"]
    hasty, often = tmp_path / "hasty", tmp_path / "often"
    rows = run(words, hasty, "early_stopping=2")
    found = [(row["step"], row["views"], row["top1"], row.get("early_stopping")) for row in rows]
    expected = [(5, 1, 50, None), (10, 1, 40, None), (15, 1, 41, None), (20, 10, 39, 2)]
    assert found == expected
    run(words, often, "early_stopping=2", "steps=12")  # this end is no evaluation that counts
    assert [row for row in run(words, often, "early_stopping=2") if row["step"] != 12] == rows
    ends = [newest(folder) for folder in (hasty, often)]
    assert [end.step for end in ends if end is not None] == [20, 20]
    saved = [read_part(end, "weights", None) for end in ends if end is not None]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    before = (hasty / "metrics.jsonl").read_text()
    assert run(words, hasty, "early_stopping=2") == rows  # finished
    assert (hasty / "metrics.jsonl").read_text() == before
    assert runs.read(hasty).finished
    longer = run(words, hasty, "early_stopping=3")
    found = [(row["step"], row["views"], row.get("early_stopping")) for row in longer]
    assert found == [*((step, 1, None) for step in (5, 10, 15, 20)), (25, 10, 3)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["accumulate=3"], "accumulate=3: batch_size=128 cannot be cut into 3 equal parts"),
        (["cuda_graph=on", "accumulate=2"], "cuda_graph=on: records no steps with accumulate"),
        (["cuda_graph=on", "replicas=2"], "cuda_graph=on: records no steps with replicas"),
        (["cuda_graph=on", "recipe.clip=1"], "cuda_graph=on: records no steps with recipe.clip"),
        (["cuda_graph=on", "recipe.ema=0.9"], "cuda_graph=on: records no steps with recipe.ema"),
        (["cuda_graph=on", "compile=false"], "cuda_graph=on: records no steps with compile=false"),
        (["cuda_graph=on", "precision=float64"], "cuda_graph=on: records no steps with precision"),
        (["model.norm=batch", "accumulate=2"], "model.norm=batch: each part of a batch would be"),
        (["model.norm=batch", "recipe.ema=0.9"], "recipe.ema=0.9: averaged weights would need"),
    ],
)
def test_what_was_not_tested_together_is_refused(words: list[str], line: str) -> None:
    with pytest.raises(SettingsError) as error:
        prepare.prepare(config.read("train", words))
    assert str(error.value).startswith(line)


def test_moving_average_is_made_of_the_weights_of_each_step() -> None:
    trained = small(ema=0.75)
    expected = {name: weight.clone() for name, weight in trained.optimizer.weights().items()}
    for step, batch in enumerate(batches(3)):
        trained.step(batch, step, trained.schedule.rates(0))
        for name, weight in trained.optimizer.weights().items():
            expected[name] = 0.75 * expected[name] + 0.25 * weight
    assert_equal(trained.state()["ema"], expected)
    (batch,) = batches(1)
    own = trained.net.eval()(batch.images)
    other = trained.averaged()(batch.images)
    assert torch.equal(trained.net(batch.images), own)
    trained.load(expected, trained.optimizer.velocities(), expected)
    assert torch.allclose(trained.net(batch.images), other, rtol=1e-12)
    assert not torch.allclose(own, other, rtol=1e-3)
    start = {name: 2 * value for name, value in expected.items()}
    trained.load(start, trained.optimizer.velocities())  # as init.checkpoint does
    assert_equal(trained.state()["ema"], start, tolerance=0.0)


def test_bad_step_does_not_move_the_average() -> None:
    trained = small(ema=0.75)
    before = {name: value.clone() for name, value in trained.state()["ema"].items()}
    trained.step(batches(1)[0], 0, trained.schedule.rates(0))
    after = {name: value.clone() for name, value in trained.state()["ema"].items()}
    assert not torch.equal(after["fc10.weight"], before["fc10.weight"])
    batch = batches(1)[0]
    batch.images[0, 0, 0, 0] = torch.nan
    for step in (1, 2):
        trained.step(batch, step, trained.schedule.rates(0))
        assert_equal(trained.state()["ema"], after, tolerance=0.0)
