"""Gradients of groups of samples all at once: nothing is left behind, and what is refused or left out."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from sample_cases import SAMPLES, Case
from torch import Tensor, nn
from torch.nn import functional as F
from traces import assert_untouched, random_states, same_random_states, snapshot

from nsgd import NSGD, backward_in_chunks, sample_losses
from nsgd.directions.samples import gradient_moment

# -- nothing left behind --------------------------------------------------------------------------------------


class Dropped(nn.Module):
    """Dropout and BatchNorm, in a mixture of modes, with a gradient from before, in float64."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
        self.double()
        self.net[3].eval()
        self.net[0].weight.grad = torch.ones_like(self.net[0].weight)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("fails", [None, "in a group", "in the last group"])
def test_buffers_modes_grad_and_random_state_stay_as_found(fails):
    model, calls = Dropped(), []
    before, states = snapshot(model), random_states()

    def loss(x):
        calls.append(1)
        value = model(x).square().mean()
        model.eval()
        model.register_buffer("surprise", torch.ones(2))
        if fails == ("in a group" if len(calls) == 1 else "in the last group"):
            raise KeyError("inside")
        return value

    x = torch.ones(SAMPLES, 6, dtype=torch.float64)
    losses = sample_losses(loss, x, group_size=4, module=model)
    with pytest.raises(KeyError, match="inside") if fails else torch.no_grad():
        gradient_moment(losses, list(model.parameters()))
    assert len(calls) == (1 if fails == "in a group" else 2)  # all whole groups at once, then the last
    assert_untouched(model, before)
    same_random_states(states)
    assert not hasattr(model, "surprise")
    assert torch.is_grad_enabled()


def test_a_backward_pass_from_before_still_works():
    case = Case("batch_norm")
    loss = case.loss(case.x, case.y)
    expected = torch.autograd.grad(loss, case.params, retain_graph=True)
    gradient_moment(case.losses(group_size=5), case.params)
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(case.params, expected, strict=True))


@pytest.mark.parametrize("group_size", [1, 2])
def test_every_group_draws_a_dropout_mask_of_its_own(group_size):
    """As the samples of a batch do: gradients of equal samples differ, and are what some mask gives."""
    torch.manual_seed(0)
    weight = nn.Linear(12, 1, bias=False)
    x = torch.ones(16, 12)
    states = random_states()
    losses = sample_losses(lambda x: weight(F.dropout(x, 0.5)).mean(), x, group_size=group_size, module=weight)
    _, gradients = gradient_moment(losses, [weight.weight])
    same_random_states(states)
    assert len({tuple(row) for row in gradients.tolist()}) == len(gradients)
    assert set(gradients.unique().tolist()) == {2.0 * i / group_size for i in range(group_size + 1)}
    again = gradient_moment(losses, [weight.weight])[1]
    assert torch.equal(again, gradients)  # the random state was as found
    torch.manual_seed(1)
    assert not torch.equal(gradient_moment(losses, [weight.weight])[1], gradients)


@pytest.mark.parametrize("at_once", [True, False])
def test_inference_mode_and_no_grad_around_make_no_difference(at_once):
    case = Case()
    expected = gradient_moment(case.losses(at_once), case.params)[1]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = gradient_moment(case.losses(at_once), case.params)[1]
        assert torch.equal(found, expected)
        assert not found.requires_grad


# -- refused, or left out -------------------------------------------------------------------------------------


def with_labels(case, *unknown):
    case.y[list(unknown)] = -100  # which cross_entropy ignores: the mean over none is NaN
    return case


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("group_size", "unknown", "left_out"),
    [(1, [0, 4], [0, 4]), (4, [4, 5, 6, 7], [1]), (4, [8, 9], [2]), (4, [3, 8], []), (1, range(2, 10), range(2, 10))],
)
def test_groups_of_unknown_loss_are_left_out(at_once, group_size, unknown, left_out):
    case = with_labels(Case(), *unknown)
    counts = torch.tensor([len(part) for part in case.x.split(group_size)], dtype=torch.float64)
    kept = [i for i in range(len(counts)) if i not in left_out]
    pairs = case.losses(False, group_size)
    expected = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(pairs[i][0](), case.params)]) for i in kept]
    )
    weights, gradients = gradient_moment(case.losses(at_once, group_size), case.params)
    torch.testing.assert_close(weights, counts[kept] / counts[kept].sum())
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


