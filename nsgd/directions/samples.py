"""Gradients of small groups of samples, and their second moment: directions that need no second derivative.

The moment has nearly the Hessian's outlying eigenvectors; for a log-likelihood and one sample a group it is the
empirical Fisher matrix (Martens 2020, Papyan 2020).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.overrides import TorchFunctionMode

from nsgd.curvature.checks import count_or_none, not_zero, whole_number
from nsgd.curvature.guard import untouched
from nsgd.curvature.hessian import (
    NO_GRAPH,
    NOT_REACHED,
    SPARSE,
    Closure,
    Losses,
    check_finite,
    checked_pairs,
    gradient_of,
)
from nsgd.curvature.vectors import checked_params, split, vector_dtype
from nsgd.directions.batch_dim import BatchDim, as_given, check_loss, samples_first
from nsgd.directions.one_dtype import OneDtype
from nsgd.directions.passes import PassHook

_SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_CUT_ELSEWHERE = (
    "batch_dim says along which dimension samples lie, and what cannot be cut into samples (a graph, offsets, targets "
    "end to end) gives directions from training gradients, or from products (solver='lanczos')"
)
_MOST_AT_ONCE = 1 << 28  # entries of the gradients that are computed at once: 1 GiB in float32


class SampleLosses(list[tuple[Closure, int]]):
    """Mean losses of groups of samples, as pairs of closure and sample count; none is computed yet.

    Args and errors: as :func:`sample_losses`.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        tensors: Sequence[Tensor],
        group_size: int,
        module: nn.Module | None,
        chunk_size: int | None = None,
        batch_dim: BatchDim = 0,
    ) -> None:
        check_loss(loss)
        tensors, dims = samples_first(tensors, batch_dim)
        group_size = whole_number("group_size", group_size, least=1, most=2**31 - 1)
        if module is not None and not isinstance(module, nn.Module):
            raise ValueError(f"expected module to be the network, an nn.Module, got a {type(module).__name__}")
        chunk_size = checked_chunk_size(chunk_size)
        if chunk_size is not None and module is None:
            raise ValueError(
                f"expected no chunk_size without module, got {chunk_size}: the groups are then taken one by one; leave "
                "it out, or pass the network as module"
            )
        self.tensors, self.group_size, self.module, self.chunk_size = tensors, group_size, module, chunk_size

        def loss_of(*parts: Tensor) -> Tensor:
            own = tuple(map(as_given, parts, dims))  # copies, which the loss may change
            try:
                return loss(*own)
            except Exception as error:
                if "more than 1 value per channel" in str(error) and len(parts[0]) == 1:
                    raise ValueError(
                        "BatchNorm has no statistics of a group of one sample; pass a larger group_size, such as 8, "
                        f"that leaves no group of one (torch: {error})"
                    ) from error
                shapes = ", ".join(str(tuple(part.shape)) for part in own)
                error.add_note(f"this is the loss of a group of samples, tensors of shape {shapes}; {_CUT_ELSEWHERE}")
                raise

        self.loss = loss_of

        def pair(parts: tuple[Tensor, ...]) -> tuple[Closure, int]:
            return lambda: loss_of(*parts), len(parts[0])

        super().__init__(
            pair(parts) for parts in zip(*(torch.split(tensor, group_size) for tensor in tensors), strict=True)
        )


def sample_losses(
    loss: Callable[..., Tensor],
    *tensors: Tensor,
    group_size: int = 1,
    module: nn.Module | None = None,
    chunk_size: int | None = None,
    batch_dim: BatchDim = 0,
) -> SampleLosses:
    """Losses of small groups of samples: what directions by gradients come from.

    ``sample_losses(lambda x, y: loss_fn(model(x), y), x, y, module=model)``; no loss is computed yet.

    Args:
        loss: Mean loss of the samples that it is given. What it changes in them, and in the modules that it runs, is as
            found afterwards; what it changes elsewhere, before any module has run, is so for ``module`` alone.
        tensors: What it is given, cut along the first dimension, or ``batch_dim``; one row a sample.
        group_size: Samples in a group. One is best; BatchNorm needs some.
        module: The network that the loss runs, with the parameters that are optimized. Then the gradients of all groups
            are computed at once by ``torch.func.vmap``: as one batch takes, where one by one they leave the machine
            idle (2 to 4 times faster on small convolutional networks and transformers on the CPU). Leave it out for a
            network that vmap cannot run (GRU, ``.item()`` in the forward pass).
        chunk_size: Groups that are computed at once, with ``module``: what their activations and gradients may take of
            memory, beside the row of gradients that each group leaves. None is as many as have gradients of 1 GiB, and
            one at least. The gradients do not depend on it, but for which random numbers each group draws. Where that
            is more than memory holds, it is halved, and said.
        batch_dim: The dimension that counts samples: one for all tensors, or one for each. A time-major sequence, as
            ``nn.LSTM`` takes it, has 1; with one label a sequence that is ``batch_dim=(1, 0)``.

    Raises:
        ValueError: If there are no tensors or no samples, a tensor has no such dimension, lengths differ,
            ``group_size`` or ``chunk_size`` is no count, ``module`` no module, or there is a ``chunk_size`` without it.
    """
    return SampleLosses(loss, tensors, group_size, module, chunk_size, batch_dim)


