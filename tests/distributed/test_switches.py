"""Training rules that 2012 did not have: each does what its hand-made form does."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn import functional

from modelpar import config
from modelpar.distributed import Mesh
from modelpar.errors import SettingsError
from modelpar.images.loader import Batch
from modelpar.net.plan import Plan, Recipe
from modelpar.settings import TrainSettings
from modelpar.training import prepare
from modelpar.training.engine import Learner

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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["accumulate=3"], "accumulate=3: batch_size=128 cannot be cut into 3 equal parts"),
        (["cuda_graph=on", "accumulate=2"], "cuda_graph=on: not tested with accumulate"),
        (["cuda_graph=on", "recipe.clip=1"], "cuda_graph=on: not tested with recipe.clip"),
    ],
)
def test_what_was_not_tested_together_is_refused(words: list[str], line: str) -> None:
    with pytest.raises(SettingsError) as error:
        config.read("train", words)
    assert str(error.value).startswith(line)


def test_parts_of_a_batch_are_not_normalized_alone() -> None:
    settings = config.read("train", ["model.norm=batch", "accumulate=2"])
    with pytest.raises(SettingsError, match=r"model.norm=batch: .*; use accumulate=1"):
        prepare.prepare(settings)