def infinite(value):
    return lambda case, x: torch.where((x == case.x[3]).all(), value, 0.0)


def steep(case, x):
    """Zero, with a gradient that is infinite."""
    w = next(case.model.parameters()).sum()
    return (w - w.detach()).sqrt()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("unknown", "added", "message"),
    [
        (range(10), None, "the loss is NaN"),
        (range(1, 10), None, "the loss is NaN"),  # a single group is left
        ([], infinite(torch.inf), "the loss is NaN or infinite"),
        ([0], infinite(-torch.inf), "the loss is NaN or infinite"),
        ([], steep, "the gradient of the loss is NaN or infinite"),
        ([0], steep, "the gradient of the loss is NaN or infinite"),
    ],
    ids=["all", "all but one", "infinite", "infinite and unknown", "gradient", "gradient and unknown"],
)
def test_all_unknown_or_any_infinite_is_a_floating_point_error(at_once, unknown, added, message):
    case = with_labels(Case(), *unknown)
    of_labels = case.loss
    case.loss = lambda x, y: of_labels(x, y) + (added(case, x) if added else 0.0)
    with pytest.raises(FloatingPointError, match=message):
        gradient_moment(case.losses(at_once), case.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.params.append(nn.Parameter(torch.ones(2))), "1 of 5 are not its own; .*leave module out"),
        (lambda case: setattr(case, "model", copy.deepcopy(case.model)), "4 of 4 are not its own"),
        (lambda case: setattr(case, "loss", lambda x, y: case.model(x)), r"scalar loss, got shape \(1, 3\)"),
    ],
    ids=["a parameter of none", "another module's", "no scalar"],
)
def test_what_does_not_fit_the_module_is_a_value_error(change, message):
    case = Case()
    change(case)
    with pytest.raises(ValueError, match=message):
        gradient_moment(case.losses(), case.params)


@pytest.mark.parametrize(
    "module", [lambda x: x, nn.Linear, "net", torch.ones(2)], ids=["function", "class", "str", "tensor"]
)
def test_a_module_is_an_nn_module(module):
    with pytest.raises(ValueError, match=r"expected module to be the network, an nn\.Module, got a "):
        sample_losses(lambda x: x.sum(), torch.ones(3), module=module)


@pytest.mark.parametrize("take", [sample_losses, backward_in_chunks])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(()), torch.ones(4)), "expected the loss to be a function of the batch, got a Tensor"),
        ((torch.sum, np.ones(4)), "expected tensors, a row for each sample, got a ndarray; make it one by torch.as_te"),
        ((torch.sum, [1.0, 2.0]), "expected tensors, a row for each sample, got a list"),
        ((torch.sum, torch.ones(())), "expected tensors of one length"),
        ((torch.sum,), "expected tensors of one length"),
        ((torch.dot, torch.ones(3), torch.ones(2)), r"expected tensors of one length, .*got lengths \[2, 3\]"),
    ],
)
def test_what_is_no_batch_is_one_clear_sentence(take, args, message):
    with pytest.raises(ValueError, match=message):
        take(*args)


def hugging_face(family: str, attention: str) -> nn.Module:
    """A tiny transformer of 3 classes, or of 9 words, without dropout."""
    transformers = pytest.importorskip("transformers")
    names = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names |= {"vocab_size": 9, "max_position_embeddings": 8, "attn_implementation": attention}
    torch.manual_seed(0)
    if family == "Llama":
        config = transformers.LlamaConfig(**names, bos_token_id=1, eos_token_id=1)
        return transformers.LlamaForCausalLM(config)
    names |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**names))


