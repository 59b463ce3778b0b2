"""Sums of weighted outer products, and their top eigenpairs, against dense matrices in NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from symmetric_operators import WHICH, check, wanted
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from nsgd import sample_losses
from nsgd.curvature.low_rank import low_rank, squared_lengths
from nsgd.directions.running_average import average
from nsgd.directions.samples import gradient_moment

# Eigenvalues and residuals against the largest eigenvalue. Their squares are what is computed: in float32 the Gram
# matrix of some tens of vectors is good to about 1e-6, and residuals to the root of what was rounded away.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def repeated(vectors):
    return np.concatenate([vectors, vectors, 2 * vectors])


# name: weights (m,), vectors (m, P)
SUMS = {
    "positive": (np.arange(1.0, 7.0), draw(6, 20)),
    "either_sign": (np.array([3.0, -2.0, 1.0, -1.0, 0.5, -4.0]), draw(6, 20)),
    "negative": (-np.arange(1.0, 7.0), draw(6, 20)),
    "some_zero": (np.array([3.0, 0.0, 1.0, 0.0]), draw(4, 20)),
    "more_than_entries": (np.linspace(-1.0, 2.0, 30), draw(30, 8)),
    "rank_3": (np.linspace(0.5, 1.5, 12), draw(12, 3) @ draw(3, 20, seed=1)),
    "rank_3_either_sign": (np.linspace(-1.0, 1.5, 12), draw(12, 3) @ draw(3, 20, seed=1)),
    "duplicates": (np.linspace(0.5, 1.5, 12), repeated(draw(4, 20))),
    "one": (np.array([2.0]), draw(1, 20)),
    "one_entry": (np.array([2.0, 1.0]), draw(2, 1)),
}


def dense(weights, vectors):
    return (vectors.T * weights) @ vectors


def of(case, dtype=torch.float64):
    weights, vectors = SUMS[case]
    return torch.from_numpy(weights), torch.from_numpy(vectors).to(dtype)


def nonzero(matrix):
    values = np.linalg.eigvalsh(matrix)
    return values[np.abs(values) > 1e-9 * np.abs(values).max()]


def agrees(pairs, matrix, k, which, dtype=torch.float64):
    values, vectors = pairs
    assert (values.dtype, vectors.dtype) == (torch.float64, dtype)
    pairs = SimpleNamespace(eigenvalues=values, eigenvectors=vectors)
    check(pairs, torch.from_numpy(matrix).to(dtype), wanted(nonzero(matrix), k, which), tol=TOLERANCE[dtype])


# -- sums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("case", SUMS)
def test_the_top_eigenpairs_of_a_sum_are_those_of_the_dense_matrix(case, k, which, dtype):
    agrees(low_rank(*of(case, dtype), k=k, which=which), dense(*SUMS[case]), k, which, dtype)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_the_size_of_the_vectors_does_not_matter_in_float32_either(scale):
    """Squares of 1e25 do not fit into float32, and gradients of 1e25 do."""
    weights, vectors = of("positive", torch.float32)
    values, rows = low_rank(weights, vectors * scale, k=3)
    expected, expected_rows = low_rank(weights, vectors, k=3)
    np.testing.assert_allclose(values.numpy() / scale / scale, expected.numpy(), rtol=1e-5)
    torch.testing.assert_close((rows @ expected_rows.T).abs(), torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_rounding_adds_no_directions_where_there_are_many_entries(rank):
    """The Gram matrix of a hundred thousand entries is further from its rank than that of twenty."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(16, rank, generator=generator) @ torch.randn(rank, 100_000, generator=generator)
    values, rows = low_rank(torch.full((16,), 1 / 16), vectors, k=10)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-4)
    assert len(values) == rank


@pytest.mark.parametrize("case", SUMS)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_vectors_may_come_in_several_parts(case, cut):
    weights, vectors = of(case)
    cut = min(cut, len(vectors))
    whole = low_rank(weights, vectors, k=4)
    parts = low_rank(weights, [vectors[:cut], vectors[cut:]], k=4)
    assert torch.allclose(parts[0], whole[0], rtol=0, atol=1e-12 * float(whole[0].abs().max()))
    agrees(parts, dense(*SUMS[case]), 4, "LA")


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_squared_lengths_of_float32_rows_are_those_in_float64(scale):
    vectors = torch.from_numpy(draw(5, 1000)) * scale
    found, exact = squared_lengths(vectors.float()), vectors.float().double().square().sum(1)
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact, rtol=1e-5)  # a sum of 1000 squares in float32


def test_a_sum_of_nothing_has_no_directions():
    values, vectors = low_rank(torch.ones(3), torch.zeros(3, 5), k=2)
    assert (values.shape, vectors.shape) == ((0,), (0, 5))


@pytest.mark.parametrize("case", ["either_sign", "duplicates"])
def test_the_order_of_the_terms_does_not_matter(case):
    weights, vectors = of(case)
    order = torch.from_numpy(np.random.default_rng(5).permutation(len(weights)))
    values, rows = low_rank(weights, vectors, k=3)
    again, rows_again = low_rank(weights[order], vectors[order], k=3)
    torch.testing.assert_close(again, values, rtol=1e-12, atol=0)
    torch.testing.assert_close(rows_again.T @ rows_again, rows.T @ rows, rtol=0, atol=1e-10)  # signs are free


