"""Samples of a batch of any kind: how many there are, and some of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nsgd.directions.batch_dim import BatchDim, as_given
from nsgd.directions.batch_dim import samples_first as first_of


def batch_size_of(batch: Any) -> int | None:
    """Samples in a batch: the first length of its first tensor; None if it holds none, or is of a kind of its own."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim > 0), None)


def is_cuttable(batch: Any) -> bool:
    """Whether a batch can be cut into samples without a doubt: one length for all tensors, and no list of structures.

    Lists of images of several sizes, and targets in a list of dicts, are batches of another kind.
    """
    lengths = {len(tensor) for tensor in _tensors(batch) if tensor.ndim > 0}
    return len(lengths) == 1 and not _has_structures(batch, lengths.pop())


def _has_structures(batch: Any, size: int) -> bool:
    if isinstance(batch, Mapping):
        return any(_has_structures(value, size) for value in batch.values())
    if is_dataclass(batch):
        return any(_has_structures(getattr(batch, field.name), size) for field in fields(batch))
    if isinstance(batch, PackedSequence):
        return True
    if isinstance(batch, list | tuple):
        holds = any(isinstance(value, Tensor | list | tuple | Mapping) for value in batch)
        return (isinstance(batch, list) and len(batch) == size and holds and not _is_pair(batch, size)) or any(
            _has_structures(value, size) for value in batch
        )
    return False


def _is_pair(batch: list[Any], size: int) -> bool:
    """A list of tensors of the batch's own length is a batch of its columns, as default_collate makes it."""
    return all(isinstance(value, Tensor) and value.ndim > 0 and len(value) == size for value in batch)


def some_samples(batch: Any, samples: slice) -> Any:
    """Some samples of a batch: every tensor and plain list as long as the batch is cut, the rest is kept."""
    size = batch_size_of(batch)
    return batch if size is None else _cut(batch, size, samples)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
    elif is_dataclass(batch):
        for field in fields(batch):
            if field.init:  # the others are made from these
                yield from _tensors(getattr(batch, field.name))


def _cut(batch: Any, size: int, samples: slice) -> Any:
    def items_of(items: Any) -> Any:
        plain = not any(isinstance(value, Tensor | list | tuple | Mapping) for value in items)
        return items[samples] if len(items) == size and plain else None  # one plain item a sample, for example names

    return _rebuilt(batch, lambda t: t[samples] if t.ndim > 0 and len(t) == size else t, items_of)


def samples_first(batch: Any, batch_dim: BatchDim) -> tuple[Any, tuple[int, ...]]:
    """A batch whose tensors have their samples along the first dimension, and where these were in each.

    Tensors without dimensions are kept, and have none of these. For 0 the batch is as it was.

    Raises:
        ValueError: If a tensor lacks the dimension, or lengths differ.
    """
    if batch_dim == 0:
        return batch, ()
    moved, dims = first_of([tensor for tensor in _tensors(batch) if tensor.ndim > 0], batch_dim)
    return _with_tensors(batch, moved), dims


def as_it_was(batch: Any, dims: tuple[int, ...]) -> Any:
    """A copy of a batch from :func:`samples_first`, or of some of its samples, with these where they were."""
    if not dims:
        return batch
    tensors = (tensor for tensor in _tensors(batch) if tensor.ndim > 0)
    return _with_tensors(batch, [as_given(tensor, dim) for tensor, dim in zip(tensors, dims, strict=True)])


def _with_tensors(batch: Any, tensors: list[Tensor]) -> Any:
    """A batch with these in place of its tensors that have a dimension, in their order."""
    rest = iter(tensors)
    return _rebuilt(batch, lambda tensor: next(rest) if tensor.ndim > 0 else tensor, lambda _: None)


def _rebuilt(batch: Any, tensor_of: Callable[[Tensor], Tensor], items_of: Callable[[Any], Any]) -> Any:
    """A batch of its own class with other tensors, and other lists where ``items_of`` has one."""
    if isinstance(batch, Tensor):
        return tensor_of(batch)
    if isinstance(batch, Mapping):
        parts = {key: _rebuilt(value, tensor_of, items_of) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return parts
        same = copy.copy(batch)  # of its own class, attributes and all
        same.update(parts)
        return same
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(
            batch, **{f.name: _rebuilt(getattr(batch, f.name), tensor_of, items_of) for f in fields(batch) if f.init}
        )
    if isinstance(batch, list | tuple):
        others = items_of(batch)
        if others is not None:
            return others
        items = [_rebuilt(value, tensor_of, items_of) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch
