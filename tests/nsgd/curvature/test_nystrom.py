"""One sweep of products over a block: exact where the block spans the space, better than the block elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nsgd import sample_losses, top_eigenpairs
from nsgd.curvature.low_rank import low_rank
from nsgd.directions.samples import gradient_moment

SIZE = 30


def operator(values, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.zeros(SIZE, dtype=torch.float64)
    spectrum[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return (q * spectrum @ q.T).to(dtype), q.T.to(dtype)  # matrix, eigenvectors as rows


def params(dtype=torch.float64):
    return [nn.Parameter(torch.zeros(SIZE, dtype=dtype))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("which", "expected"), [("LA", [9.0, 7.0]), ("SA", [-1.0, -4.0]), ("LM", [9.0, 7.0])])
def test_a_block_that_spans_all_outstanding_directions_gives_them_exactly(dtype, which, expected):
    matrix, vectors = operator([9.0, 7.0, 3.0, -1.0, -4.0], dtype)
    mixed = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=dtype) @ vectors[:6]
    pairs = top_eigenpairs(lambda v: matrix @ v, params(dtype), k=2, which=which, solver="nystrom", start=mixed)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4  # rounding, times the block's condition number
    torch.testing.assert_close(pairs.eigenvalues.double(), torch.tensor(expected).double(), rtol=tolerance, atol=0)
    applied = pairs.eigenvectors @ matrix
    torch.testing.assert_close(applied, pairs.eigenvalues[:, None] * pairs.eigenvectors, rtol=0, atol=20 * tolerance)
    assert pairs.hvps == 6
    assert math.isnan(pairs.cost_gradients)  # a bare callable
    assert pairs.residuals.isnan().all()
    assert not pairs.converged


def test_a_sweep_divides_the_angle_of_a_perturbed_block_by_the_ratio_of_eigenvalues():
    matrix, vectors = operator([100.0, 90.0, 80.0] + [1.0] * 27)
    noise = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    block = torch.linalg.qr((vectors[:3] + 0.05 * noise).T).Q.T
    pairs = top_eigenpairs(lambda v: matrix @ v, params(), k=3, solver="nystrom", start=block)

    def missed(rows):  # sum of squared sines of the principal angles
        return 3 - float((rows @ vectors[:3].T).square().sum())

    # One step of orthogonal iteration: sines shrink by at least lambda_4 / lambda_3 = 1/80, to first order.
    assert missed(pairs.eigenvectors) < 1.2 * missed(block) / 80**2


def test_two_products_more_than_k_from_the_moment_of_gradients_beat_as_many_of_lanczos():
    """On a softmax network in training: the claim of the docstring, on a small scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x = torch.randn(64, 8, dtype=torch.float64)
    y = (x[:, :4] + 0.3 * torch.randn(64, 4, dtype=torch.float64)).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    weights = list(model.parameters())

    def solve(**options):
        return top_eigenpairs(F.cross_entropy(model(x), y), weights, k=4, **options).eigenvectors

    exact = solve(tol=1e-10)
    shares, gradients = gradient_moment(sample_losses(lambda x, y: F.cross_entropy(model(x), y), x, y), weights)
    block = low_rank(shares, gradients, k=6)[1]
    overlaps = {
        name: float((found @ exact.T).square().sum() / 4)
        for name, found in {
            "block": block[:4],
            "sweep": solve(solver="nystrom", start=block),
            "lanczos": solve(max_hvps=6, repeated=False),
        }.items()
    }
    assert overlaps["sweep"] > max(overlaps["block"], overlaps["lanczos"])
    assert overlaps["sweep"] > 0.9