@pytest.mark.parametrize(("family", "attention"), [("Llama", "eager"), ("Llama", "sdpa"), ("Bert", "eager")])
def test_samples_with_an_attention_mask_are_those_one_by_one_or_refused_with_the_way_out(family, attention):
    """Some of these models ask whether a mask is all ones, which vmap cannot answer for each sample."""
    model = hugging_face(family, attention)
    params = list(model.parameters())
    ids, labels = torch.randint(1, 9, (5, 7)), torch.randint(3, (5,))
    mask = (torch.arange(7) < torch.tensor([[7], [5], [3], [7], [4]])).long()  # padding on the right

    def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        words = ids.masked_fill(mask == 0, -100)  # padding has no loss
        return model(input_ids=ids, attention_mask=mask, labels=words if family == "Llama" else labels).loss

    def alone(i: int) -> Tensor:
        """The gradient of a sample without its padding, by torch alone."""
        length = int(mask[i].sum())
        part = loss(ids[i : i + 1, :length], mask[i : i + 1, :length], labels[i : i + 1])
        grads = torch.autograd.grad(part, params, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads, strict=True)]
        )

    expected = torch.stack([alone(i) for i in range(5)])
    _, one_by_one = gradient_moment(sample_losses(loss, ids, mask, labels), params)
    torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-6)
    at_once = sample_losses(loss, ids, mask, labels, module=model)
    before, refusal = snapshot(model), ""
    try:
        _, found = gradient_moment(at_once, params)
    except RuntimeError as error:
        refusal = str(error)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    if refusal:
        assert (family, attention) != ("Llama", "eager")
        words = r"the gradients of samples cannot be taken at once, by torch.func.vmap \(.*\); leave module out, and .*"
        assert re.fullmatch(words, refusal)
    assert_untouched(model, before)


def test_what_vmap_cannot_run_is_an_error_and_leaves_everything_as_found():
    case = Case("batch_norm")
    before, states = snapshot(case.model), random_states()
    losses = sample_losses(
        lambda x, y: case.loss(x, y) * x.sum().item(), case.x, case.y, group_size=5, module=case.model
    )
    with pytest.raises(
        RuntimeError, match=r"cannot be taken at once, by torch\.func\.vmap \(.*\); leave module out"
    ) as met:
        gradient_moment(losses, case.params)
    assert "\n" not in str(met.value)
    assert_untouched(case.model, before)
    same_random_states(states)


@pytest.mark.parametrize("solver", ["gradients", "auto"])
@pytest.mark.parametrize(
    ("of", "message"),
    [("a copy", "reaches none of the parameters"), ("detached", "has no graph"), ("no_grad", "has no graph")],
)
def test_a_loss_that_does_not_reach_the_module_is_the_error_that_it_is_without(solver, of, message):
    net, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    other = copy.deepcopy(net)

    def loss(x, y):
        with torch.set_grad_enabled(of != "no_grad"):
            value = F.cross_entropy((other if of == "a copy" else net)(x), y)
        return value.detach() if of == "detached" else value

    said = []
    for module in (net, None):
        optimizer = NSGD(net.parameters(), lr=0.1, k=2, solver=solver)
        with pytest.raises(ValueError, match=message) as error:
            optimizer.refresh(sample_losses(loss, x, y, module=module))
        said.append(str(error.value))
        assert optimizer.refreshes == 0
    assert said[0] == said[1]


@pytest.mark.parametrize(("samples", "group_size"), [(8, 1), (9, 4)])
@pytest.mark.parametrize("at_once", [True, False])
def test_batch_norm_on_a_group_of_one_names_the_way_out(at_once, samples, group_size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    x, params = torch.randn(samples, 4), list(net.parameters())
    found, states = snapshot(net), random_states()

    def losses(group_size):
        return sample_losses(
            lambda x: net(x).square().mean(), x, group_size=group_size, module=net if at_once else None
        )

    with pytest.raises(
        ValueError, match=r"BatchNorm has no statistics of a group of one sample; pass .*group_size"
    ) as e:
        gradient_moment(losses(group_size), params)
    assert "\n" not in str(e.value)
    assert not hasattr(e.value, "__notes__")
    assert_untouched(net, found)
    same_random_states(states)
    assert gradient_moment(losses(3), params)[1].isfinite().all()
