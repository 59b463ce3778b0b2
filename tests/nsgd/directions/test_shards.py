"""Parameters sharded by FSDP2, over gloo: the path of one process that holds them whole, from slices alone."""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from several import batch, several
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.functional import cross_entropy

from nsgd import NSGD, damp

MAKERS: dict[str, Any] = {
    "nsgd": partial(NSGD, lr=0.1, momentum=0.9, k=3),
    "nsgd, no momentum, decayed": partial(NSGD, lr=0.1, weight_decay=0.01, k=3),
    "nesterov, measured": partial(NSGD, lr=0.1, momentum=0.9, nesterov=True, k=3, bulk_scale=0.9),
    "bfloat16 basis": partial(NSGD, lr=0.1, momentum=0.9, k=3, basis_dtype=torch.bfloat16),
    "adamw": lambda params: damp(torch.optim.AdamW(params, lr=0.01), k=3),
}


def fresh() -> nn.Sequential:
    """Layers of which a process has nothing: one output over two processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1), nn.Linear(1, 4)).double()


def sharded(**options: Any) -> nn.Sequential:
    model = fresh()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(model: nn.Module, optimizer: Any, steps: range, rank: int = 0, world: int = 1) -> None:
    for i in steps:
        x, y = batch(i % 3)
        optimizer.zero_grad()
        cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        if i % 8 == 5:  # an overflow in the shard of one process, at a step that the base optimizer passes over
            if rank == 0:
                gradient = next(model.parameters()).grad
                (gradient.to_local() if world > 1 else gradient)[0, 0] = torch.inf
            optimizer._directions.note_gradients(None, None)
            optimizer._directions.end_step()
            continue
        optimizer.step()


def whole(tensors: Any) -> list[Tensor]:
    return [t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone() for t in tensors]


def path(rank: int, world: int, makers: list[str]) -> dict[str, Any]:
    results = {}
    for name in makers:
        model = sharded() if world > 1 else fresh()
        params = list(model.parameters())
        if world > 1:
            assert [p.to_local().numel() for p in params][2:4] == ([8, 1], [0, 0])[rank]
        optimizer = MAKERS[name](params)
        train(model, optimizer, range(40), rank, world)
        results[name] = whole(params), optimizer.weights, optimizer.directions(params), optimizer.alignment
    return results


def test_the_path_is_that_of_one_process_on_the_whole_batch(tmp_path):
    first, second = several(path, 2, tmp_path, list(MAKERS))
    for name, (params, weights, directions, alignment) in path(0, 1, list(MAKERS)).items():
        for p, one, other in zip(params, first[name][0], second[name][0], strict=True):
            assert torch.equal(one, other)
            if "bfloat16" not in name:  # products with it are rounded in each process
                torch.testing.assert_close(one, p, rtol=0, atol=1e-8)
        assert first[name][1] == second[name][1]
        assert first[name][3] == second[name][3]
        if "bfloat16" not in name:
            assert first[name][1] == pytest.approx(weights, rel=1e-8)
            assert first[name][3] == pytest.approx(alignment, rel=1e-6)
        assert directions.shape == (3, first[name][2].shape[1] + second[name][2].shape[1])  # a slice in each
        assert min(weights) > 1e-6


def checkpoints(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Runs that are cut in two, by each way of saving, against the one that is not."""
    results = {}
    for name in ("nsgd", "adamw"):
        model = sharded()
        optimizer = MAKERS[name](model.parameters())
        train(model, optimizer, range(13), rank, world)
        weights = copy.deepcopy(model.state_dict())
        own, rebuilt = optimizer.state_dict(), {}
        buffer = io.BytesIO()
        torch.save(own, buffer)
        buffer.seek(0)
        rebuilt["own"] = torch.load(buffer, weights_only=True)
        rebuilt["sharded"] = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        options = StateDictOptions(full_state_dict=True)
        rebuilt["full"] = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        rebuilt["full, of the first"] = copy.deepcopy(rebuilt["full"]) if rank == 0 else {}
        for way, flat in (("files", False), ("files, flattened", True)):
            given = StateDictOptions(flatten_optimizer_state_dict=flat)
            saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=given)}
            distributed_checkpoint.save(saved, checkpoint_id=folder / f"{name}, {way}")
            rebuilt[way] = {}
        train(model, optimizer, range(13, 27), rank, world)
        results[name] = whole(model.parameters()), optimizer.weights
        for way, saved in rebuilt.items():
            model = sharded()
            model.load_state_dict(weights)
            optimizer = MAKERS[name](model.parameters())
            if way == "own":
                optimizer.load_state_dict(saved)
            elif way.startswith("files"):
                given = StateDictOptions(flatten_optimizer_state_dict=way.endswith("flattened"))
                saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=given)}
                distributed_checkpoint.load(saved, checkpoint_id=folder / f"{name}, {way}")
                set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=given)
            else:
                first = way.endswith("first")
                given = StateDictOptions(full_state_dict=way.startswith("full"), broadcast_from_rank0=first)
                set_optimizer_state_dict(model, optimizer, saved, options=given)
            train(model, optimizer, range(13, 27), rank, world)
            results[f"{name}, {way}"] = whole(model.parameters()), optimizer.weights
    return results


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    first, second = several(checkpoints, 2, tmp_path, tmp_path)
    for name in ("nsgd", "adamw"):
        for way in ("own", "sharded", "full", "full, of the first", "files", "files, flattened"):
            for results in (first, second):
                assert results[f"{name}, {way}"][1] == results[name][1], (name, way)
                for p, q in zip(results[f"{name}, {way}"][0], results[name][0], strict=True):
                    assert torch.equal(p, q), (name, way)


