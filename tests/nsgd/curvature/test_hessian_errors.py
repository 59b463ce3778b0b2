"""What cannot be measured is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nsgd import sample_losses
from nsgd.curvature.hessian import loss_hessian
from nsgd.curvature.vectors import checked_params


def one(value=1.0):
    return nn.Parameter(torch.tensor([value]))


BAD = {
    "no_scalar": (lambda w: w * torch.ones(3), "scalar loss tensor, got shape .3,."),
    "no_graph": (lambda w: w.detach().sum(), "no graph"),
    "no_reach": (lambda w: one().sum(), "reaches none of the parameters"),
    "a_number": (lambda w: 3.0, "expected a loss tensor, a closure .*got 3.0"),
    "closure_of_a_number": (lambda w: lambda: 3.0, "scalar loss tensor, got a float"),
    "closure_without_graph": (lambda w: lambda: w.detach().sum(), "no graph"),
    "no_batches": (lambda w: [], "pairs of a closure that computes a loss and its sample count, got an empty list"),
    "no_samples": (lambda w: [(lambda: w.sum(), 0)], "sample count .1 or more., got"),
    "closures_without_counts": (lambda w: [lambda: w.sum()], "pairs of such a closure and its sample count"),
    "batch_no_scalar": (lambda w: [(lambda: w * torch.ones(3), 1)], "scalar loss tensor"),
    "batch_no_reach": (lambda w: [(lambda: one().sum(), 1)], "reaches none of the parameters"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_loss_is_a_value_error_that_says_which(case):
    make, message = BAD[case]
    weight = one()
    with pytest.raises(ValueError, match=message), loss_hessian(make(weight), [weight]):
        pass


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "got no parameters"),
        ([torch.zeros(2), torch.zeros(2)], "none of the 2 parameters requires a gradient"),
        ([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], "complex parameters"),
    ],
)
def test_bad_parameters_are_a_value_error(params, message):
    with pytest.raises(ValueError, match=message):
        checked_params(params)
    with pytest.raises(ValueError, match=message), loss_hessian(one().sum(), iter(params)):
        pass


def test_a_vector_of_wrong_size_is_a_value_error():
    weight = one()
    wrong = pytest.raises(ValueError, match=r"shape \(1,\).*got \(2,\)")
    with loss_hessian(weight.square().sum(), [weight]) as hessian, wrong:
        hessian.hvp(torch.ones(2))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w: w.sum() * float("nan"), "the loss is NaN"),
        (lambda w: (w - 1.0).sqrt().sum(), "the gradient of the loss is NaN or infinite"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_loss_or_gradient_that_is_not_finite_is_a_floating_point_error(loss, message, several):
    weight = one()
    given = [(lambda: loss(weight), 1)] if several else loss(weight)
    with pytest.raises(FloatingPointError, match=message), loss_hessian(given, [weight]):
        pass


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ([], {}, r"tensors of one length.*got lengths \[\]"),
        ([torch.zeros(3), torch.zeros(4, 2)], {}, r"tensors of one length.*got lengths \[3, 4\]"),
        ([torch.zeros(3)], {"group_size": 0}, "group_size to be a whole number of at least 1, got 0"),
        ([torch.zeros(3)], {"group_size": -2}, "group_size to be a whole number of at least 1, got -2"),
    ],
)
def test_samples_that_cannot_be_cut_are_a_value_error(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        sample_losses(lambda *parts: parts[0].sum(), *tensors, **options)


# -- no double backward ---------------------------------------------------------------------------------------


def attention_loss(weight):
    q, k, v = (weight * x for x in torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0)))
    return F.scaled_dot_product_attention(q, k, v).square().sum()


@pytest.mark.parametrize("several", [False, True])
def test_fused_attention_names_the_cause_and_the_way_out(several):
    weight = one()
    given = [(lambda: attention_loss(weight), 1)] if several else attention_loss(weight)
    with pytest.raises(RuntimeError, match=r"attention has no double backward.*sdpa_kernel.*MATH"):  # noqa: SIM117
        with loss_hessian(given, [weight]) as hessian:
            hessian.hvp(torch.ones(1))


def test_the_way_out_of_fused_attention_works():
    weight = one()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = attention_loss(weight)
    with loss_hessian(loss, [weight]) as hessian:
        assert torch.isfinite(hessian.hvp(torch.ones(1))).all()


@pytest.fixture
def compiled():
    torch._dynamo.reset()  # after some modules of one kind it would go on without compiling
    yield lambda module: torch.compile(module, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # torch's compiler has warnings of its own
def test_a_compiled_module_names_the_cause_and_the_way_out(compiled):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    loss = compiled(model)(torch.ones(4, 3)).square().sum()
    with pytest.raises(RuntimeError, match=r"torch\.compile has no double backward; pass a closure"):  # noqa: SIM117
        with loss_hessian(loss, model.parameters()) as hessian:
            hessian.hvp(torch.ones_like(hessian.gradient))


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("of", ["loss", "batches"])
def test_the_way_out_of_a_compiled_module_works(compiled, of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    params, x = list(model.parameters()), torch.randn(8, 3)
    fast, vector = compiled(model), torch.randn(sum(p.numel() for p in model.parameters()))
    fast(x).sum().backward()  # as training does
    found = [buffer.clone() for buffer in model.buffers()]

    def product(net):
        def closure():
            return net(x).square().mean()

        with loss_hessian(closure if of == "loss" else [(closure, 3), (closure, 5)], params) as hessian:
            return hessian.hvp(vector)

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(product(fast), product(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert all(map(torch.equal, model.buffers(), found))
    fast(x)  # and training goes on with what was compiled
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_backward_before_the_curvature_names_the_cause_and_the_way_out():
    weight = one()
    loss = weight.exp().square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"already freed; take the curvature before loss.backward"):  # noqa: SIM117
        with loss_hessian(loss, [weight]):
            pass


def test_a_step_before_the_curvature_names_the_cause_and_the_way_out():
    weight = one()
    loss = weight.square().sum()
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"changed after the forward pass"):  # noqa: SIM117
        with loss_hessian(loss, [weight]) as hessian:
            hessian.hvp(torch.ones(1))


def test_another_error_of_torch_passes_unchanged():
    weight = one()

    def closure():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"), loss_hessian(closure, [weight]):
        pass
