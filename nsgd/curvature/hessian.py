"""Hessian-vector products of a loss, as plain callables from (P,) to (P,).

P counts the entries of all parameters, in the order in which they are given. A product on a kept graph costs
about two gradients (Pearlmutter 1994): the graph of the gradient is built once and differentiated again for
every vector. Over several batches the graph is rebuilt for each product, at three gradients, so that only one
batch's graph is in memory at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.checks import not_zero, shown
from nsgd.curvature.guard import RandomState, untouched
from nsgd.curvature.vectors import checked_params, flatten, is_finite, split, vector_dtype

HVP = Callable[[Tensor], Tensor]
Closure = Callable[[], Tensor]
Losses = Sequence[tuple[Closure, int]]

NO_GRAPH = (
    "the loss has no graph (it does not require a gradient); pass it as the model computed it, not detached and not "
    "under torch.no_grad()"
)
NOT_REACHED = (
    "the loss reaches none of the parameters; pass the parameters of the model that computed it, and the loss of that "
    "model"
)
NO_SHARE = (
    "the directions have no share in the parameter {}, whose gradients are zero on the samples; usual causes are a "
    "time-major batch that is cut along time (pass batch_dim), activation checkpointing by use_reentrant=True behind a "
    "frozen stem (pass use_reentrant=False), and a parameter that the loss does not use"
)
SPARSE = "expected dense gradients, got a sparse one; build the embedding with sparse=False"


@dataclass(frozen=True)
class LossHessian:
    """The Hessian of one loss at one point, with what its products cost."""

    hvp: HVP  # (P,) -> (P,)
    gradient: Tensor  # (P,)
    product_cost: int  # gradients of work in one product: 2 on a kept graph, 3 on a rebuilt one
    unreached: frozenset[int]  # numbers of the trainable parameters that the loss does not reach

    def cost(self, hvps: int) -> float:
        """Gradients of work, on this sample, in the gradient and ``hvps`` products."""
        return 1.0 + self.product_cost * hvps


@contextmanager
def loss_hessian(
    loss: Tensor | Closure | Losses, params: Iterable[Tensor], *, scale: float = 1.0
) -> Iterator[LossHessian]:
    """Open the Hessian of a loss; its graph is freed on leaving, also by an exception.

    ``.grad``, parameters, buffers, modes and random state stay as found. Modules are recognised when they
    first run, so a closure that itself calls ``model.eval()`` has to undo that itself. Hooks that change gradients
    (``Tensor.register_hook``, full backward hooks) change the products as well.

    Args:
        loss: One of: the loss itself, with its graph, which stays usable for ``loss.backward()``; a closure that
            computes it, called once; or pairs of closure and sample count, one for each batch, whose mean losses
            are weighted by the counts. These are called once for every product, with the same random state each
            time, so that dropout masks repeat and the operator is one fixed symmetric matrix.
        params: The parameters, P entries together. Those that the loss does not reach have zero curvature.
        scale: What the loss was multiplied by (loss scaling, accumulation); taken out of every result.

    Yields:
        The gradient and the products, in float32, or in float64 if any parameter is.

    Raises:
        ValueError: If the loss is no scalar, has no graph or reaches none of the parameters; or if there are no
            parameters, none that require a gradient, or no samples.
        FloatingPointError: If the loss or its gradient is NaN or infinite.
        RuntimeError: If an operation in the loss has no double backward; the message names the way out.
    """
    params, scale = checked_params(params), not_zero("scale", scale)
    if any(p.is_meta for p in params):
        raise ValueError(
            "got parameters on the device meta, without values; give them some, with to_empty() and a load"
        )
    if isinstance(loss, Tensor):
        source = _kept(loss, params, scale)
    elif callable(loss):
        with torch.inference_mode(False), torch.enable_grad(), untouched(device=params[0].device):
            value = loss()
        source = _kept(value, params, scale)
        del value
    else:
        source = _rebuilt(loss, params, scale)
    try:
        yield next(source)
    finally:
        source.close()


def _kept(loss: Tensor, params: list[Tensor], scale: float) -> Generator[LossHessian]:
    # Products of checkpointed activations run modules again: those too leave no trace.
    with untouched(device=params[0].device):
        grads: list[Tensor | None] = gradient_of(loss, params)
    gradient = flatten(grads, params) / scale
    check_finite(loss, gradient)
    is_open = True

    def hvp(vector: Tensor) -> Tensor:
        if not is_open:
            raise RuntimeError("the graph of this loss is freed; take products inside `with loss_hessian(...)` only")
        with untouched(device=params[0].device):
            return _product(grads, params, vector) / scale

    try:
        yield LossHessian(hvp, gradient, product_cost=2, unreached=_unreached(grads, params))
    finally:
        is_open = False
        grads.clear()  # whoever still holds hvp does not hold the graph


def _rebuilt(losses: Losses, params: list[Tensor], scale: float) -> Generator[LossHessian]:
    losses = checked_pairs(losses)
    total = sum(n for _, n in losses)
    device = params[0].device
    random_state = RandomState(device)

    def weighted(of_loss: Callable[[Tensor], Tensor]) -> Tensor:
        result = torch.zeros((), dtype=vector_dtype(params), device=device)
        with torch.inference_mode(False), torch.enable_grad(), untouched(device=device):
            random_state.restore()  # every sweep starts from the same state, every batch of it has its own masks
            for closure, n in losses:
                result = result + of_loss(closure()) * (n / (total * scale))
        return result

    def hvp(vector: Tensor) -> Tensor:
        return weighted(lambda loss: _product(gradient_of(loss, params), params, vector))

    unreached: list[frozenset[int]] = []  # by each batch

    def first(loss: Tensor) -> Tensor:
        grads = gradient_of(loss, params, create_graph=False)
        unreached.append(_unreached(grads, params))
        gradient = flatten(grads, params)
        check_finite(loss, gradient)
        return gradient

    gradient = weighted(first)
    yield LossHessian(hvp, gradient, product_cost=3, unreached=frozenset.intersection(*unreached))


def _unreached(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> frozenset[int]:
    return frozenset(i for i, (g, p) in enumerate(zip(grads, params, strict=True)) if g is None and p.requires_grad)


def say_unreached(unreached: Iterable[int], params: Sequence[Tensor], depth: int) -> None:
    """Warn of weights that train and that a loss does not reach, so that they seem to have no curvature.

    Args:
        unreached: Numbers of the parameters, as :class:`LossHessian` has them.
        params: The parameters.
        depth: So many calls from here lies the line that the warning is of.
    """
    names = [f"number {i}, of shape {tuple(params[i].shape)}" for i in sorted(unreached) if params[i].ndim > 1]
    if names:
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(NO_SHARE.format(names[0] + more), stacklevel=depth + 1)


def checked_pairs(losses: Any) -> list[tuple[Closure, int]]:
    """Pairs of closure and sample count as a list; a ValueError for anything else, and for none."""
    pairs = list(losses) if isinstance(losses, Iterable) and not isinstance(losses, Tensor) else [losses]
    if not pairs:
        raise ValueError("expected pairs of a closure that computes a loss and its sample count, got an empty list")
    for pair in pairs:
        two = isinstance(pair, Sequence) and len(pair) == 2
        if not (two and callable(pair[0]) and isinstance(pair[1], Integral) and int(pair[1]) >= 1):
            raise ValueError(
                "expected a loss tensor, a closure that computes it, or pairs of such a closure and its sample count "
                f"(1 or more), got {shown(pair)}"
            )
    return [(closure, int(n)) for closure, n in pairs]


def check_loss(loss: Any) -> None:
    """Raise a ValueError unless this is a scalar loss with its graph."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"expected a scalar loss tensor, got {got}; reduce it, for example with .mean()")
    if not loss.requires_grad:
        raise ValueError(NO_GRAPH)


