"""The step that is computed beforehand is the one that torch.optim.SGD takes, and costs neither copies nor waiting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from calls import Calls
from torch import nn
from torch.optim import SGD, Adam, AdamW

from nsgd import NSGD, damp
from nsgd.damping.correction import Correction
from nsgd.damping.step import Damped

SIZES = (5, 4, 3)  # of the three groups: gamma 0, gamma 0.3, and none


def quadratic(dtype=torch.float64):
    """Symmetric with three positive eigenvalues of twelve, so that some directions are not damped."""
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    matrix = (rotation * np.array([9.0, 6.0, 4.0, *np.linspace(-2.0, -0.2, 9)])) @ rotation.T
    return torch.from_numpy(matrix).to(dtype), torch.linspace(-1.0, 2.0, 12).to(dtype)


class Run:
    """Damped SGD on a quadratic, in three groups of which the last has no curvature."""

    def __init__(self, *, dtype=torch.float64, lr=0.05, gammas=(0.0, 0.3), make=NSGD, **options):
        self.matrix, self.slope = quadratic(dtype)
        self.params = [nn.Parameter(part) for part in torch.linspace(1.0, -2.0, 12).to(dtype).split(SIZES)]
        groups = [
            {"params": [self.params[0]], "gamma": gammas[0]},
            {"params": [self.params[1]], "gamma": gammas[1], "lr": 0.4 * lr},
            {"params": [self.params[2]], "curvature": False},
        ]
        # 18 products are more than the 9 dimensions: the directions are exact.
        self.optimizer = make(groups, lr=lr, k=5, refresh_every=100, **options)

    def loss(self):
        theta = torch.cat(list(self.params))
        return 0.5 * theta @ self.matrix @ theta + self.slope @ theta

    def step(self):
        self.optimizer.zero_grad()
        self.optimizer.backward(value := self.loss(), curvature=value)
        self.optimizer.step()

    def theta(self):
        return torch.cat([p.detach().reshape(-1) for p in self.params])


def reference(theta, matrix, slope, *, rates, gammas, steps, options):
    """The rule in NumPy: theta += step - V^T (1 - Gamma) V step, with the velocity undamped."""
    sign = -1.0 if options.get("maximize", False) else 1.0
    momentum, damping = options.get("momentum", 0.0), options.get("dampening", 0.0)
    values, columns = np.linalg.eigh(sign * matrix[:9, :9])  # of the two groups with curvature
    vectors = np.concatenate([columns[:, ::-1][:, :5].T, np.zeros((5, 3))], axis=1)
    positive = values[::-1][:5] > 0
    velocity = None
    for _ in range(steps):
        direction = sign * (matrix @ theta + slope) + options.get("weight_decay", 0.0) * theta
        if momentum:
            velocity = direction if velocity is None else momentum * velocity + (1 - damping) * direction
            direction = direction + momentum * velocity if options.get("nesterov", False) else velocity
        step = -rates * direction
        inside = vectors @ step
        theta = theta + step
        for i in np.flatnonzero(positive):
            theta = theta - (1 - gammas) * vectors[i] * inside[i]
    return theta


MOMENTA = [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}]
VARIANTS = [
    {**momentum, "weight_decay": weight_decay, "maximize": maximize}
    for momentum, weight_decay, maximize in itertools.product(MOMENTA, [0.0, 0.1], [False, True])
]
WAYS = [{"foreach": False}, {"foreach": True}, {"fused": True}, {"lr": torch.tensor(0.05), "foreach": False}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("measured", [False, True])
def test_damped_steps_follow_the_rule_in_numpy(monkeypatch, options, way, measured):
    if measured:
        monkeypatch.setattr(Correction, "_is_known", lambda *_: False)
    run = Run(**options, **way)
    start = run.theta().numpy().copy()
    for _ in range(5):
        run.step()
    assert run.optimizer.refreshes == 1
    per_entry = lambda *values: np.repeat(values, SIZES)  # noqa: E731
    expected = reference(
        start,
        run.matrix.numpy(),
        run.slope.numpy(),
        rates=per_entry(0.05, 0.02, 0.05),
        gammas=per_entry(0.0, 0.3, 1.0),
        steps=5,
        options=options,
    )
    # The directions come from exact products, in float64; a learning rate in a tensor is float32.
    tolerance = 1e-6 if "lr" in way else 1e-10
    np.testing.assert_allclose(run.theta().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "make",
    [
        NSGD,
        lambda groups, lr, k, refresh_every, **options: damp(
            SGD(groups, lr=lr, **options), k=k, refresh_every=refresh_every
        ),
    ],
    ids=["nsgd", "damp"],
)
@pytest.mark.parametrize("options", MOMENTA[:-1], ids=str)  # Nesterov is measured
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # In float32 and 64 rounding of five steps of size one. In bfloat16 each step rounds the parameters, of size two
    # and less, to 2^-8 of themselves: a last bit may differ, and the next gradients with it.
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2**-5)],
)
def test_the_known_step_and_the_measured_one_agree(monkeypatch, make, options, dtype, tolerance):
    known, measured = (Run(dtype=dtype, lr=0.02, weight_decay=0.1, make=make, **options) for _ in range(2))
    monkeypatch.setattr(Correction, "_is_known", lambda self, _: self._optimizer is known.optimizer)
    for _ in range(5):
        known.step(), measured.step()
        torch.testing.assert_close(known.theta(), measured.theta(), rtol=0, atol=tolerance)
        assert known.optimizer.alignment == pytest.approx(measured.optimizer.alignment, rel=max(tolerance, 1e-6))
    assert known.params[0].dtype == dtype


class Shrinking(SGD):
    """With a decay of its own after torch's step."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)
        return loss