def of_one_process(rank: int, world: int, saved: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    model = sharded()
    for p, value in zip(model.parameters(), weights.values(), strict=True):
        mesh, placements = p.device_mesh, p.placements
        p.data.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
    optimizer = NSGD(model.parameters(), lr=0.1, k=3)
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(13, 27), rank, world)
    return whole(model.parameters()), optimizer.weights


def test_a_checkpoint_of_one_process_goes_on_in_several(tmp_path):
    model = fresh()
    optimizer = NSGD(model.parameters(), lr=0.1, k=3)  # without momentum, whose buffers torch does not shard on loading
    train(model, optimizer, range(13))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(13, 27))
    for params, moments in several(of_one_process, 2, tmp_path, saved, weights):
        assert moments == pytest.approx(optimizer.weights, rel=1e-8)
        for p, q in zip(params, model.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=0, atol=1e-8)


def odd(rank: int, world: int) -> dict[str, Any]:
    """gamma = 1 beside SGD, parameters that stay whole, frozen ones, steps without any gradient, added groups."""
    results = {}
    for make in (torch.optim.SGD, partial(NSGD, gamma=1.0, k=3)):
        model = sharded() if world > 1 else fresh()
        optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
        for i in range(20):
            x, y = batch(i % 3)
            optimizer.zero_grad()
            cross_entropy(model(x[rank::world]), y[rank::world]).backward()
            optimizer.step()
        results["sgd" if make is torch.optim.SGD else "gamma"] = whole(model.parameters())

    model = fresh()
    apart = list(model[3].parameters())
    if world > 1:
        fully_shard(model, ignored_params=set(apart))
    model[0].bias.requires_grad_(False)
    first = [p for p in model.parameters() if all(p is not q for q in apart) and p.shape != (1, 8)]
    optimizer = NSGD(first, lr=0.1, momentum=0.9, k=3)
    optimizer.add_param_group({"params": [model[2].weight], "gamma": 0.5})
    for i in range(30):
        if i == 10:
            optimizer.add_param_group({"params": apart, "bulk_scale": 0.9})
        x, y = batch(i % 3)
        optimizer.zero_grad()
        if i != 15:  # else a step without a gradient
            cross_entropy(model(x[rank::world]), y[rank::world]).backward()
            if world > 1:
                for p in apart:  # which FSDP leaves alone
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= world
        optimizer.step()
    results["mixed"] = whole(model.parameters())
    results["weights"] = optimizer.weights
    return results


def test_odd_parameters_and_steps_are_those_of_one_process(tmp_path):
    one = odd(0, 1)
    for results in several(odd, 2, tmp_path):
        assert all(torch.equal(p, q) for p, q in zip(results["gamma"], results["sgd"], strict=True))
        assert results["weights"] == pytest.approx(one["weights"], rel=1e-8)
        for p, q in zip(results["mixed"], one["mixed"], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-8)
    assert len(one["weights"]) == 3


