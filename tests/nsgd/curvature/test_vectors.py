"""Parameters as one vector."""

from __future__ import annotations

import pytest
import torch

from nsgd.curvature.vectors import flatten, is_finite, split, vector_dtype


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bfloat16",), torch.float32),
        (("float16", "float32"), torch.float32),
        (("float32", "float64"), torch.float64),
    ],
)
def test_vectors_are_float32_or_float64(dtypes, expected):
    assert vector_dtype([torch.zeros(1, dtype=getattr(torch, d)) for d in dtypes]) == expected


def test_split_undoes_flatten():
    params = [torch.zeros(2, 3), torch.zeros(()), torch.zeros(4)]
    blocks = [torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for p in params]
    for block, again in zip(blocks, split(flatten(blocks, params), params), strict=True):
        assert torch.equal(block, again)
    assert [tuple(b.shape) for b in split(torch.zeros(5, 11), params)] == [(5, 2, 3), (5,), (5, 4)]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([1.0, 2.0], True),
        ([3e38, 3e38], True),  # the sum overflows
        ([1.0, float("nan")], False),
        ([float("inf"), 1.0], False),
        ([float("inf"), float("-inf")], False),
        ([], True),
    ],
)
def test_finite_is_what_every_entry_is(entries, expected):
    assert is_finite(torch.tensor(entries)) is expected
