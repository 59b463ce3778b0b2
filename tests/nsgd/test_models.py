"""Each model and precision with each source of directions: it works, or is refused in one sentence; see model_cases."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from model_cases import AT_ONCE, CASES, DEVICES, GRADIENTS, ONE_BY_ONE, PRODUCTS, SOURCES, Case, Way
from torch import Tensor, nn
from traces import assert_untouched, random_states, same_random_states, snapshot

from nsgd import NSGD, sample_losses

K = 3
STEPS = {GRADIENTS: 14, AT_ONCE: 4, ONE_BY_ONE: 4, PRODUCTS: 4}
OPTIONS: dict[str, dict[str, Any]] = {
    GRADIENTS: {},
    AT_ONCE: {"solver": "gradients", "refresh_every": 2},
    ONE_BY_ONE: {"solver": "gradients", "refresh_every": 2},
    PRODUCTS: {"solver": "lanczos", "refresh_every": 2},
}
# Of the length of a direction that may lie outside of what it is made of: rounding of the gradients.
OUTSIDE = {torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2, torch.float64: 1e-6}


class Run:
    """A plain loop of torch, with the directions from one source."""

    def __init__(self, case: Case, source: str, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.case, self.source, self.device, self.model = case, source, device, case.make().to(device)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.names, self.params = [name for name, _ in named], [p for _, p in named]
        self.optimizer = NSGD(self.params, lr=0.02, momentum=0.9, k=K, **OPTIONS[source])
        self.scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=case.scaled)

    def draw(self) -> tuple[Tensor, ...]:
        return tuple(part.to(self.device) for part in self.case.draw())

    def loss(self, *parts: Tensor) -> Tensor:
        with self.case.context(self.device):
            return self.case.loss(self.model, *parts)

    def refresh(self, batch: tuple[Tensor, ...], loss: Tensor) -> None:
        if self.source == PRODUCTS:
            self.optimizer.refresh_if_due(self.scaler.scale(loss), scale=self.scaler.get_scale())
        elif self.source != GRADIENTS:
            module = self.model if self.source == AT_ONCE else None
            losses = sample_losses(
                self.loss, *batch, group_size=self.case.group_size, module=module, batch_dim=self.case.batch_dim
            )
            self.optimizer.refresh_if_due(losses)

    def step(self) -> tuple[Tensor, ...]:
        """Train on a batch, which is returned."""
        batch = self.draw()
        self.optimizer.zero_grad()
        loss = self.loss(*batch)
        found, random_state, kept = snapshot(self.model), random_states(), [part.clone() for part in batch]
        try:
            self.refresh(batch, loss)
        finally:
            assert_untouched(self.model, found)
            same_random_states(random_state)
            assert all(map(torch.equal, batch, kept))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        assert all(bool(p.isfinite().all()) for p in self.params)
        return batch

    def directions(self) -> Tensor:
        return self.optimizer.directions(self.params).double()

    def flat(self, gradients: list[Tensor | None]) -> Tensor:
        """Gradients end to end, (P,), zero where a parameter has none that is dense."""
        dense = [g is not None and not g.is_sparse for g in gradients]
        parts = [
            g if is_dense else torch.zeros_like(p) for g, p, is_dense in zip(gradients, self.params, dense, strict=True)
        ]
        return torch.cat([part.detach().double().reshape(-1) for part in parts])

    def samples_of(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The gradients of the groups of samples, (m, P), by torch alone."""
        pairs = zip(batch, self.case.batch_dim, strict=True)
        groups = zip(*(part.split(self.case.group_size, dim) for part, dim in pairs), strict=True)
        losses = (self.loss(*group) for group in groups)
        return torch.stack([self.flat(list(torch.autograd.grad(v, self.params, allow_unused=True))) for v in losses])


def outside(vectors: Tensor, rows: Tensor) -> float:
    """The largest part, in length, of the vectors (k, P) that lies outside of the span of rows (n, P)."""
    _, values, axes = torch.linalg.svd(rows, full_matrices=False)
    span = axes[values > 1e-9 * values[0]]
    return float((vectors - vectors @ span.T @ span).norm(dim=1).max())


def rayleigh(case: Case, model: nn.Module, batch: tuple[Tensor, ...], vectors: Tensor) -> Tensor:
    """v^T H v for each vector, (k,), by central differences of the gradient, in float64."""
    model = copy.deepcopy(model).double()
    params = [p for p in model.parameters() if p.requires_grad]
    batch = tuple(part.double() if part.is_floating_point() else part for part in batch)

    def slope(vector: Tensor, step: float) -> Tensor:
        parts = vector.split([p.numel() for p in params])
        with torch.no_grad():
            for p, part in zip(params, parts, strict=True):
                p.add_(part.view_as(p), alpha=step)
        grads = torch.autograd.grad(case.loss(model, *batch), params, allow_unused=True)
        with torch.no_grad():
            for p, part in zip(params, parts, strict=True):
                p.sub_(part.view_as(p), alpha=step)
        return sum((g * part.view_as(g)).sum() for g, part in zip(grads, parts, strict=True) if g is not None)

    step = 1e-3
    return torch.stack([(slope(v, step) - slope(v, -step)) / (2 * step) for v in vectors])


