"""Anything at all in the place of one argument: an error is one sentence of ours, and nothing is changed."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from input_cases import CALLS, INNER, Place, public
from time_limit import in_time
from torch import nn

import nsgd

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 50),
    st.sampled_from([-(2**70), 10**30, 10**400, 1e300, -1e300, 1e-300]),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.lists(st.floats(-2, 2), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from(
        [
            torch.float32,
            object(),
            np.float32(0.5),
            np.int64(2),
            np.bool_(True),
            np.array([1.0, 2.0]),
            np.array(["a"]),
            1 + 2j,
            (),
            {1, 2},
            [None],
            [torch.ones(2)],
            [(1, 2)],
            [10**400],
            range(3),
            lambda *_: None,
            lambda *_: torch.ones(3),
            nn.Linear(2, 2),
        ]
    ),
    st.sampled_from(
        [
            torch.empty(0),
            torch.empty(0, 3),
            torch.ones(()),
            torch.ones(()).requires_grad_(),
            torch.ones(2),
            torch.ones(3),
            torch.zeros(3),
            -torch.ones(3),
            torch.ones(2, 3),
            torch.ones(2, 2, 2),
            torch.tensor(float("nan")),
            torch.full((3,), float("nan")),
            torch.tensor([1.0, float("inf"), -1.0]),
            torch.ones(3, dtype=torch.complex64),
            torch.ones(3, dtype=torch.float16),
            torch.ones(3, dtype=torch.float64),
            torch.ones(3, dtype=torch.bool),
            torch.ones(2, 2, dtype=torch.int64),
            torch.eye(3).to_sparse(),
            torch.ones(3, device="meta"),
        ]
    ),
)
SECONDS = 20  # for one call, some thousand times what it takes


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def is_ours(error, changed):
    """Whether an error is one sentence of ours; or torch's own, or the user's, where it is theirs to say it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    path, on_purpose = last.filename, str(last.line).startswith("raise ")
    if str(Path(__file__).parent) in path:  # raised in what stands for a user's loss
        return True
    if "torch/nn/modules" in path:  # raised in a module that was given for one
        return True
    own = str(Path(nsgd.__file__).parent) in path
    torchs_own = "torch/optim" in path and changed in ("lr", "params", "weight_decay", "param_group", "state_dict")
    good = isinstance(error, ValueError | TypeError | FloatingPointError) and ((own and on_purpose) or torchs_own)
    return good and "\n" not in str(error) and len(str(error)) > 15


def exchanged(whole, value, data):
    """A value in the place of a whole, or of something inside it, where that is a dictionary or a list."""
    inside = list(whole) if isinstance(whole, dict) else range(len(whole)) if type(whole) is list else ()
    if not inside or data.draw(st.booleans()):
        return value
    place, same_kind = data.draw(st.sampled_from(inside)), copy.copy(whole)
    same_kind[place] = exchanged(whole[place], value, data)
    return same_kind


SEEN = Counter()  # calls by what became of them, over the whole module


def tried(name, data):
    """One call with anything in the place of one argument, or of one value in one of them that is a dictionary."""
    place = Place()
    function, make = CALLS[name]
    arguments = make(place)
    changed = data.draw(st.sampled_from([key for key in arguments if key != "optimizer" or name == "damp"]))
    value = data.draw(ANYTHING)
    value = copy.deepcopy(value) if isinstance(value, torch.Tensor) else value
    arguments[changed] = value = exchanged(arguments[changed], value, data)
    before = place.state()
    said = met = None
    try:
        with warnings.catch_warnings(), in_time(SECONDS):
            warnings.simplefilter("ignore")
            function(**arguments)
    except Exception as error:
        said, met = f"{type(error).__name__}: {error}", error
    after = place.state()
    assert met is None or is_ours(met, changed), (
        name,
        changed,
        value,
        said,
        traceback.extract_tb(met.__traceback__)[-1],
    )
    kept = ["random", "modes"] if met is None else list(before)
    if name == "drawn_mse_loss":
        kept.remove("random")  # from which it draws
    elif name == "backward_in_chunks" and met is not None:
        kept.remove("grads")  # of the parts before the one that failed
    for kind in kept:
        assert same(before[kind], after[kind]), (name, changed, value, said, kind)
    assert same(before["tensors"][: len(place.params)], after["tensors"][: len(place.params)])
    SEEN["taken" if met is None else "refused"] += 1


QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))


def counted(record_property, run):
    """Run an example after another, and say how many there were."""
    before = SEEN.total()
    try:
        run()
    finally:
        record_property("reliability: bad inputs to public functions", SEEN.total() - before)


@pytest.mark.parametrize("name", CALLS)
def test_anything_in_the_place_of_an_argument(record_property, name):
    @QUICK
    @given(data=st.data())
    def run(data):
        tried(name, data)

    counted(record_property, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_anything_in_the_place_of_an_argument_for_long(record_property, name):
    @LONG
    @given(data=st.data())
    def run(data):
        tried(name, data)

    counted(record_property, run)


def test_everything_that_is_public_is_tried():
    """A new function needs a case, or a word that others check what it is given."""
    found = set(public())
    assert len(found) > 50
    assert found - set(CALLS) == set()


def test_what_is_called_inner_is_there():
    for module, names in INNER.items():
        assert [name for name in names if not hasattr(__import__(module, fromlist=["*"]), name)] == []


@pytest.mark.parametrize("name", CALLS)
def test_the_arguments_that_one_is_exchanged_in_are_good(name):
    """Or a refusal would be of another one."""
    function, make = CALLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(**make(Place()))
