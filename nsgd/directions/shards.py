"""Parameters of which each process holds a shard (FSDP2, ``fully_shard``: DTensors), and so its slice of all vectors.

Inner products are summed over the processes: every one of them takes part, also one whose own shards are empty. Which
parameters have a gradient is the same in all of them, since FSDP reduces gradients together. A step exchanges a flag
and k + 1 numbers, a fold of n rows (k + n)^2 and its mixing; the host waits for none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


def is_sharded(param: Tensor) -> bool:
    """Whether this process holds only a part of a parameter."""
    return hasattr(param, "to_local")


def parts_of(tensors: list[Any]) -> list[Tensor]:
    """Parts of tensors that this process holds, all DTensors or none: of those their shards, without a copy."""
    if not tensors or not is_sharded(tensors[0]):
        return tensors
    with torch.no_grad():
        return [tensor.to_local() for tensor in tensors]


def check_shards(params: Sequence[Tensor]) -> None:
    """Raise a ValueError for parameters that are spread over processes in a way that is not supported."""
    if any(hasattr(p, "ds_id") for p in params):
        raise ValueError(
            "expected parameters that are whole in each process, or sharded by fully_shard, got those of DeepSpeed; "
            "train with DistributedDataParallel or fully_shard"
        )
    if any(getattr(p, "_fsdp_flattened", False) or hasattr(p, "_is_flat_param") for p in params):
        raise ValueError(
            "expected parameters that are whole in each process, or sharded by fully_shard, got those of "
            "FullyShardedDataParallel; call torch.distributed.fsdp.fully_shard(model) in place of it"
        )
    sharded: list[Any] = [p for p in params if is_sharded(p)]
    for p in sharded:
        placements = getattr(p, "placements", ("unknown",))
        kinds = sorted(type(placement).__name__ for placement in placements)
        if kinds.count("Shard") != 1 or kinds.count("Replicate") != len(kinds) - 1:
            raise ValueError(
                "expected parameters that are sharded once, as by fully_shard, got one with the placements "
                f"{tuple(placements)}; tensor parallelism is not supported"
            )
        if p.device_mesh != sharded[0].device_mesh or _is_shard(p) != _is_shard(sharded[0]):
            raise ValueError(
                f"expected one device mesh for all sharded parameters, got {sharded[0].device_mesh} and "
                f"{p.device_mesh}; call fully_shard with the same mesh throughout"
            )
        if p.dtype.itemsize < 4:
            raise ValueError(
                f"expected sharded parameters in float32 or float64, got {p.dtype}; keep them in float32 and pass "
                "fully_shard a MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
            )


def _is_shard(param: Any) -> list[bool]:
    """For each dimension of a sharded parameter's mesh, whether it is the one that shards it."""
    return [placement.is_shard() for placement in param.placements]


def mesh_groups(param: Any) -> list[Any]:
    """The groups of this process in each dimension of a sharded parameter's mesh."""
    return [param.device_mesh.get_group(i) for i in range(param.device_mesh.ndim)]


def _shard_group(param: Any) -> Any:
    return mesh_groups(param)[_is_shard(param).index(True)]


def totals(owners: Sequence[Tensor], *parts: Sequence[Tensor]) -> list[Tensor]:
    """Sums over blocks of parameters; what belongs to shards is summed over their processes too, in one exchange.

    Args:
        owners: One parameter of each block, at least one.
        parts: For each sum what the blocks give to it, in the order of the owners: tensors of one shape.
    """
    sharded = [i for i, owner in enumerate(owners) if is_sharded(owner)]
    if not sharded:
        return [sum(part[1:], part[0]) for part in parts]
    sums = [sum((part[i] for i in sharded[1:]), part[sharded[0]]) for part in parts]
    flat = torch.cat([part.reshape(-1) for part in sums])
    distributed.all_reduce(flat, group=_shard_group(owners[sharded[0]]))
    cuts = torch.split(flat, [part.numel() for part in sums])
    shared = [cut.view_as(part) for cut, part in zip(cuts, sums, strict=True)]
    return [
        sum((part[i] for i in range(len(owners)) if i not in sharded), total)
        for part, total in zip(parts, shared, strict=True)
    ]


def everywhere(flag: Tensor, owners: Sequence[Tensor]) -> Tensor:
    """Whether something is true of the shards of all processes; the flag itself where nothing is sharded."""
    sharded = [owner for owner in owners if is_sharded(owner)]
    if not sharded:
        return flag
    number = flag.to(torch.int32)
    distributed.all_reduce(number, distributed.ReduceOp.MIN, group=_shard_group(sharded[0]))
    return number.bool()


def same_in(number: int, device: torch.device, group: Any = None) -> bool:
    """Whether a number is the same in all processes of a group, torch's default one if None; waits for them."""
    bounds = torch.tensor([number, -number], device=device)
    distributed.all_reduce(bounds, distributed.ReduceOp.MAX, group=group)
    high, low = bounds.tolist()
    return bool(high == -low)


def same_everywhere(number: int, params: Sequence[Tensor]) -> bool:
    """Whether a number is the same in all processes that hold shards; waits for them."""
    sharded = [p for p in params if is_sharded(p)]
    return not sharded or same_in(number, sharded[0].device, _shard_group(sharded[0]))


def to_save(rows: Tensor, param: Any) -> Tensor:
    """Vectors along this process's part of a parameter, (..., *local shape), as what a checkpoint holds.

    Along a sharded parameter that is a DTensor (..., *shape), sharded as it is; a copy, since torch.save takes no view
    there.
    """
    if not is_sharded(param):
        return rows
    from torch.distributed.tensor import DTensor  # where there are DTensors it is loaded

    lead = rows.shape[: rows.ndim - param.ndim]
    shape = torch.Size((*lead, *param.shape))
    stride = torch.empty(shape, device="meta").stride()
    placements = _with_lead(param, len(lead))
    rows = rows.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(rows, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def from_saved(value: Any, param: Any) -> Tensor:
    """This process's part of what a checkpoint holds along a parameter: a DTensor, or the whole."""
    if not is_sharded(param):
        return value  # type: ignore[no-any-return]
    placements = _with_lead(param, value.ndim - param.ndim)
    if is_sharded(value):
        return parts_of([value.redistribute(param.device_mesh, placements)])[0]
    from torch.distributed.tensor import distribute_tensor

    # Each process cuts its own part out: nothing is sent.
    whole = value.to(param.to_local().device)
    return parts_of([distribute_tensor(whole, param.device_mesh, placements, src_data_rank=None)])[0]


def _with_lead(param: Any, lead: int) -> list[Any]:
    from torch.distributed.tensor import Shard

    return [Shard(place.dim + lead) if place.is_shard() else place for place in param.placements]
