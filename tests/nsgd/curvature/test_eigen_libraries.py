"""Agreement with other libraries, where they are installed."""

from __future__ import annotations

import warnings

import pytest
import torch
from symmetric_operators import check, wanted
from torch import nn

from nsgd import top_eigenpairs


def import_quietly(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own deprecations are theirs
        return pytest.importorskip(name)


@pytest.fixture
def supervised():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    return model, x, torch.randint(3, (20,), generator=generator)


@pytest.mark.filterwarnings("ignore")
def test_pairs_agree_with_curvlinops(supervised):
    curvlinops = import_quietly("curvlinops")
    model, x, y = supervised
    data = [(x[:8], y[:8]), (x[8:], y[8:])]
    criterion = nn.CrossEntropyLoss()
    try:
        theirs = curvlinops.HessianLinearOperator(model, criterion, list(model.parameters()), data)
    except (TypeError, ValueError, AttributeError):  # version 4 wants names
        theirs = curvlinops.HessianLinearOperator(model, criterion, dict(model.named_parameters()), data)
    size = sum(p.numel() for p in model.parameters())
    matrix = theirs @ torch.eye(size, dtype=torch.float64)
    losses = [(lambda x=x, y=y: criterion(model(x), y), len(x)) for x, y in data]
    for source in (criterion(model(x), y), losses):
        pairs = top_eigenpairs(source, model.parameters(), k=5, tol=1e-10)
        check(pairs, matrix, wanted(torch.linalg.eigvalsh(matrix), 5, "LA"), tol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_pairs_agree_with_hessian_eigenthings(supervised):
    library = import_quietly("hessian_eigenthings")
    model, x, y = supervised
    criterion = nn.CrossEntropyLoss()
    theirs = library.HessianOperator(model, [(x, y)], lambda model, batch: criterion(model(batch[0]), batch[1]))
    size = sum(p.numel() for p in model.parameters())
    found = library.lanczos(theirs, k=3, max_iter=size - 1, which="LA", seed=0, reorthogonalize=True)
    pairs = top_eigenpairs(criterion(model(x), y), model.parameters(), k=3, tol=1e-10)
    # P - 1 products, kept orthogonal, leave nothing but rounding.
    torch.testing.assert_close(pairs.eigenvalues, found.eigenvalues.sort(descending=True).values, rtol=0, atol=1e-7)
