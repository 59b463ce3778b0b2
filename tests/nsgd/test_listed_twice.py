"""A parameter that is listed twice is counted once, as one that two modules share is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from nsgd import NSGD, damp, sample_losses, top_eigenpairs
from nsgd.curvature.hessian import loss_hessian
from nsgd.directions.samples import gradient_moment
from nsgd.trajectory.line import losses_along
from nsgd.trajectory.sharpness import batch_sharpness, random_direction

# torch's own warning for a group with duplicates
pytestmark = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")


@pytest.fixture
def tied():
    """Two layers of one weight, with samples; the Hessian of the loss by an independent route."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(4, 4, generator=generator))
    x = torch.randn(32, 4, generator=generator, dtype=torch.float64)

    def loss_at(weight):
        return ((x @ weight.T).tanh() @ weight.T - 1).square().mean()

    weight = model[0].weight
    hessian = torch.autograd.functional.hessian(loss_at, weight.detach()).reshape(16, 16)
    return model, weight, x, torch.linalg.eigvalsh(hessian).flip(0)


def loss_of(model, x):
    return (model(x) - 1).square().mean()


def test_eigenpairs_and_products_are_those_of_the_one_parameter(tied):
    model, weight, x, values = tied
    for params in ([weight], [weight, weight], list(model.parameters()) * 2):
        pairs = top_eigenpairs(loss_of(model, x), params, k=3)
        assert pairs.eigenvectors.shape == (3, 16)
        torch.testing.assert_close(pairs.eigenvalues, values[:3], rtol=1e-6, atol=0)
        with loss_hessian(lambda: loss_of(model, x), params) as hessian:
            assert hessian.gradient.shape == (16,)


def test_moments_of_gradients_and_measures_of_sharpness_are_those_of_the_one_parameter(tied):
    model, weight, x, _ = tied
    once, twice = (
        gradient_moment(sample_losses(lambda x: loss_of(model, x), x), ps) for ps in ([weight], [weight] * 2)
    )
    assert torch.equal(once[1], twice[1])
    assert batch_sharpness([loss_of(model, x)], [weight] * 2) == batch_sharpness([loss_of(model, x)], [weight])
    direction = random_direction([weight] * 2, seed=0)
    assert direction.shape == (16,)
    along = [losses_along(lambda: loss_of(model, x), ps, direction, [0.0, 0.5]) for ps in ([weight], [weight] * 2)]
    assert torch.equal(*along)


@pytest.mark.parametrize(
    "make",
    [
        lambda params, **options: NSGD(params, lr=0.1, **options),
        lambda params, **options: damp(SGD(params, lr=0.1), **options),
        lambda params, **options: damp(AdamW(params), **options),
    ],
)
@pytest.mark.parametrize("solver", ["lanczos", "gradients"])
def test_an_optimizer_has_one_direction_along_it(tied, make, solver):
    model, weight, x, values = tied
    optimizer = make([weight, weight], k=2, solver=solver)
    if solver == "lanczos":
        optimizer.refresh(loss_of(model, x))
        assert optimizer.eigenvalues == pytest.approx(values[:2].tolist(), rel=1e-2)  # a refresh stops early
    else:
        optimizer.refresh(sample_losses(lambda x: loss_of(model, x), x))
    vectors = optimizer.directions([weight])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_whole_step_of_the_base_optimizer_is_damped(momentum):
    """SGD moves a parameter as often as it lists it; a whole basis scales all of that by gamma."""
    weight, plain = (nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64)) for _ in range(2))
    optimizer = NSGD([weight, weight], lr=0.1, momentum=momentum, k=2, gamma=0.25, solver="random")
    base = SGD([plain, plain], lr=0.1, momentum=momentum)
    before = weight.detach().clone()
    for p, o in ((weight, optimizer), (plain, base)):
        loss = p.square().sum()
        o.backward(loss) if o is optimizer else loss.backward()
        o.step()
    torch.testing.assert_close(weight - before, 0.25 * (plain - before), rtol=1e-12, atol=0)


def test_differences_and_a_checkpoint_of_it(tied):
    model, weight, x, _ = tied
    optimizer = NSGD([weight, weight], lr=0.01, k=2)
    for i in range(12):
        optimizer.zero_grad()
        loss_of(model, x[i % 4 :: 4]).backward()
        optimizer.step()
    with torch.no_grad():
        other = NSGD([weight, weight], lr=0.01, k=2)
    other.load_state_dict(optimizer.state_dict())
    vectors = other.directions([weight])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(vectors, optimizer.directions([weight]))


def test_one_parameter_in_two_groups_is_refused_by_torch():
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        NSGD([{"params": [weight]}, {"params": [weight]}], k=2)