# -- averages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(("old", "new"), [("positive", "either_sign"), ("rank_3", "positive"), ("one", "duplicates")])
def test_an_average_is_the_dense_convex_combination(old, new, which, decay):
    matrix = decay * dense(*SUMS[old]) + (1 - decay) * dense(*SUMS[new])
    agrees(average(of(old), of(new), decay=decay, k=4, which=which), matrix, 4, which)
    agrees(average(of(new), of(old), decay=1 - decay, k=4, which=which), matrix, 4, which)


def test_an_average_of_equals_is_itself():
    pair = low_rank(*of("positive"), k=6)
    agrees(average(pair, pair, decay=0.4, k=6), dense(*SUMS["positive"]), 6, "LA")


# -- gradients of groups --------------------------------------------------------------------------------------


def test_of_single_samples_it_is_the_closed_form_of_linear_regression():
    x, y = torch.from_numpy(draw(9, 4)), torch.from_numpy(draw(9, seed=1))
    weight = torch.from_numpy(draw(4, seed=2)).requires_grad_()
    losses = sample_losses(lambda x, y: 0.5 * (x @ weight - y).square().mean(), x, y)
    weights, gradients = gradient_moment(losses, [weight])
    expected = (x @ weight.detach() - y)[:, None] * x
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights, torch.full((9,), 1 / 9, dtype=torch.float64))
    assert weight.grad is None


@pytest.mark.parametrize(
    "problem", ["tanh_mlp", "conv_batchnorm", "partly_frozen", "unused_parameter", "regression"], indirect=True
)
@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_groups_of_unequal_size_weigh_as_many_as_they_are(problem, scale):
    named = dict(problem.model.named_parameters())

    def gradient(loss_of):
        def at(parameters):
            buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
            return loss_of(lambda *inputs: functional_call(problem.model, {**parameters, **buffers}, inputs))

        found = torch.func.grad(at)({name: p.detach() for name, p in named.items()})
        return torch.cat([found[name].reshape(-1) * named[name].requires_grad for name in named])

    losses = [(lambda c=closure: c() * scale, n) for closure, n in problem.batches()]
    weights, gradients = gradient_moment(losses, problem.params, scale=scale)
    torch.testing.assert_close(weights, torch.tensor([3 / 20, 7 / 20, 10 / 20], dtype=torch.float64))
    expected = torch.stack([gradient(loss_of) for loss_of, _ in problem.parts])
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)  # exact; the order of summation differs


def test_with_labels_of_the_model_its_expectation_is_the_hessian_of_a_linear_softmax():
    """The Fisher matrix is the Gauss-Newton matrix (Martens 2020, section 9), here the Hessian: logits are linear."""
    counts = torch.tensor([[1, 2, 5], [4, 3, 1], [2, 2, 4]])  # eighths: what the model gives each label of a sample
    x = torch.from_numpy(draw(3, 3))
    weight = torch.linalg.solve(x, (counts / 8).double().log()).T.contiguous().requires_grad_()  # (labels, inputs)

    def loss(i, label):
        return F.cross_entropy((weight @ x[i])[None], torch.tensor([label]))

    losses = [(lambda i=i, y=y: loss(i, y), int(counts[i, y])) for i in range(3) for y in range(3)]
    weights, gradients = gradient_moment(losses, [weight])
    moment = (gradients.T * weights) @ gradients
    p = counts / 8
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # of the cross-entropy in the logits, any label
    hessian = torch.einsum("nab,ni,nj->aibj", curvature.double(), x, x) / 3
    torch.testing.assert_close(moment, hessian.reshape(9, 9), rtol=0, atol=1e-12)


def test_no_graph_of_second_order_is_made():
    """Fused attention, which has no double backward, will do."""
    weight = nn.Parameter(torch.ones(1))
    q, k, v = torch.randn(3, 4, 2, 8, 16, generator=torch.Generator().manual_seed(0))

    def loss(q, k, v):
        return F.scaled_dot_product_attention(weight * q, k, v).square().mean()

    _, gradients = gradient_moment(sample_losses(loss, q, k, v), [weight])
    assert torch.isfinite(gradients).all()
    assert not gradients.requires_grad


def test_half_precision_gives_float32_gradients():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weights, gradients = gradient_moment([(lambda i=i: (weight[i] ** 2).sum(), 1) for i in range(4)], [weight])
    torch.testing.assert_close(gradients, 2 * torch.eye(4))
    assert weights.dtype == torch.float64


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda w: [(lambda: w.sum(), 3)], ValueError, "two or more groups of samples, got 1: .*solver='lanczos'"),
        (lambda w: [], ValueError, "pairs of a closure .* sample count, got an empty list"),
        (lambda w: [(lambda: w, 1), (lambda: w, 1)], ValueError, "expected a scalar loss"),
        (lambda w: [(lambda: w.sum(), 1), (lambda: w.detach().sum(), 1)], ValueError, "no graph"),
        (lambda w: [(lambda: w.sum(), 1), (lambda: w.sum(), 0)], ValueError, "sample count"),
        (lambda w: (lambda: w.sum(), 5), ValueError, "sample count"),  # a pair in place of pairs
        (lambda w: [(lambda: w.sum(), 1), (lambda: w.sum() * np.nan, 1)], FloatingPointError, "the loss is NaN"),
        (lambda w: [(lambda: w.sum(), 1), (lambda: (w - 1).sqrt().sum(), 1)], FloatingPointError, "gradient of the"),
    ],
)
def test_what_is_no_group_of_losses_is_refused(losses, error, message):
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=message):
        gradient_moment(losses(weight), [weight])