def test_a_subclass_of_sgd_with_a_step_of_its_own_is_measured(training, flat, basis_of):
    run, twin = training(torch.float64), training(torch.float64)
    optimizer = damp(Shrinking(run.model.parameters(), lr=0.1), k=3, gamma=0.0)
    optimizer.backward(value := run.loss(0), curvature=value)
    before, vectors = flat(run.model.parameters()), basis_of(optimizer)
    optimizer.step()
    twin.loss(0).backward()
    Shrinking(twin.model.parameters(), lr=0.1).step()
    step = flat(twin.model.parameters()) - before
    expected = before + step - (vectors @ step) @ vectors
    torch.testing.assert_close(flat(run.model.parameters()), expected, rtol=1e-11, atol=1e-13)


def test_a_subclass_of_nsgd_that_adds_to_its_step_is_damped_once(training, flat):
    class Mine(NSGD):
        def step(self, closure=None):
            return super().step(closure)

    run, twin = training(), training()
    for state, make in ((run, Mine), (twin, NSGD)):
        optimizer = make(state.model.parameters(), lr=0.1, momentum=0.9, k=3, gamma=0.0)
        for i in range(3):
            optimizer.zero_grad()
            optimizer.backward(value := state.loss(i), curvature=value)
            optimizer.step()
    assert torch.equal(flat(run.model.parameters()), flat(twin.model.parameters()))


