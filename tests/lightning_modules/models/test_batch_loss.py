"""batch_loss: the right loss, its graph, and nothing left behind; batches of every nesting cut to a slice."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from strangers import Everything, ManualSmooth, ManualWithCurvature, Regression, Smooth, classes
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.data.cutting import batch_size_of, some_samples
from lightning_modules.models.batch_loss import batch_loss

SGD = partial(torch.optim.SGD, lr=0.1)


class Logs(Everything):
    """Keeps what it logs, with a `log` of its own on the instance."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.logged: list[str] = []
        self.log = lambda name, *_, **__: self.logged.append(name)
        self.log_dict = lambda values, **_: self.logged.extend(values)


class Breaks(Logs):
    """Changes everything, then raises."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if "armed" in vars(self):
            self.eval()
            self.surprise = torch.ones(())
            raise RuntimeError("as planned")
        return loss


def batch(samples: int = 16) -> list[Tensor]:
    return [t[:samples] for t in classes().tensors]


def everything(module: Everything, random_state: Any) -> Any:
    names = sorted(vars(module))
    modes = [m.training for m in module.modules()]
    return module.plain_state(), module.logged, [id(p) for p in module.parameters()], names, modes, random_state()


@pytest.mark.parametrize("steps", [0, 1, 3], ids="{} steps before".format)
def test_nothing_is_left_behind(random_state, steps):
    module = Logs()
    for i in range(steps):  # metrics that have states, and compute groups that have formed
        module.training_step(batch(), i)
    module.net[3].eval()  # a mode of its own
    groups = dict(module.metrics.compute_groups) if steps else None
    before = everything(module, random_state)
    buffers = {name: id(b) for name, b in module.named_buffers()}
    batch_loss(module, batch(5))
    assert everything(module, random_state) == before
    assert {name: id(b) for name, b in module.named_buffers()} == buffers
    assert groups is None or dict(module.metrics.compute_groups) == groups
    assert all(p.grad is None for p in module.parameters())


def test_nothing_is_left_behind_by_an_exception(random_state):
    module = Breaks()
    module.training_step(batch(), 0)
    module.armed = True
    before = everything(module, random_state)
    with pytest.raises(RuntimeError, match="as planned"):
        batch_loss(module, batch())
    assert everything(module, random_state) == before
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_metrics_go_on_as_if_nothing_had_happened():
    """Also their results, which compute groups share between metrics."""
    alone, disturbed = Logs(), Logs()
    for module in (alone, disturbed):
        torch.manual_seed(4)
        for i in range(3):
            if module is disturbed:
                batch_loss(module, batch(7))
            module.training_step(batch(), i)
            if module is disturbed:
                batch_loss(module, batch(9))
    assert alone.plain_state() == disturbed.plain_state()
    for name, value in alone.metrics.compute().items():
        assert torch.equal(value, disturbed.metrics.compute()[name])
    assert torch.equal(alone.losses.compute(), disturbed.losses.compute())


CONTAINERS = {
    "list": lambda: [],
    "list of lists": lambda: [[], []],
    "dict of lists": lambda: {"a": []},
    "defaultdict": lambda: defaultdict(list),
    "deque": lambda: deque(maxlen=3),
    "set": lambda: set(),
    "dict of dicts": lambda: {"a": {"b": 1}},
}


def _grow(container: Any) -> None:
    if isinstance(container, set):
        container.add(len(container))
    elif isinstance(container, list | deque):
        (container[0] if container and isinstance(container[0], list) else container).append(1)
    elif isinstance(container.get("a"), dict):
        container["a"]["b"] += 1
    else:
        container["a"].append(1)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_python_containers_of_the_module_do_not_grow(kind):
    class Gathers(Smooth):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            _grow(self.container)
            return super().training_step(batch, batch_idx)

    module, fresh = Gathers(SGD), CONTAINERS[kind]()
    module.container = CONTAINERS[kind]()
    batch_loss(module, [t[:8] for t in classes(16, 2, 2).tensors])
    assert module.container == fresh


def test_the_loss_and_its_gradient_are_those_of_the_training_step():
    module = Logs()
    params = list(module.parameters())
    torch.manual_seed(8)
    loss = batch_loss(module, batch())
    found = torch.autograd.grad(loss, params)
    again = batch_loss(module, batch())
    expected = module.training_step(batch(), 0)  # the same dropout: random state was given back
    assert loss.item() == again.item() == expected.item()
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(expected, params), strict=True))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_graph_is_there_also_where_gradients_are_off(guard):
    module, data = Smooth(SGD), [t[:8] for t in classes(16, 2, 2).tensors]
    expected = torch.autograd.grad(module.training_step(data, 0), list(module.parameters()))
    with guard():
        loss = batch_loss(module, data)
    found = torch.autograd.grad(loss, list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_curvature_loss_is_preferred_to_the_training_step():
    class Own(Smooth):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("not this")

        def curvature_loss(self, batch: list[Tensor]) -> Tensor:
            self.log("nothing", 1.0)
            return F.mse_loss(self.net(batch[0]), torch.zeros(8, 2))

    module = Own(SGD)
    x = classes(16, 2, 2).tensors[0][:8]
    assert batch_loss(module, [x]).item() == pytest.approx(module.net(x).square().mean().item())


def test_a_manual_module_needs_a_curvature_loss():
    data = [t[:8] for t in classes(16, 2, 2).tensors]
    with pytest.raises(ValueError, match=r"ManualSmooth optimizes manually.*define curvature_loss"):
        batch_loss(ManualSmooth(SGD), data)
    module = ManualWithCurvature(SGD)
    assert batch_loss(module, data).item() == F.cross_entropy(module.net(data[0]), data[1]).item()


def test_a_step_may_leave_out_the_index_and_return_a_dictionary():
    module = Regression(SGD)
    data = {"x": torch.randn(6, 4), "y": torch.randn(6, 1)}
    assert batch_loss(module, data).item() == F.mse_loss(module.net(data["x"]), data["y"]).item()


def test_a_step_that_takes_any_arguments_gets_the_index_as_from_lightning(make_trainer):
    class Any_(Smooth):
        def training_step(self, *args: Any) -> Tensor:
            batch, _ = args
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module, data = Any_(SGD), classes(16, 2, 2)
    make_trainer().fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    assert batch_loss(module, list(data.tensors)).requires_grad


@pytest.mark.parametrize(("output", "got"), [(None, "NoneType"), ({"other": 1}, "NoneType"), (1.5, "float")])
def test_a_step_without_a_loss_is_an_error(output, got):
    class Silent(Smooth):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return output

    with pytest.raises(ValueError, match=f"expected training_step of Silent to return a loss.*got {got}"):
        batch_loss(Silent(SGD), [torch.zeros(2, 2)])


# -- slices ----------------------------------------------------------------------------------------------------------


class Graph(NamedTuple):
    nodes: Tensor
    names: list[str]


X, Y, CONSTANT = torch.arange(12.0).view(6, 2), torch.arange(6), torch.ones(3)
NAMES = [f"image {i}" for i in range(6)]


@pytest.mark.parametrize(
    ("whole", "cut"),
    [
        (X, X[:2]),
        ((X, Y), (X[:2], Y[:2])),
        ([X, Y], [X[:2], Y[:2]]),
        ({"x": X, "more": (Y, CONSTANT)}, {"x": X[:2], "more": (Y[:2], CONSTANT)}),
        (Graph(X, NAMES), Graph(X[:2], NAMES[:2])),
        ([{"x": X}, NAMES, 3, None, torch.tensor(1.0)], [{"x": X[:2]}, NAMES[:2], 3, None, torch.tensor(1.0)]),
        ((X, [Y, {"y": Y}], "six of"), (X[:2], [Y[:2], {"y": Y[:2]}], "six of")),
    ],
    ids=["tensor", "tuple", "list", "dict", "NamedTuple", "names and numbers", "nested"],
)
def test_the_some_samples_of_a_nested_batch(whole, cut):
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return ("tensor", value.tolist())
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return (type(value), [plain(v) for v in value]) if isinstance(value, list | tuple) else value

    assert batch_size_of(whole) == 6
    assert batch_size_of(some_samples(whole, slice(2))) == 2
    assert plain(some_samples(whole, slice(2))) == plain(cut)
    assert plain(some_samples(whole, slice(9))) == plain(whole)


@pytest.mark.parametrize("nothing", ["text", 3, [], {"a": torch.tensor(1.0)}])
def test_a_batch_without_samples_has_no_size_and_stays_whole(nothing):
    assert batch_size_of(nothing) is None
    assert some_samples(nothing, slice(2)) is nothing


def test_a_dict_or_a_dataclass_of_somebody_else_keeps_its_class():
    class Named(dict):
        @property
        def x(self):
            return self["x"]

    @dataclass
    class Pair:
        x: torch.Tensor
        name: str

    assert some_samples(Named(x=torch.arange(6)), slice(2)).x.tolist() == [0, 1]
    pair = some_samples(Pair(torch.arange(6), "six"), slice(2))
    assert (pair.x.tolist(), pair.name) == ([0, 1], "six")