def gradient_of(loss: Tensor, params: Sequence[Tensor], *, create_graph: bool = True) -> list[Tensor | None]:
    """Gradient of a loss, a block for each parameter; None for those that it does not reach, or that are frozen."""
    check_loss(loss)
    trainable = [p for p in params if p.requires_grad]
    with _explained("Hessian-vector product" if create_graph else "gradient"):
        derivatives = iter(
            torch.autograd.grad(loss, trainable, create_graph=create_graph, retain_graph=True, allow_unused=True)
        )
    grads = [next(derivatives) if p.requires_grad else None for p in params]
    if all(g is None for g in grads):
        raise ValueError(NOT_REACHED)
    if any(g is not None and g.layout != torch.strided for g in grads):
        raise ValueError(SPARSE)
    return grads


def _product(grads: list[Tensor | None], params: list[Tensor], vector: Tensor) -> Tensor:
    size = sum(p.numel() for p in params)
    if vector.shape != (size,):
        raise ValueError(f"expected a vector of shape ({size},), one entry a parameter, got {tuple(vector.shape)}")
    # A gradient without a graph is constant in the parameters: its rows of the Hessian are zero.
    pairs = [(g, v) for g, v in zip(grads, split(vector, params), strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return torch.zeros_like(vector)
    trainable = [p for p in params if p.requires_grad]
    with _explained("Hessian-vector product"):
        derivatives = iter(
            torch.autograd.grad(
                [g for g, _ in pairs], trainable, [v.to(g) for g, v in pairs], retain_graph=True, allow_unused=True
            )
        )
    return flatten([next(derivatives) if p.requires_grad else None for p in params], params)


def check_finite(loss: Tensor, gradient: Tensor) -> None:
    """Raise a FloatingPointError where a loss or a gradient is NaN or infinite; waits for the device."""
    for name, value in (("loss", loss), ("gradient of the loss", gradient)):
        if not is_finite(value):
            raise FloatingPointError(f"the {name} is NaN or infinite; no curvature can be taken there")


class NoProductError(RuntimeError):
    """A loss that torch cannot take Hessian-vector products of; the message says why, and the way out."""


_CAUSES = (
    (
        ("use_reentrant",),
        "checkpointing with use_reentrant=True cannot be differentiated by torch.autograd.grad; pass "
        "use_reentrant=False to it",
    ),
    (
        ("attention",),
        "fused attention has no double backward; run the forward pass under "
        "`with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)`",
    ),
    (
        ("aot_autograd", "compiled"),
        "a module under torch.compile has no double backward; pass a closure that computes the loss, in which nothing "
        "is compiled, for example on a small sample through the curvature argument",
    ),
    (
        ("cudnn",),
        "cuDNN's recurrent networks have no double backward; run the forward pass under "
        "`with torch.backends.cudnn.flags(enabled=False)`",
    ),
    (
        ("second time",),
        "the graph of this loss is already freed; take the curvature before loss.backward(), as "
        "optimizer.backward(loss) does",
    ),
    (
        ("inplace", "in-place"),
        "parameters or activations changed after the forward pass; take the curvature between the forward pass and "
        "the step",
    ),
    (
        ("derivative", "double backward", "not implemented"),
        "an operation in this loss has no double backward; replace it",
    ),
)


@contextmanager
def _explained(wanted: str) -> Iterator[None]:
    """Say which operation cannot be differentiated so, and what to do, where torch's message does not."""
    try:
        yield
    except RuntimeError as error:
        for words, advice in _CAUSES:
            if any(word in str(error).lower() for word in words):
                kind = NoProductError if "product" in wanted else RuntimeError
                raise kind(f"no {wanted}: {advice} (torch: {str(error).splitlines()[0]})") from error
        raise
