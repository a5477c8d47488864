"""Split changes nothing: the pair computes what the whole net computes, to 1e-12 in float64."""

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional

from modelpar import AlexNet, merge, split
from modelpar.distributed import Mesh
from modelpar.groups import CrossingSettings
from modelpar.images.loader import Batch
from modelpar.net.plan import Plan, Recipe
from modelpar.settings import TrainSettings
from modelpar.training.engine import Learner, build

CLASSES = 10
SIZE = 64
BATCH = 4
STEPS = 20
RECIPES = ("paper", "code2012", "clean")
CROSSINGS = {"conv3", "fc6", "fc7", "fc8"}
RULES = ("label_smoothing", "clip", "ema")
SLOW = pytest.mark.slow


CPU = torch.device("cpu")


def batches(steps: int, images: int, device: torch.device = CPU) -> list[Batch]:
    source = torch.Generator().manual_seed(7)
    return [
        Batch(
            (torch.randn(images, 3, SIZE, SIZE, generator=source) * 60).to(device),
            torch.randint(0, CLASSES, (images,), generator=source).to(device),
            0.0,
        )
        for _ in range(steps)
    ]


def learner(mesh: Mesh, recipe: str | Recipe, how: dict[str, Any]) -> Learner:
    """Return what trains; ``how`` holds settings by name and switches of the plan."""
    how = dict(how)
    compiled = how.pop("compile", False)
    if compiled:
        torch.compiler.reset()  # torch compiles at most eight versions of a function
    channels_last = how.pop("channels_last", True)
    precision = how.pop("precision", "float64")
    cuda_graph = how.pop("cuda_graph", "auto")
    accumulate = how.pop("accumulate", 1)
    keys = ("overlap", "chunks", "dtype")
    crossing = CrossingSettings(**{key: how.pop(key) for key in keys if key in how})
    rules = {key: how.pop(key) for key in RULES if key in how}
    plan = Plan(replace(Recipe.named(recipe), **rules), CLASSES, SIZE, **how)
    settings = TrainSettings(
        crossing=crossing,
        epochs=91,
        batch_size=BATCH // mesh.replicas,
        seed=3,
        precision=precision,
        channels_last=channels_last,
        compile=compiled,
        cuda_graph=cuda_graph,
        accumulate=accumulate,
    )
    return Learner(plan, settings, mesh)


def outcome(mesh: Mesh, recipe: str | Recipe, steps: int, how: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's logits, gradients, and a trajectory of training with dropout."""
    trained = learner(mesh, recipe, how)
    net = trained.net
    rows = slice(mesh.replica * trained.batch_size, (mesh.replica + 1) * trained.batch_size)
    first = batches(1, BATCH, mesh.device)[0]
    net.eval()
    logits = net(first.images[rows])
    functional.cross_entropy(logits, first.labels[rows]).backward()
    gradients = {name: weight.grad.clone() for name, weight in net.named_parameters()}  # type: ignore[union-attr]
    trained.optimizer.zero_grad()
    losses = []
    for step, batch in enumerate(batches(steps, BATCH, mesh.device)):
        own = Batch(batch.images[rows], batch.labels[rows], 0.0)
        losses.append(float(trained.step(own, step, trained.schedule.rates(0))))
    averaged: dict[str, Any] = {}
    if trained.optimizer.averages:
        averaged = {"ema": trained.optimizer.averages}
        averaged["ema_logits"] = trained.averaged().eval()(first.images[rows]).detach()
    return averaged | {
        "logits": logits.detach(),
        "gradients": gradients,
        "losses": losses,
        "weights": trained.optimizer.weights(),
        "velocities": trained.optimizer.velocities(),
    }


@lru_cache(maxsize=1)  # many cases in a row compare with the same whole net
def whole_outcome(recipe: str, steps: int = STEPS, **how: Any) -> dict[str, Any]:
    return outcome(Mesh(CPU), recipe, steps, how)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.dtype == other.dtype == torch.float64
    return difference(one, other)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one.double() - other).norm() / other.norm().clamp(min=1e-300))


def assert_equal_states(
    parts: list[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]
) -> None:
    merged = merge(parts)
    assert merged.keys() == whole.keys()
    for key, value in whole.items():
        if float(value.norm()) < 1e-15:  # 0 but for rounding: a bias before a batch norm
            assert float(merged[key].norm()) < 1e-15, key
        else:
            assert relative(merged[key], value) < 1e-12, key