def refusals(case: Case, device: str) -> dict[str, Way]:
    return {**case.refused, **(case.refused_on_gpu if device == "cuda" else {})}


def expect(case: Case, source: str) -> Any:
    return pytest.warns(UserWarning, match=case.said[source].words) if source in case.said else nullcontext()


def rows_of(*sources: str, exact: bool = False) -> list[Any]:
    """The cases that are not refused, for a test of what they find; or all of them."""
    return [
        pytest.param(case, source, device, id="-".join([case.name, source] + [device] * (device != "cpu")))
        for device, case, source in itertools.product(DEVICES, CASES, sources)
        if not exact or (case.exact and source not in refusals(case, device))
    ]


@pytest.mark.filterwarnings("ignore:the directions have no share in the parameter")  # of what the loss does not use
@pytest.mark.parametrize(("case", "source", "device"), rows_of(*SOURCES))
def test_a_model_works_or_is_refused_in_one_sentence(record_property, case, source, device):
    """Its directions have a share in each parameter that trains, and damp the step; all else is as found."""
    if case.needs:
        pytest.importorskip(case.needs)
    record_property("reliability: models and precisions × sources", 1)
    refused = refusals(case, device)
    if source in refused:
        with pytest.raises((ValueError, RuntimeError), match=refused[source].words) as refusal:
            Run(case, source, device).step()
        assert "\n" not in str(refusal.value)
        return
    run = Run(case, source, device)
    with expect(case, source):
        for _ in range(STEPS[source]):
            run.step()
    vectors = run.directions()
    assert run.optimizer.refreshes > 1
    assert len(vectors) == K
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(K).to(vectors), rtol=0, atol=1e-4)
    parts = vectors.split([p.numel() for p in run.params], dim=1)
    assert {name for name, part in zip(run.names, parts, strict=True) if not part.any()} == case.without
    assert 0 < run.optimizer.alignment <= 1 + 1e-6  # the last step was damped


@pytest.mark.parametrize(("case", "source", "device"), rows_of(GRADIENTS, AT_ONCE, ONE_BY_ONE, exact=True))
def test_directions_are_made_of_gradients_that_torch_computes(case, source, device):
    """Of the steps, or of single samples: nothing of a direction lies outside of their span, which is small."""
    if case.needs:
        pytest.importorskip(case.needs)
    run = Run(case, source, device)
    with expect(case, source):
        if source == GRADIENTS:
            rows = []
            for _ in range(STEPS[source]):
                run.step()
                rows.append(run.flat([p.grad for p in run.params]))
            gradients = torch.stack(rows)
        else:
            random_state = torch.get_rng_state()  # the same batch as the step's
            gradients = run.samples_of(run.draw())
            torch.set_rng_state(random_state)
            run.step()
    assert outside(run.directions(), gradients) < OUTSIDE[case.precision]
    assert len(gradients) < 0.5 * gradients.shape[1]


@pytest.mark.parametrize(("case", "source", "device"), rows_of(PRODUCTS, exact=True))
def test_eigenvalues_of_products_are_curvatures_along_the_directions(case, source, device):
    if case.needs:
        pytest.importorskip(case.needs)
    run = Run(case, source, device)
    before = copy.deepcopy(run.model)
    batch = run.step()
    found = torch.tensor(run.optimizer.eigenvalues, dtype=torch.float64, device=device)
    expected = rayleigh(case, before, batch, run.directions())
    torch.testing.assert_close(found, expected, rtol=0, atol=OUTSIDE[case.precision] * float(found[0]))


def test_a_batch_that_is_a_dict_is_refused_for_samples_in_one_sentence():
    with pytest.raises(ValueError, match="expected tensors, a row for each sample, got a dict; make it one"):
        sample_losses(lambda batch: batch["x"].mean(), {"x": torch.randn(4, 6)})


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")  # torch's
@pytest.mark.parametrize("source", SOURCES)
def test_a_parameter_that_is_listed_twice_counts_once(source):
    (case,) = (case for case in CASES if case.name == "tied weights")
    once, twice = Run(case, source), Run(case, source)
    twice.optimizer = NSGD([once.params[0], *once.params], lr=0.02, momentum=0.9, k=K, **OPTIONS[source])
    twice.model, twice.params = once.model, once.params
    for run in (once, twice):
        with torch.random.fork_rng():
            for _ in range(STEPS[source]):
                batch = run.draw()
                run.optimizer.zero_grad()
                run.refresh(batch, loss := run.loss(*batch))
                loss.backward()
                with torch.no_grad():
                    kept = [p.clone() for p in run.params]
                    run.optimizer.step()
                    for p, value in zip(run.params, kept, strict=True):  # both at one point
                        p.copy_(value)
    torch.testing.assert_close(twice.directions().abs(), once.directions().abs(), rtol=0, atol=1e-5)
    assert twice.optimizer.weights == pytest.approx(once.optimizer.weights, rel=1e-5)
