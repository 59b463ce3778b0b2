"""Several processes: what has them all follow the same directions, and wait for each other no longer than they must.

Under ``DistributedDataParallel`` the reduced gradients are the same in every process, and so are the directions from
them: which parameters have a gradient too, and with it when a fold is due, which goes by counts. What rounding on
unequal machines could make drift apart, the first process settles. Directions from a second look at the loss come from
what all processes look at, and a refresh is skipped, or fails, in all of them. All of torch's default group take the
same steps. In one process every function here gives back what it was given, and in several each waits for the others
unless it says that the host does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nsgd.curvature.hessian import HVP
from nsgd.directions.shards import is_sharded, mesh_groups, same_in

# Share of the largest inner product by which those of two processes may differ and still be the same but for rounding.
_ALIKE = 1e-3

# What the first process asks for, while it leads.
_DONE, _PRODUCT, _NOT_FINITE, _FAILED = range(4)


def world() -> int:
    """Number of processes, of torch's default group; 1 where there is none."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


# -- one answer everywhere -----------------------------------------------------------------------------------------


def settled(gram: Tensor, owners: Sequence[Tensor], *results: Tensor) -> list[Tensor]:
    """Small results that every process has computed from the same inner products, as the first process has them.

    So that rounding, which is not the same on unequal machines, cannot make the processes drift apart. Where the inner
    products differ by more than rounding, the processes train different models, and each keeps its own. No host sync.

    Args:
        gram: The inner products that they come from.
        owners: One parameter of each block.
        results: What follows from them.
    """
    sharded: list[Any] = [owner for owner in owners if is_sharded(owner)]
    groups = [None] if world() > 1 else []
    if sharded:
        groups = mesh_groups(sharded[0])
    if not groups:
        return list(results)
    local = torch.cat([part.reshape(-1) for part in (gram, *results)])
    firsts = local.clone()
    for group in groups:
        _broadcast(firsts, group)
    there, *parts = torch.split(firsts, [part.numel() for part in (gram, *results)])
    same = (there - gram.reshape(-1)).abs().max() <= _ALIKE * gram.abs().max()  # False where one is not finite
    return [torch.where(same, part.view_as(mine), mine) for part, mine in zip(parts, results, strict=True)]


def _broadcast(tensor: Tensor, group: Any = None) -> None:
    distributed.broadcast(tensor, 0 if group is None else distributed.get_global_rank(group, 0), group=group)


def of_the_first(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """These tensors as the first process has them, of its lengths too, on a device; waits for it."""
    if world() == 1:
        return list(tensors)
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=device)
    _broadcast(lengths)
    copies = []
    for tensor, length in zip(tensors, lengths.tolist(), strict=True):
        same = tensor if len(tensor) == length else tensor.new_empty(length, *tensor.shape[1:])
        copies.append(same.to(device, copy=True, memory_format=torch.contiguous_format))
        _broadcast(copies[-1])
    return copies


def flag_of_the_first(flag: Tensor) -> Tensor:
    """A truth value as the first process has it; no host sync."""
    if world() == 1:
        return flag
    number = flag.to(torch.int32)
    _broadcast(number)
    return number.bool()


def averaged(vector: Tensor) -> Tensor:
    """The mean of a vector over the processes."""
    if world() == 1:
        return vector
    total = vector.clone()
    distributed.all_reduce(total)
    return total / world()


def mean(value: float, device: torch.device) -> float:
    """The mean of a number over the processes; waits for them."""
    return value if world() == 1 else float(averaged(torch.tensor(value, dtype=torch.float64, device=device)))


def alike(value: int, device: torch.device) -> bool:
    """Whether a number is the same in all processes; waits for them."""
    return world() == 1 or same_in(value, device)


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """What one process meets inside, a NaN (FloatingPointError) or an error, all of them raise; waits for them.

    So that none of them waits for ever for the others, and a refresh is skipped by all or by none.
    """
    met: Exception | None = None
    try:
        yield
    except Exception as error:
        if world() == 1:
            raise
        met = error
    if world() == 1:
        return
    code = _DONE if met is None else _NOT_FINITE if isinstance(met, FloatingPointError) else _FAILED
    worst = torch.tensor(code, device=device)
    distributed.all_reduce(worst, distributed.ReduceOp.MAX)
    if met is not None and int(worst) == code:
        raise met
    _raise_for(int(worst))


def _raise_for(code: int) -> None:
    if code == _NOT_FINITE:
        raise FloatingPointError("a loss, a gradient or a product is NaN or infinite in another process")
    if code == _FAILED:
        raise RuntimeError("a refresh of the directions failed in another process, whose message says why")


@contextmanager
def inner_modules_only() -> Iterator[None]:
    """Raise a ValueError where a module of ``DistributedDataParallel`` runs, whose reducer a second pass confuses."""
    if world() == 1:
        yield
        return

    def refuse(module: nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                "expected curvature from the network itself, got one that runs DistributedDataParallel, which waits "
                "for a backward pass; write model.module in place of model there"
            )

    hook = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


# -- a second look at the loss -------------------------------------------------------------------------------------


def gathered(*tensors: Tensor) -> list[Tensor]:
    """Rows of all processes, one process after the other; waits for them to learn how many there are.

    Args:
        tensors: Of this process, of one length, (m, ...); m may differ from that of others.
    """
    if world() == 1:
        return list(tensors)
    length, device = len(tensors[0]), tensors[0].device
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world())]
    distributed.all_gather(counts, torch.tensor([length], device=device))
    sizes = [int(count) for count in counts]
    rows = []
    for tensor in tensors:
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[:length] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        rows.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return rows


def led(work: Callable[[HVP], list[Tensor]], product: HVP, like: Sequence[Tensor]) -> list[Tensor]:
    """Results of work with a product that is the mean of all processes' products.

    The first process does the work; the others take part in each product, and are told when it is over. So they all
    take the same number of products, whatever rounding does to a test of convergence, and have the same results.

    Args:
        work: Computes the results from a product (P,) to (P,).
        product: This process's own.
        like: Tensors of the shape, precision and device of the results; vectors (k, P) are the second.
    """
    if world() == 1:
        return work(product)
    signal = torch.tensor(_DONE, device=like[0].device)
    met: list[Exception] = []

    def of_all(vector: Tensor) -> Tensor:
        try:
            local = product(vector)
        except Exception as error:  # raised when the others have been told, who wait for this product
            met.append(error)
            local = torch.full_like(vector, math.nan)
        return averaged(local)

    if distributed.get_rank() == 0:

        def asked(vector: Tensor) -> Tensor:
            vector = vector.contiguous()
            for tensor in (signal.fill_(_PRODUCT), vector):
                _broadcast(tensor)
            product_of_all = of_all(vector)
            if met:
                raise met[0]
            return product_of_all

        end = _FAILED
        try:
            results = [result.to(one).contiguous() for result, one in zip(work(asked), like, strict=True)]
            end = _DONE
        except FloatingPointError:
            end = _NOT_FINITE
            raise
        finally:
            _broadcast(signal.fill_(end))
    else:
        vector = like[1].new_empty(like[1].shape[1:])
        _broadcast(signal)
        while int(signal) == _PRODUCT:
            _broadcast(vector)
            of_all(vector)
            _broadcast(signal)
        if met:
            raise met[0]
        _raise_for(int(signal))
        results = [torch.empty_like(one) for one in like]
    for result in results:
        _broadcast(result)
    return results