@pytest.mark.parametrize(
    ("recipe", "overlap"),
    [
        ("paper", True),
        ("code2012", True),
        pytest.param("code2012", False, marks=SLOW),
        ("clean", True),
    ],
)
def test_pair_equals_whole_net(pair: Ranks, recipe: str, *, overlap: bool) -> None:
    whole = whole_outcome(recipe)
    columns = pair.run(outcome, recipe, STEPS, {"overlap": overlap})
    for column in columns:
        assert relative(column["logits"], whole["logits"]) < 1e-12
        assert column["losses"] == pytest.approx(whole["losses"], rel=1e-12)
    for kind in ("gradients", "weights", "velocities"):
        assert_equal_states([column[kind] for column in columns], whole[kind])
    start = AlexNet.from_recipe(recipe, CLASSES, SIZE, seed=3).double().state_dict()
    moved = [key for key in start if relative(whole["weights"][key], start[key]) > 1e-3]
    assert "fc8.weight" in moved  # the trajectory is one


@pytest.mark.parametrize(
    "switches",
    [
        {"crossing_at": ("conv4", "fc6", "fc7")},
        {"crossing_at": ()},
        {"norm": "none", "activation": "tanh"},
        {"pool": "non_overlapping"},
        {"pool": "average", "dropout": 0.2},
        {"net": "conv6", "norm": "batch", "crossing_at": ("conv3", "conv6", "fc6", "fc7")},
        {
            "net": "drop_conv3",
            "norm": "within_channel",
            "conv4_dropout": 0.2,
            "crossing_at": ("conv4",),
        },
        {"net": "no_crossing", "norm": "first_only", "crossing_at": ()},
        {"net": "drop_conv4", "activation": "sigmoid"},
    ],
    ids=str,
)
def test_pair_equals_whole_net_with_switches(pair: Ranks, switches: dict[str, Any]) -> None:
    whole = whole_outcome("code2012", 3, **switches)
    columns = pair.run(outcome, "code2012", 3, switches)
    assert relative(columns[0]["logits"], whole["logits"]) < 1e-12
    for kind in ("gradients", "weights"):
        assert_equal_states([column[kind] for column in columns], whole[kind])


@pytest.mark.parametrize("precision", ["float64", pytest.param("bfloat16", marks=SLOW)])
def test_pair_that_accumulates_equals_whole_net_with_rules_of_today(
    pair: Ranks, precision: str
) -> None:
    """The whole net computes each batch at once, in float64."""
    rules = {"label_smoothing": 0.1, "clip": 0.1, "ema": 0.9, "conv4_dropout": 0.2}
    whole = whole_outcome("code2012", 3, **rules)
    parts = {"accumulate": 2, "precision": precision}
    columns = pair.run(outcome, "code2012", 3, {**rules, **parts})
    if precision == "bfloat16":
        assert columns[0]["losses"] == pytest.approx(whole["losses"], rel=3e-2)
        assert difference(columns[0]["ema_logits"], whole["ema_logits"]) < 3e-2
        assert columns[0]["ema"]["fc6.weight"].dtype == torch.float32
        return
    for column in columns:
        assert column["losses"] == pytest.approx(whole["losses"], rel=1e-12)
        assert relative(column["ema_logits"], whole["ema_logits"]) < 1e-12
    for kind in ("weights", "velocities", "ema"):
        assert_equal_states([column[kind] for column in columns], whole[kind])


@SLOW
@pytest.mark.parametrize("reads", ["rectified", "pooled"])
def test_pair_normalizes_across_the_seam_as_caffe_does(pair: Ranks, reads: str) -> None:
    recipe = replace(Recipe.named("caffe"), norm1_input=reads, norm2_input=reads)
    whole = outcome(Mesh(CPU), recipe, 3, {})
    columns = pair.run(outcome, recipe, 3, {"compile": True})
    for column in columns:
        assert relative(column["logits"], whole["logits"]) < 1e-12
    for kind in ("gradients", "weights"):
        assert_equal_states([column[kind] for column in columns], whole[kind])


FAST = [
    pytest.param(
        *how, marks=[] if how in {(True, True, True, 2), (False, False, False, 1)} else SLOW
    )
    for how in product((False, True), (False, True), (False, True), (1, 2))
]


@pytest.mark.parametrize(("compiled", "channels_last", "overlap", "chunks"), FAST)
def test_pair_equals_plain_whole_net_however_fast(
    pair: Ranks, *, compiled: bool, channels_last: bool, overlap: bool, chunks: int
) -> None:
    whole = whole_outcome("code2012", 3, channels_last=False)
    how = {"channels_last": channels_last, "overlap": overlap, "chunks": chunks}
    columns = pair.run(outcome, "code2012", 3, {**how, "compile": compiled})
    for column in columns:
        assert relative(column["logits"], whole["logits"]) < 1e-12
        assert column["losses"] == pytest.approx(whole["losses"], rel=1e-12)
    for kind in ("gradients", "weights", "velocities"):
        assert_equal_states([column[kind] for column in columns], whole[kind])