@pytest.mark.parametrize("values", [[], [2.0]])
def test_an_operator_of_lower_rank_still_gives_k_pairs(values):
    matrix, vectors = operator(values)
    pairs = top_eigenpairs(lambda v: matrix @ v, params(), k=3, solver="nystrom", start=vectors[:4])
    expected = torch.tensor([*values, 0.0, 0.0, 0.0][:3], dtype=torch.float64)
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=0, atol=1e-12)
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(pairs.eigenvectors @ pairs.eigenvectors.T, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [None, torch.zeros(SIZE), torch.zeros(2, SIZE)])
def test_a_block_of_too_few_rows_is_refused(start):
    with pytest.raises(ValueError, match=r"expected a block of 3 rows or more as start, \(3, 30\), got"):
        top_eigenpairs(lambda v: v, params(), k=3, solver="nystrom", start=start)


def test_a_loss_counts_its_gradient_and_the_products():
    weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
    pairs = top_eigenpairs(weight.pow(4).sum(), [weight], k=2, solver="nystrom", start=torch.eye(5)[:3])
    assert pairs.hvps == 3
    assert pairs.cost_gradients == 7.0


# -- spectra of either sign -----------------------------------------------------------------------------------


def turned(angle, first, second):
    """A row between two basis vectors."""
    row = torch.zeros(SIZE, dtype=torch.float64)
    row[first], row[second] = math.cos(angle), math.sin(angle)
    return row


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("off", [0.0, 1e-12, 0.002, 0.01, 0.05, 0.2])
def test_directions_that_mix_either_sign_make_no_curvature_of_their_own(which, off):
    """Between curvatures of 1 and -1 there is none: dividing by what is left would make any value."""
    matrix = torch.diag(torch.tensor([1.0, -1.0, 1.0] + [0.0] * (SIZE - 3), dtype=torch.float64))
    block = torch.stack([turned(math.pi / 4 - off, 0, 1), turned(0.0, 2, 3), turned(0.0, 4, 5)])
    pairs = top_eigenpairs(lambda v: matrix @ v, params(), k=2, which=which, solver="nystrom", start=block)
    assert float(pairs.eigenvalues.abs().max()) <= 4 + 1e-9  # of a norm of 1
    torch.testing.assert_close(pairs.eigenvectors @ pairs.eigenvectors.T, torch.eye(2).double(), rtol=0, atol=1e-10)
    if off <= 0.05:  # a curvature of sin(2 off), whose product has a length of 1: the block's own have to do
        expected = {"LA": [1.0, math.sin(2 * off)], "SA": [math.sin(2 * off), 0.0], "LM": [1.0, math.sin(2 * off)]}
        torch.testing.assert_close(pairs.eigenvalues, torch.tensor(expected[which]).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_no_block_makes_more_than_four_times_the_norm(which, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(SIZE, generator=generator, dtype=torch.float64).tolist()
    matrix, _ = operator(values)
    block = torch.randn(8, SIZE, generator=generator, dtype=torch.float64)
    pairs = top_eigenpairs(lambda v: matrix @ v, params(), k=3, which=which, solver="nystrom", start=block)
    assert float(pairs.eigenvalues.abs().max()) <= 4 * max(map(abs, values))
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(pairs.eigenvectors @ pairs.eigenvectors.T, identity, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("decades", [1, 2, 2.9])
def test_of_one_sign_a_block_keeps_the_whole_approximation(sign, decades):
    """A B^T (B A B^T)^+ B A, dense: nothing of it is dropped down to a thousandth of the largest."""
    values = [10.0 ** (-decades * i / 5) for i in range(6)]
    matrix, vectors = operator([sign * value for value in values])
    generator = torch.Generator().manual_seed(4)
    rest = 0.1 * torch.randn(6, SIZE, generator=generator, dtype=torch.float64)
    block = torch.linalg.qr((vectors[:6] + rest).T).Q.T
    image = block @ matrix
    expected = torch.linalg.eigvalsh(image.T @ torch.linalg.solve(image @ block.T, image)) * sign
    expected = expected.sort(descending=True).values[:5] * sign
    which = "LA" if sign > 0 else "SA"
    pairs = top_eigenpairs(lambda v: matrix @ v, params(), k=5, which=which, solver="nystrom", start=block)
    found = pairs.eigenvalues if sign > 0 else pairs.eigenvalues.flip(0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