def checked_chunk_size(chunk_size: Any) -> int | None:
    """A count of any library as Python's own, or None; a ValueError for anything else."""
    return count_or_none("chunk_size", chunk_size, means="what 1 GiB holds")


def gradient_moment(losses: Losses, params: Sequence[Tensor], *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Second moment of the gradients of groups of samples, as weights (m,) that sum to 1 and vectors (m, P).

    No product, and no graph of second order: it costs one gradient of the samples. The smaller the groups, the less it
    is drawn to the mean gradient, which need not be sharp. Modules and random state stay as found, ``.grad`` too.
    Groups whose loss is NaN, such as a sentence without a label, are left out where two or more others are there.

    Args:
        losses: Pairs of closure and sample count, one for each of two or more groups, as :func:`sample_losses` makes
            them.
        params: The parameters, P entries together.
        scale: What the losses were multiplied by; taken out.

    Raises:
        ValueError: If there are fewer than two groups, a loss is no scalar that reaches the parameters, or a parameter
            is not one of the module's.
        FloatingPointError: If a loss or a gradient is NaN or infinite.
    """
    losses, params, scale = checked_groups(losses), checked_params(params), not_zero("scale", scale)
    size = sum(p.numel() for p in params)
    with torch.inference_mode(False):  # what is written to
        rows = torch.empty(len(losses), size, dtype=vector_dtype(params), device=params[0].device)
    found = getattr(losses, "chunk_size", None)
    values, counts = write_gradients(losses, params, split(rows, params), scale=scale)
    say_smaller(losses, found, lambda sentence: warnings.warn(sentence, stacklevel=4))
    known = ~values.isnan()
    if not known.all() and known.sum() > 1:  # the mean over no label at all, where a sample has none
        values, rows, counts = values[known], rows[known.to(rows.device)], counts[known.cpu()]
    check_finite(values, rows)  # all at once: each check waits for the device
    return counts / counts.sum(), rows


def checked_groups(losses: Losses) -> Losses:
    """Pairs of closure and sample count, of two groups or more; a ValueError for anything else."""
    pairs = checked_pairs(losses)
    if len(pairs) < 2:
        raise ValueError(
            f"expected the losses of two or more groups of samples, got {len(pairs)}: a single gradient is a single "
            "direction; split the samples, or take solver='lanczos'"
        )
    return losses if isinstance(losses, SampleLosses) else pairs


def write_gradients(
    losses: Losses,
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    *,
    scale: float = 1.0,
    forward: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of m groups of samples into rows; no host sync of its own.

    Args:
        losses: As :func:`checked_groups` returns them.
        params: The parameters.
        rows: Where the gradients go, a tensor (m, *shape) for each parameter, of any layout and device.
        scale: What the losses were multiplied by; taken out of the gradients.
        forward: What the forward passes run in, and the backward passes do not.

    Returns:
        Losses (m,), still multiplied by it, and sample counts (m,), float64 on the CPU.

    Raises:
        ValueError: If a loss is no scalar that reaches the parameters, or a parameter is not one of the module's.
    """
    counts = torch.tensor([n for _, n in losses], dtype=torch.float64, device="cpu")
    forward = nullcontext() if forward is None else forward
    if isinstance(losses, SampleLosses) and losses.module is not None:
        values = _at_once(losses, losses.module, params, rows, forward)
    else:
        values = _one_by_one(losses, params, rows, forward)
    if scale != 1.0:
        for row in rows:
            row /= scale
    return values, counts


def _one_by_one(
    pairs: Losses, params: Sequence[Tensor], rows: Sequence[Tensor], forward: AbstractContextManager[Any]
) -> Tensor:
    """Losses (m,) of groups, a backward pass for each."""
    values = []
    with torch.inference_mode(False), torch.enable_grad(), untouched(device=params[0].device):
        for i, (closure, _) in enumerate(pairs):
            with forward:
                loss = closure()
            gradient = gradient_of(loss, params, create_graph=False)
            _write(rows, slice(i, i + 1), [g if g is None else g[None] for g in gradient])
            values.append(loss.detach().reshape(()))
    return torch.stack(values)


@torch.no_grad()
def _write(rows: Sequence[Tensor], which: slice, blocks: Sequence[Tensor | None]) -> None:
    """Copy gradients, one block a parameter, to their rows; zero where there is none."""
    for row, block in zip(rows, blocks, strict=True):
        if block is None:
            row[which].zero_()
        else:
            row[which].copy_(block)


def _at_once(
    losses: SampleLosses,
    module: nn.Module,
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    forward: AbstractContextManager[Any],
) -> Tensor:
    """Losses (m,) of groups, by a vectorised backward pass for each chunk; a smaller last group on its own."""
    network = _Loss(losses.loss, module)
    names: dict[Tensor, str] = {p: name for name, p in network.named_parameters()}
    foreign = sum(p not in names for p in params)
    if foreign:
        raise ValueError(
            f"expected module to hold the parameters that are optimized, {foreign} of {len(params)} are not its own; "
            "pass the network that the optimizer was given, or leave module out"
        )
    if any(not isinstance(hook, PassHook) for p in params for hook in (p._backward_hooks or {}).values()):
        raise ValueError("a parameter has a gradient hook, which vmap would pass by; leave module out")
    size = losses.group_size
    whole = len(losses.tensors[0]) // size  # groups
    parts = [tensor[: whole * size].reshape(whole, size, *tensor.shape[1:]) for tensor in losses.tensors]

    def value(trained: dict[str, Tensor], buffers: dict[str, Tensor], *part: Tensor) -> Tensor:
        with forward, OneDtype(), _NoNewData():
            loss: Tensor = functional_call(network, {**trained, **others, **buffers}, part)
        if loss.numel() != 1:
            raise ValueError(f"expected a scalar loss, got shape {tuple(loss.shape)}; reduce it, as with .mean()")
        reached.append(loss.requires_grad)  # with respect to what is trained here, and nothing else
        return loss.reshape(())

    with torch.inference_mode(False), torch.enable_grad(), untouched(network, device=params[0].device):
        trained = {names[p]: p.detach() for p in params if p.requires_grad}
        others = {name: p.detach() for p, name in names.items() if name not in trained}
        # Each group has buffers of its own, such as the statistics that BatchNorm updates in place. One that is larger
        # than all parameters, a memory bank, may be read but not written to.
        most = sum(p.numel() for p in params)
        buffers = {name: b for name, b in network.named_buffers() if b.numel() <= most}
        dims = (None, *[0] * (1 + len(parts)))
        run = vmap(grad_and_value(value), in_dims=dims, randomness="different")
        values: list[Tensor] = []
        reached: list[bool] = []
        step = min(whole, losses.chunk_size or max(1, _MOST_AT_ONCE // max(1, most)))
        start = 0
        while start < whole:
            chunk = slice(start, min(start + step, whole))
            own_buffers = {name: b.repeat(chunk.stop - start, *[1] * b.ndim) for name, b in buffers.items()}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")  # still faster than one by one
                try:
                    grads, part = run(trained, own_buffers, *(tensor[chunk] for tensor in parts))
                except RuntimeError as error:
                    if _is_out_of_memory(error):
                        if step == 1:
                            raise
                        losses.chunk_size = step = (step + 1) // 2
                        continue
                    reason = str(error).strip().splitlines()[0]
                    if "Sparse" in reason:  # also one by one
                        raise ValueError(SPARSE) from error
                    raise RuntimeError(
                        f"the gradients of samples cannot be taken at once, by torch.func.vmap ({reason}); leave "
                        "module out, and they are taken one by one"
                    ) from error
            _check_reached(part, params)
            if not any(reached):
                raise ValueError(NOT_REACHED if part.requires_grad else NO_GRAPH)
            values.append(part.detach())
            _write(rows, chunk, [grads[names[p]] if p.requires_grad else None for p in params])
            del grads, part  # before the next chunk takes as much
            start = chunk.stop
        if whole < len(losses):
            last = _one_by_one(losses[whole:], params, [row[whole:] for row in rows], forward)
            values.append(last.to(values[0]) if values else last)
    return torch.cat(values)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory is what was missing; not every device has torch's own error for that."""
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def say_smaller(losses: Losses, found: int | None, say: Callable[[str], None]) -> None:
    """Say it, where memory was too small for as many groups at once as were wanted.

    Args:
        losses: Whose gradients have been computed.
        found: Their ``chunk_size`` before.
        say: Is given a sentence.
    """
    now = getattr(losses, "chunk_size", None)
    if now != found:
        say(
            f"out of memory with more groups of samples at once, {now} of {len(losses)} were taken at a time, with the "
            f"same result; pass chunk_size={now} to sample_losses, or fewer samples"
        )


def _check_reached(values: Tensor, params: Sequence[Tensor]) -> None:
    """Raise a ValueError where losses reach parameters by way of something else than the module's, as detached."""
    if not values.requires_grad:
        return
    used = [p for p in params if p.requires_grad]
    if any(g is not None for g in torch.autograd.grad(values.sum(), used, allow_unused=True)):
        raise ValueError(
            "the loss reaches parameters by references outside of the module, such as a list for a penalty; "
            "leave module out"
        )


class _NoNewData(TorchFunctionMode):
    """Inside, no tensor is given other data: where that is one of many at once it outlives them, and torch crashes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func == _SET_DATA:
            raise RuntimeError("the forward pass gives a tensor other data, by `tensor.data = `")
        return func(*args, **(kwargs or {}))


class _Loss(nn.Module):
    """A loss as a module, so that the parameters of the network in it can be replaced."""

    def __init__(self, loss: Callable[..., Tensor], module: nn.Module) -> None:
        super().__init__()
        self.loss, self.module = loss, module

    def forward(self, *parts: Tensor) -> Tensor:
        loss: Tensor = self.loss(*parts)
        return loss
