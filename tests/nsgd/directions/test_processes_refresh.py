"""Samples and products under DistributedDataParallel, over gloo: one estimate in every process, that of one process."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from several import assert_close, assert_same, batch, found, fresh, several
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import nsgd.damping.correction
from nsgd import NSGD, sample_losses
from nsgd.directions.pace import Pace

# Few directions with a gap below them, refreshed often, and products enough that Lanczos has found them.
OPTIONS = {"lr": 0.1, "momentum": 0.9, "k": 3, "refresh_every": 5}
WAYS = ("vmap", "one by one", "lanczos", "lanczos on a sample", "arpack", "random")


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def step(model: nn.Module, optimizer: NSGD, x: Tensor, y: Tensor, way: str) -> None:
    """One step; samples come from the network itself, of which DDP is a wrapper."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    curvature: Any = None
    if way in ("vmap", "one by one"):
        module = inner if way == "vmap" else None
        curvature = sample_losses(partial(mean_loss, inner), x, y, module=module)
    elif way == "lanczos on a sample":
        some = len(x) // 2  # of each process, together half of the batch
        curvature = partial(mean_loss, inner, x[:some], y[:some])
    optimizer.zero_grad()
    optimizer.backward(mean_loss(model, x, y), curvature=curvature)
    optimizer.step()


def made(model: nn.Module, way: str, **options: Any) -> NSGD:
    solver = {"vmap": "auto", "one by one": "gradients"}.get(way, way.split()[0])
    return NSGD(model.parameters(), **{**OPTIONS, **options}, solver=solver)


def trained(rank: int, world: int, ways: tuple[str, ...]) -> dict[str, Any]:
    results = {}
    for way in ways:
        model = DistributedDataParallel(fresh()) if world > 1 else fresh()
        optimizer = made(model, way)
        for i in range(30):
            x, y = batch(i % 3)
            step(model, optimizer, x[rank::world], y[rank::world], way)
        results[way] = {**found(model, optimizer), "counts": (optimizer.refreshes, optimizer.hvps)}
    return results


def test_directions_are_bitwise_equal_and_those_of_one_process_on_the_whole_batch(tmp_path):
    first, second = several(trained, 2, tmp_path, WAYS)
    for way in WAYS:
        assert_same(first[way], second[way])
        assert first[way]["counts"] == second[way]["counts"]
        assert first[way]["counts"][0] == 6, way
    for way, one in trained(0, 1, WAYS).items():
        assert first[way]["counts"] == one["counts"]
        assert_close(first[way], one, 1e-10)


def misfortunes(rank: int, world: int) -> dict[str, Any]:
    """What goes wrong in one of the processes, and what both make of it."""
    results: dict[str, Any] = {}
    warnings.simplefilter("ignore")  # a skipped refresh warns, as in one process
    for way in ("vmap", "one by one", "lanczos"):
        model = DistributedDataParallel(fresh())
        optimizer = made(model, way)
        step(model, optimizer, *batch(rank), way)
        before = found(model, optimizer)
        x, y = batch(rank)
        x = x * (torch.nan if rank == 1 else 1.0)
        inner = model.module
        given: Any = mean_loss(inner, x, y)
        if way != "lanczos":
            given = sample_losses(partial(mean_loss, inner), x, y, module=inner if way == "vmap" else None)
        kept = optimizer.refresh(given), optimizer.skipped_refreshes, optimizer.hvps
        assert_same(found(model, optimizer), before)
        results[way] = kept
        step(model, optimizer, *batch(2 + rank), way)  # and training goes on
        results[way + " after"] = found(model, optimizer)

    model = DistributedDataParallel(fresh())
    x, y = batch(rank)

    def refused(optimizer: NSGD, given: Any, **options: float) -> str:
        before = found(model, optimizer)
        with pytest.raises((ValueError, RuntimeError)) as caught:
            optimizer.refresh(given, **options)
        assert_same(found(model, optimizer), before)
        assert optimizer.refreshes == optimizer.skipped_refreshes == optimizer.hvps == 0
        return str(caught.value)

    def broken(parts: Any) -> Tensor:
        if rank == 1:
            raise RuntimeError("this batch is odd")
        return mean_loss(model.module, *parts)

    samples = sample_losses(partial(mean_loss, model.module), x, y)
    results["scale"] = refused(made(model, "vmap"), samples, scale=1.0 - rank)
    results["kinds"] = refused(made(model, "vmap"), samples if rank else mean_loss(model.module, x, y))
    results["closure"] = refused(made(model, "lanczos"), lambda: broken((x, y)))
    results["product"] = refused(made(model, "lanczos"), [(lambda: broken((x, y)), 1)])
    results["samples"] = refused(made(model, "vmap"), sample_losses(lambda *p: broken(p), x, y))
    for way in ("vmap", "one by one"):
        through = sample_losses(partial(mean_loss, model), x, y, module=model if way == "vmap" else None)
        results["ddp " + way] = refused(made(model, way), through)
    results["ddp closure"] = refused(made(model, "lanczos"), lambda: mean_loss(model, x, y))
    optimizer = made(model, "vmap")  # and DDP itself has not been confused
    step(model, optimizer, x, y, "vmap")
    step(model, optimizer, x, y, "vmap")
    results["end"] = found(model, optimizer)
    return results


def test_what_one_process_meets_all_of_them_meet(tmp_path):
    first, second = several(misfortunes, 2, tmp_path)
    for way in ("vmap", "one by one", "lanczos"):
        assert first[way][:2] == second[way][:2] == (False, 1)
        assert first[way][2] == second[way][2]
        assert_same(first[way + " after"], second[way + " after"])
    elsewhere = "a refresh of the directions failed in another process, whose message says why"
    assert (first["scale"], second["scale"]) == (elsewhere, "expected scale to be a finite number above 0, got 0.0")
    assert first["kinds"] == second["kinds"]
    assert first["kinds"].startswith("expected curvature of one kind in all processes")
    for case in ("closure", "product", "samples"):
        assert (first[case], second[case]) == (elsewhere, "this batch is odd")
    for case in ("ddp vmap", "ddp one by one", "ddp closure"):
        assert first[case] == second[case]
        assert "write model.module in place of model there" in first[case]
    assert_same(first["end"], second["end"])


def uneven(rank: int, world: int) -> list[Any]:
    """Costs that differ between the processes, unequal numbers of samples, and refreshes when they are paid for.

    And rounding on the edge of an alarm: a step that has left the directions in one process alone.
    """
    jump = nsgd.damping.correction.jump
    nsgd.damping.correction.jump = lambda *args: (torch.tensor(rank == 1), jump(*args)[1])
    nsgd.directions.refresh.averaging_share = lambda **sizes: 0.2 * rank
    Pace.is_known = False  # refreshes go by the count
    results = []
    for samples in (4 + rank, 2 + 3 * rank):
        model = DistributedDataParallel(fresh())
        optimizer = made(model, "vmap", refresh_every="auto", overhead=0.3)
        due = []
        for i in range(40):
            x, y = (part[:samples] for part in batch(2 * i + rank))
            given = sample_losses(partial(mean_loss, model.module), x, y, module=model.module)
            optimizer.zero_grad()
            due.append(optimizer.refresh_due)
            optimizer.refresh_if_due(given, batch_fraction=0.5 + 0.4 * rank)
            mean_loss(model, x, y).backward()
            optimizer.step()
        results.append((due, optimizer.cost_gradients, found(model, optimizer)))
    return results


def test_a_refresh_is_due_in_all_at_once_whatever_it_costs_in_each(tmp_path):
    for one, other in zip(*several(uneven, 2, tmp_path), strict=True):
        assert one[0] == other[0]
        assert 2 < sum(one[0]) < 40
        assert one[1] == other[1] == pytest.approx(1.1 * 0.7 * sum(one[0]))
        assert_same(one[2], other[2])


def moments(rank: int, world: int) -> dict[str, Any]:
    model = DistributedDataParallel(fresh())
    optimizer = made(model, "vmap")
    x, y = (part[: 3 + 2 * rank] for part in batch(rank))
    optimizer.refresh(sample_losses(partial(mean_loss, model.module), x, y, module=model.module))
    products = made(model, "lanczos", k=10)
    products.refresh(mean_loss(model, x, y))
    return {"samples": found(model, optimizer), "products": found(model, products) | {"x": x, "y": y}}


def test_uneven_samples_count_as_ddp_counts_them(tmp_path):
    """Against dense matrices: samples weigh as in the mean over the processes of each one's mean."""
    results = several(moments, 2, tmp_path)
    gradients, weights, hessian = [], [], 0.0
    model = fresh()
    sizes = [p.numel() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(names, theta.split(sizes), model.parameters(), strict=True)
        values = {name: part.view_as(p) for name, part, p in parts}
        return cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    for result in results:
        x, y = result["products"]["x"], result["products"]["y"]
        gradients += [torch.func.grad(loss)(theta, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        weights += [1 / len(x) / 2] * len(x)
        hessian = hessian + torch.autograd.functional.hessian(lambda t, x=x, y=y: loss(t, x, y), theta) / 2
    covariance = torch.cov(torch.stack(gradients).T, aweights=torch.tensor(weights))
    for matrix, name, top in ((covariance, "samples", 3), (hessian, "products", 3)):
        values = torch.linalg.eigvalsh(matrix).flip(0)[:top]
        vectors = results[0][name]["directions"][:top]
        torch.testing.assert_close(
            torch.tensor(results[0][name]["weights"])[:top].to(values), values, rtol=1e-5, atol=0
        )
        residual = vectors @ matrix - values[:, None] * vectors
        assert float(residual.abs().max()) < 1e-3 * float(values[0])