def test_a_sparse_gradient_is_measured(basis_of):
    table = nn.Embedding(4, 2, dtype=torch.float64)
    optimizer = NSGD(table.parameters(), lr=0.1, k=3, gamma=0.0)
    optimizer.refresh((torch.arange(1.0, 9.0).view(4, 2) * table.weight.square()).sum())
    before, vectors = table.weight.detach().clone(), basis_of(optimizer)
    rows, ones = torch.tensor([[1, 3]]), torch.ones(2, 2, dtype=torch.float64)
    table.weight.grad = torch.sparse_coo_tensor(rows, ones, (4, 2), check_invariants=True)
    step = -0.1 * table.weight.grad.to_dense().flatten()
    optimizer.step()
    expected = before + (step - (vectors @ step) @ vectors).view(4, 2)
    torch.testing.assert_close(table.weight.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_gives_the_steps_of_the_plain_loss(fused):
    """A fused step takes gradients that are still scaled."""
    run, plain = (Run(dtype=torch.float32, lr=0.02, momentum=0.9, fused=fused) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(4):
        run.optimizer.zero_grad()
        loss = scaler.scale(run.loss())
        run.optimizer.refresh_if_due(loss, scale=scaler.get_scale())
        loss.backward()
        if i == 2:
            for p in run.params:
                p.grad.mul_(float("inf"))  # an overflow: this step is left out
        scaler.step(run.optimizer)
        scaler.update(2.0**10)
        if i != 2:
            plain.step()
    torch.testing.assert_close(run.theta(), plain.theta(), rtol=1e-5, atol=1e-6)  # rounding of float32


@pytest.mark.parametrize("bulk_scale", [1.0, 0.5])
def test_a_schedule_may_change_every_option_of_the_base_step(flat, training, bulk_scale):
    """lr, momentum and weight decay of the step to come, not of the last."""

    def changes(group, i):
        group.update(lr=0.1 / (i + 1), momentum=0.9 - 0.1 * i, weight_decay=0.01 * i)

    run, twin = training(torch.float64), training(torch.float64)
    optimizer = NSGD(run.model.parameters(), lr=1.0, k=3, gamma=0.0, bulk_scale=bulk_scale, refresh_every=1)
    plain = SGD(twin.model.parameters(), lr=1.0)
    for i in range(4):
        optimizer.zero_grad(), plain.zero_grad()
        optimizer.backward(value := run.loss(i), curvature=value)
        changes(optimizer.param_groups[0], i), changes(plain.param_groups[0], i)
        twin.model.load_state_dict(run.model.state_dict())
        twin.loss(i).backward()
        before = flat(run.model.parameters())
        optimizer.step(), plain.step()
        step = flat(twin.model.parameters()) - before
        vectors = optimizer.directions(run.model.parameters())
        positive = torch.tensor(optimizer.weights) > 0
        inside = (vectors @ step) * torch.where(positive, 0.0 - bulk_scale, 1.0 - bulk_scale)
        expected = before + bulk_scale * step + inside @ vectors
        torch.testing.assert_close(flat(run.model.parameters()), expected, rtol=1e-11, atol=1e-13)


# -- what it costs --------------------------------------------------------------------------------------------


def calls_of_a_step(training, make, *, wanted, steps=2):
    """Operations of these names in each of some steps between two refreshes."""
    run = training()
    optimizer = make(run.model.parameters())
    seen = []
    for i in range(steps + 1):
        optimizer.zero_grad()
        loss = run.loss(i)
        optimizer.backward(loss, curvature=loss) if isinstance(optimizer, Damped) else loss.backward()
        with Calls() as calls:
            optimizer.step()
        seen.append({name: calls.seen[name] for name in wanted})
    return seen[1:]  # the first step makes the state of the base optimizer


COPIES = ("clone", "copy_", "_to_copy")


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}])
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_the_known_step_copies_nothing(training, options, way, gamma):
    def make(params):
        return NSGD(params, lr=0.1, k=3, gamma=gamma, refresh_every=100, **options, **way)

    plain = calls_of_a_step(training, lambda params: SGD(params, lr=0.1, **options, **way), wanted=COPIES)
    assert calls_of_a_step(training, make, wanted=COPIES) == plain


def test_a_step_that_is_measured_copies_all_parameters_once(training):
    def make(params):
        return NSGD(params, lr=0.1, momentum=0.9, nesterov=True, k=3, refresh_every=100, foreach=True)

    wanted = ("_foreach_copy_", *COPIES)
    expected = {"_foreach_copy_": 1, "clone": 0, "copy_": 0, "_to_copy": 0}
    assert calls_of_a_step(training, make, wanted=wanted) == [expected, expected]


WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")
BASES = {
    "sgd": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: Adam(params, lr=0.01, foreach=True),
    "adamw": lambda params: AdamW(params, lr=0.01, foreach=False),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("refresh_every", [100, "auto"])
@pytest.mark.parametrize("bulk_scale", [1.0, 0.5])
def test_no_step_asks_the_device_for_a_number_that_the_base_step_does_not_ask_for(
    training, base, refresh_every, bulk_scale
):
    def make(params):
        return damp(BASES[base](params), k=3, bulk_scale=bulk_scale, refresh_every=refresh_every)

    plain = calls_of_a_step(training, BASES[base], wanted=WAITS, steps=3)
    assert calls_of_a_step(training, make, wanted=WAITS, steps=3) == plain
    if base == "sgd":
        assert not any(sum(calls.values()) for calls in plain)