def replicated(rank: int, world: int) -> Any:
    """Two replicas of two shards each (HSDP), and shards of the second dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    ends = []
    last = {"mesh": mesh["shard"], "shard_placement_fn": lambda p: Shard(p.ndim - 1 if p.shape[-1] % 2 == 0 else 0)}
    for options in ({"mesh": mesh}, last):
        model = sharded(**options)
        optimizer = MAKERS["nsgd"](model.parameters())
        for i in range(20):
            x, y = batch(i % 3)
            part = slice(rank, None, 4) if "shard_placement_fn" not in options else slice(rank % 2, None, 2)
            optimizer.zero_grad()
            cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        ends.append((whole(model.parameters()), optimizer.weights))
    return ends


def test_replicas_of_shards_and_other_dimensions_are_those_of_one_process(tmp_path):
    model = fresh()
    optimizer = MAKERS["nsgd"](model.parameters())
    for i in range(20):
        x, y = batch(i % 3)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    for ends in several(replicated, 4, tmp_path):
        for params, weights in ends:
            assert weights == pytest.approx(optimizer.weights, rel=1e-8)
            for p, q in zip(params, model.parameters(), strict=True):
                torch.testing.assert_close(p, q.detach(), rtol=0, atol=1e-8)


def refusals(rank: int, world: int) -> dict[str, str]:
    mesh, square = init_device_mesh("cpu", (1,)), init_device_mesh("cpu", (1, 1))
    said = {}

    def note(case: str, params: Any, **options: Any) -> None:
        plain = torch.optim.SGD(params, lr=0.1)
        before = dict(plain.param_groups[0])
        for make in (lambda: NSGD(params, lr=0.1, **options), lambda: damp(plain, **options)):
            with pytest.raises(ValueError, match="expected") as caught:
                make()
            said[case] = str(caught.value)
        assert plain.param_groups[0] == before
        assert type(plain) is torch.optim.SGD

    def spread(placements: Any, on: Any = mesh, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(torch.ones(30, 2, dtype=dtype), on, placements))

    note("replicated", [spread([Replicate()])])
    note("twice", [spread([Shard(0), Shard(1)], square)])
    note("two meshes", [spread([Shard(0)]), spread([Replicate(), Shard(0)], square)])
    note("half", [spread([Shard(0)], dtype=torch.bfloat16)])
    for solver in ("lanczos", "arpack", "gradients", "random"):
        note(solver, [spread([Shard(0)])], solver=solver)
    for kept in (True, False):
        flat = FullyShardedDataParallel(nn.Linear(6, 6), device_id=torch.device("cpu"), use_orig_params=kept)
        note(f"FSDP1, {kept}", list(flat.parameters()))
    deep = nn.Parameter(torch.ones(30))
    deep.ds_id = 0  # as ZeRO marks them
    note("DeepSpeed", [deep])

    weight = spread([Shard(0)])
    optimizer = NSGD([weight], lr=0.1, k=3)
    loss = (weight.to_local() ** 2).sum()
    with pytest.raises(ValueError, match="expected") as caught:
        optimizer.backward(loss, curvature=loss)
    assert weight.grad is None
    said["refresh"] = str(caught.value)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="expected") as caught:
        optimizer.add_param_group({"params": [spread([Replicate()])]})
    said["added"] = str(caught.value)
    assert len(optimizer.param_groups) == 2
    return said


def test_what_is_not_supported_is_refused_in_one_sentence(tmp_path):
    (said,) = several(refusals, 1, tmp_path)
    for case in ("replicated", "twice", "added"):
        assert "sharded once, as by fully_shard, got one with the placements" in said[case]
        assert "tensor parallelism is not supported" in said[case]
    assert "one device mesh for all sharded parameters" in said["two meshes"]
    assert "sharded parameters in float32 or float64, got torch.bfloat16" in said["half"]
    for solver in ("lanczos", "arpack", "gradients", "random"):
        assert f"expected solver='differences' for sharded parameters, got '{solver}'" in said[solver]
    for kept in (True, False):
        assert "those of FullyShardedDataParallel; call torch.distributed.fsdp.fully_shard" in said[f"FSDP1, {kept}"]
    assert "those of DeepSpeed; train with DistributedDataParallel or fully_shard" in said["DeepSpeed"]
    assert "for directions from curvature, got sharded ones; leave curvature out" in said["refresh"]