@pytest.mark.parametrize(
    ("precision", "dtype", "error"),
    [
        ("float32", None, 2e-6),
        ("float32", "float16", 1e-3),
        ("float32", "bfloat16", 1e-2),
        pytest.param("bfloat16", None, 3e-2, marks=SLOW),
    ],
)
def test_less_precision_is_off_by_its_rounding(
    pair: Ranks, precision: str, dtype: str | None, error: float
) -> None:
    whole = whole_outcome("code2012", 3)
    how = {"precision": precision, "dtype": dtype, "compile": True}
    columns = pair.run(outcome, "code2012", 3, how)
    assert torch.equal(columns[0]["logits"], columns[1]["logits"])
    assert columns[0]["losses"] == columns[1]["losses"]
    assert columns[0]["losses"] == pytest.approx(whole["losses"], rel=error)
    assert error / 100 < difference(columns[0]["logits"], whole["logits"]) < error
    gradients = merge([column["gradients"] for column in columns])
    for key, value in whole["gradients"].items():  # a sign that flips takes a whole unit along
        assert difference(gradients[key], value) < 10 * error, key
    weights = merge([column["weights"] for column in columns])
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_two_pairs_equal_whole_net_on_the_global_batch(two_pairs: Ranks) -> None:
    whole = whole_outcome("code2012", STEPS // 2)
    ranks = two_pairs.run(outcome, "code2012", STEPS // 2, {})
    for replica in (0, 1):
        columns = ranks[2 * replica : 2 * replica + 2]
        rows = slice(replica * BATCH // 2, (replica + 1) * BATCH // 2)
        assert relative(columns[0]["logits"], whole["logits"][rows]) < 1e-12
        for kind in ("weights", "velocities"):
            assert_equal_states([column[kind] for column in columns], whole[kind])
    means = [
        (one + other) / 2
        for one, other in zip(ranks[0]["losses"], ranks[2]["losses"], strict=True)
    ]
    assert means == pytest.approx(whole["losses"], rel=1e-12)


def counts(mesh: Mesh, size: int, classes: int) -> dict[str, Any]:
    """Bytes and swaps of one training step, and the collectives torch saw."""
    plan = Plan(Recipe.named("code2012"), classes, size)
    net = build(plan, mesh, TrainSettings(crossing=CrossingSettings(chunks=1)), seed=0)
    images = torch.randn(2, 3, size, size)
    # torch 2.11's CommDebugMode fails if a module runs several times, as the pool does.
    old = torch.__version__.startswith("2.11")
    with nullcontext() if old else CommDebugMode() as seen:
        functional.cross_entropy(net(images), torch.tensor([0, 1])).backward()
    return {
        "sent": {key: value // 2 for key, value in net.link.sent.items()},  # type: ignore[union-attr]
        "swaps": dict(net.link.swaps),  # type: ignore[union-attr]
        "collectives": seen.get_total_counts() if seen else 0,
    }


def test_bytes_a_step_are_the_budget_and_nothing_else_crosses(pair: Ranks) -> None:
    for counted in pair.run(counts, 224, 1000):
        sent = counted["sent"]  # an image, float32
        assert sent == {
            ("conv3", "forward"): 86_528,
            ("conv3", "backward"): 86_528,
            ("fc6", "forward"): 18_432,
            ("fc6", "backward"): 18_432,
            ("fc7", "forward"): 8_192,
            ("fc7", "backward"): 8_192,
            ("fc8", "forward"): 4_000,
        }
        assert sum(sent.values()) == 230_304
        assert counted["swaps"] == dict.fromkeys(sent, 1)
        assert {layer for layer, _ in sent} == CROSSINGS  # none in conv1, conv2, conv4, conv5
        assert counted["collectives"] == 0  # send and receive alone; no all-reduce, no gather


def start_weights(mesh: Mesh, recipe: str) -> dict[str, torch.Tensor]:
    plan = Plan(Recipe.named(recipe), 1000, 64)
    return build(plan, mesh, TrainSettings(), seed=11).state_dict()


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_start_from_the_slices_of_one(pair: Ranks, recipe: str) -> None:
    whole = AlexNet.from_recipe(recipe, image_size=64, seed=11).state_dict()
    for column, expected in zip(pair.run(start_weights, recipe), split(whole), strict=True):
        assert column.keys() == expected.keys()
        assert all(torch.equal(column[key], expected[key]) for key in expected)
