"""Losses along a line leave the network as found; the vertex is that of the parabola."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nsgd.curvature.vectors import flatten
from nsgd.trajectory.line import losses_along, vertex


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def network(request):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3)).to(request.param)
    x, y = torch.randn(20, 4).to(request.param), torch.randint(0, 3, (20,))
    return net, lambda: F.cross_entropy(net(x), y)


def state(net):
    tensors = {name: value.clone() for name, value in net.state_dict().items()}
    return tensors, torch.get_rng_state(), [m.training for m in net.modules()]


def same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert torch.equal(one[1], other[1])
    assert one[2] == other[2]


def test_losses_are_those_of_a_network_that_was_moved(network):
    net, loss = network
    params = list(net.parameters())
    direction = torch.randn(sum(p.numel() for p in params))
    before, rng = state(net), torch.get_rng_state()
    found = losses_along(loss, params, direction, [0.0, 0.5, -2.0, 0.0])
    same(state(net), before)
    assert all(p.grad is None for p in params)
    assert found[0] == found[3]  # the same masks
    for step, value in zip((0.0, 0.5, -2.0), found[:3], strict=True):
        torch.set_rng_state(rng)
        with torch.no_grad():
            origin = flatten(params, params)
            nn.utils.vector_to_parameters((origin + step * direction).to(params[0].dtype), params)
            expected = loss().item()
            nn.utils.vector_to_parameters(origin.to(params[0].dtype), params)
        assert value.item() == pytest.approx(expected, rel=1e-6)


def test_an_error_leaves_everything_as_found(network):
    net, loss = network
    before, calls = state(net), []

    def failing():
        calls.append(loss())
        if len(calls) == 2:
            raise ArithmeticError
        return calls[-1]

    with pytest.raises(ArithmeticError):
        losses_along(failing, net.parameters(), torch.ones(sum(p.numel() for p in net.parameters())), [1.0, 2.0])
    same(state(net), before)


def test_a_direction_that_does_not_fit_is_refused(network):
    with pytest.raises(ValueError, match=r"direction of shape \(63,\), one entry a parameter, got \(5,\)"):
        losses_along(network[1], network[0].parameters(), torch.ones(5), [1.0])


@pytest.mark.parametrize("best", [-0.7, 0.0, 0.31, 1.0, 1.6])
@pytest.mark.parametrize("curvature", [1e-3, 4.0, 1e4])
def test_the_vertex_of_a_parabola_is_exact(best, curvature):
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    position, value = vertex(x, 2.5 + curvature / 2 * (x - best) ** 2)
    assert position == pytest.approx(best, abs=1e-8)
    assert value == pytest.approx(2.5, abs=1e-8)


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.0], [1.0, 2.0, 2.5, 2.0], [1.0, 1.0, 1.0]])
def test_where_the_three_lowest_are_not_convex_it_is_the_lowest_point(losses):
    x = torch.arange(len(losses), dtype=torch.float64)
    y = torch.tensor(losses, dtype=torch.float64)
    assert vertex(x, y) == (float(x[y.argmin()]), min(losses))


@pytest.mark.parametrize("shapes", [(2, 2), (4, 3)])
def test_too_few_points_are_refused(shapes):
    with pytest.raises(ValueError, match="three points or more"):
        vertex(*(torch.ones(n) for n in shapes))
