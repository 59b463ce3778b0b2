"""What a GPU alone can show: training there is that of the CPU, no step waits for it, and its memory stays flat."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsgd import NSGD, backward_in_chunks, damp, sample_losses, top_eigenpairs
from nsgd.directions import directions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SOURCES = ["differences", "chunks", "lanczos", "arpack"]  # whose small eigenproblems are solved by the host
WAYS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
BASES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "nsgd": lambda params: NSGD(params, lr=0.1, k=3),
    "nsgd, Nesterov": lambda params: NSGD(params, lr=0.1, k=3, momentum=0.9, nesterov=True),
    "nsgd, fused": lambda params: NSGD(params, lr=0.1, k=3, momentum=0.9, fused=True),
    "nsgd, a tensor as rate": lambda params: NSGD(  # fused: torch's other ways wait for it
        params, lr=torch.tensor(0.1, device="cuda"), k=3, momentum=0.9, fused=True
    ),
    "nsgd, a basis in bfloat16": lambda params: NSGD(params, lr=0.1, k=3, basis_dtype=torch.bfloat16),
    "adamw": lambda params: damp(torch.optim.AdamW(params, lr=0.01, foreach=True), k=3),
    "adamw, fused": lambda params: damp(torch.optim.AdamW(params, lr=0.01, fused=True), k=3),
    "adamw, capturable": lambda params: damp(torch.optim.AdamW(params, lr=0.01, capturable=True), k=3),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).to("cuda", dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x.to("cuda", dtype), (torch.arange(24) % 3).cuda()


@contextmanager
def forbidden_to_wait() -> Iterator[None]:
    """Reading a value of the device is an error; an event of it may be waited for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch does not see all
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, source: str = "differences") -> None:
    x, y = (part.to(next(net.parameters()).device) for part in batch(next(net.parameters()).dtype))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y)

    for _ in range(steps):
        optimizer.zero_grad()
        if source == "chunks":
            backward_in_chunks(loss, x, y, chunks=4)
        elif source == "differences":
            loss(x, y).backward()
        else:
            samples = sample_losses(loss, x, y, module=net if source == "samples at once" else None)
            optimizer.backward(value := loss(x, y), curvature=value if source in ("lanczos", "arpack") else samples)
        optimizer.step()


def solver_of(source: str) -> dict[str, str | int]:
    solver = {"samples": "gradients", "samples at once": "gradients", "chunks": "differences"}.get(source, source)
    return {"solver": solver, "refresh_every": 2}


def trained_on_both(source: str, steps: int) -> list[tuple[nn.Module, NSGD]]:
    nets = [network(torch.float64), network(torch.float64).cpu()]
    runs = [(net, NSGD(net.parameters(), lr=0.05, momentum=0.9, k=3, **solver_of(source))) for net in nets]
    for net, optimizer in runs:
        train(net, optimizer, steps, source)
    return runs


@pytest.mark.parametrize("source", SOURCES)
def test_training_is_that_of_the_cpu(monkeypatch, source):
    monkeypatch.setattr(directions, "folds_late", lambda device: True)
    (on_gpu, one), (on_cpu, other) = trained_on_both(source, 12)
    assert one.refreshes == other.refreshes > 2
    for p, q in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("source", ["samples", "samples at once"])
def test_directions_from_samples_are_nearly_those_of_the_cpu(source):
    """Their eigenproblem is the device's, where pairs of nearly one weight may stand for each other."""
    runs = trained_on_both(source, 12)
    one, other = (optimizer.directions(net.parameters()).cpu() for net, optimizer in runs)
    torch.testing.assert_close(one @ one.T, torch.eye(3, dtype=one.dtype), rtol=0, atol=1e-5)
    assert float((one @ other.T).square().sum()) / 3 > 0.8


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_undamped_it_is_sgd_to_the_bit(way):
    nets = [network(), network()]
    train(nets[0], NSGD(nets[0].parameters(), lr=0.05, momentum=0.9, k=3, gamma=1.0, **way), 25)
    train(nets[1], torch.optim.SGD(nets[1].parameters(), lr=0.05, momentum=0.9, **way), 25)
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize("base", BASES)
def test_no_step_waits_for_the_gpu(base):
    net = network()
    optimizer = BASES[base](list(net.parameters()))
    x, y = batch()
    for step in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        if step:  # the first one makes its state
            with forbidden_to_wait():
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.refreshes > 5


def test_no_refresh_from_samples_waits_for_the_gpu():
    net = network()
    optimizer = NSGD(net.parameters(), lr=0.05, k=3, solver="gradients", refresh_every=2)
    train(net, optimizer, 4, "samples at once")
    x, y = batch()
    losses = sample_losses(lambda x, y: F.cross_entropy(net(x), y), x, y, module=net)
    with forbidden_to_wait():
        optimizer.refresh(losses)
    assert optimizer.refreshes > 2


@pytest.mark.parametrize("source", ["differences", "samples at once", "lanczos"])
def test_memory_stays_flat(source):
    net = network()
    optimizer = NSGD(net.parameters(), lr=0.01, momentum=0.9, k=3, **solver_of(source))
    train(net, optimizer, 30, source)
    before = torch.cuda.memory_allocated()
    train(net, optimizer, 60, source)
    assert torch.cuda.memory_allocated() <= before + 4096


def test_a_checkpoint_of_the_gpu_goes_on_on_the_cpu(monkeypatch):
    monkeypatch.setattr(directions, "folds_late", lambda device: True)
    net = network(torch.float64)
    optimizer = NSGD(net.parameters(), lr=0.05, momentum=0.9, k=3, refresh_every=2)
    train(net, optimizer, 8)
    other = copy.deepcopy(net).cpu()
    follower = NSGD(other.parameters(), lr=0.05, momentum=0.9, k=3, refresh_every=2)
    follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, 5)
    train(other, follower, 5)
    for on_gpu, on_cpu in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", ["lanczos", "arpack"])
def test_eigenpairs_are_those_of_the_cpu(solver):
    found = []
    for device in ("cuda", "cpu"):
        net = network(torch.float64).to(device)
        x, y = (part.to(device) for part in batch(torch.float64))
        pairs = top_eigenpairs(F.cross_entropy(net(x), y), net.parameters(), k=2, solver=solver, tol=1e-8, max_hvps=200)
        found.append(pairs.eigenvalues.cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_a_refresh_that_finds_too_little_memory_takes_smaller_chunks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3)).cuda()
    optimizer = NSGD(net.parameters(), lr=0.01, k=3, solver="gradients", refresh_every=1)
    x, y = torch.randn(256, 64, device="cuda"), torch.randint(3, (256,), device="cuda")
    losses = sample_losses(lambda x, y: F.cross_entropy(net(x), y), x, y, module=net, chunk_size=256)
    rows = 4 * len(x) * sum(p.numel() for p in net.parameters())  # bytes, which there must be
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + rows + 50 * 2**20) / total)
    try:
        with pytest.warns(UserWarning, match="out of memory with more groups"):
            optimizer.refresh(losses)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert optimizer.refreshes == 1


def test_a_gpu_as_the_default_device_leaves_the_cpu_alone():
    nets, (x, y) = [network().cpu(), network().cpu()], [part.cpu() for part in batch()]
    for net, device in zip(nets, (None, "cuda"), strict=True):
        torch.set_default_device(device)
        try:
            optimizer = NSGD(net.parameters(), lr=0.05, momentum=0.9, k=3)
            for _ in range(25):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        finally:
            torch.set_default_device(None)
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
