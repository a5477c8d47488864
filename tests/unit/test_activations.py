"""Activation statistics: over whole batches or parts of them, without changing the net."""

import pytest
import torch

from modelpar import AlexNet
from modelpar.analysis.activations import ActivationStats
from modelpar.distributed import Mesh

MESH = Mesh(torch.device("cpu"))


def net_of(activation: str = "relu", **switches: object) -> AlexNet:
    made = AlexNet.from_recipe("code2012", 10, 64, seed=0, activation=activation, **switches)
    return made.eval()


@torch.no_grad()
def test_statistics_equal_those_of_torch_and_the_net_is_unchanged() -> None:
    net, images = net_of(), 60 * torch.randn(6, 3, 64, 64)
    net.fc7.weight[5] = 0  # a dead unit
    net.fc7.bias[5] = -1
    responses: list[torch.Tensor] = []
    handle = net.fc7.register_forward_hook(lambda *call: responses.append(call[2]))
    plain = net(images)
    handle.remove()
    with ActivationStats(net, 2, MESH) as stats:
        assert torch.equal(net(images), plain)
    assert torch.equal(net(images), plain)  # the hooks are gone
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())
    rows = {(row.layer, row.column): row for row in stats.result()}
    assert len(rows) == 7 * 2 + 1
    for column, units in enumerate(torch.relu(responses[0]).chunk(2, 1)):
        row = rows["fc7", column]
        assert row.mean == pytest.approx(float(units.mean()), rel=1e-5)
        assert row.std == pytest.approx(float(units.std(correction=0)), rel=1e-5)
        assert row.zeros == pytest.approx(float((units == 0).float().mean()))
        assert row.dead == pytest.approx(float((units == 0).all(0).float().mean()))
    assert rows["fc7", 0].dead >= 1 / 2048
    assert rows["logits", None].mean == pytest.approx(float(plain.mean()), rel=1e-5)
    assert rows["logits", None].std == pytest.approx(float(plain.std(correction=0)), rel=1e-5)


@torch.no_grad()
def test_statistics_of_parts_are_those_of_all_images() -> None:
    net, images = net_of(), 60 * torch.randn(4, 3, 64, 64)
    with ActivationStats(net, 2, MESH) as parts:
        net(images[:3])
        net(images[3:])
    with ActivationStats(net, 2, MESH) as together:
        net(images)
    for one, other in zip(parts.result(), together.result(), strict=True):
        assert one.mean == pytest.approx(other.mean, rel=1e-5)
        assert one.dead == other.dead


@torch.no_grad()
def test_net_of_one_column_with_tanh_has_statistics_too() -> None:
    net, images = net_of("tanh", net="one_column"), 60 * torch.randn(2, 3, 64, 64)
    with ActivationStats(net, 1, MESH) as stats:
        net(images)
    rows = stats.result()
    assert [row.column for row in rows] == [0] * 7 + [None]
    assert all(abs(row.mean) <= 1 for row in rows if row.layer != "logits")
