"""Training rules that 2012 did not have: each does what its hand-made form does."""

from typing import Any

import torch
from torch.nn import functional

from modelpar.distributed import Mesh
from modelpar.images.loader import Batch
from modelpar.net.plan import Plan, Recipe
from modelpar.settings import TrainSettings
from modelpar.training.engine import Learner

CLASSES = 10
BATCH = 4
PIXELS = 6  # of the crops of the smallest net
ALONE = Mesh(torch.device("cpu"))


def batches(steps: int) -> list[Batch]:
    source = torch.Generator().manual_seed(7)
    shape = (BATCH, 3, PIXELS, PIXELS)
    return [
        Batch(
            torch.randn(shape, generator=source) * 60,
            torch.randint(0, CLASSES, (BATCH,), generator=source),
            0.0,
        )
        for _ in range(steps)
    ]


def small(settings: dict[str, Any] | None = None, **rules: Any) -> Learner:
    """Return what trains the smallest net in float64, with more settings and rules."""
    recipe = Recipe(**{**vars(Recipe.named("paper")), **rules})
    plan = Plan(recipe, CLASSES, PIXELS, net="four_layer", norm="none", crossing_at=(), dropout=0)
    given = {"epochs": 91, "batch_size": BATCH, "precision": "float64", "compile": False}
    return Learner(plan, TrainSettings(**{**given, **(settings or {})}), ALONE)


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
