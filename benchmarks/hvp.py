"""What one Hessian-vector product costs, in units of one gradient, and how exact it is.

The ways to take it: on a kept graph (what a refresh does), on a graph rebuilt for every product, forward over reverse,
the same traced once and linearised, compiled, in batches of vectors, by central differences of gradients. Medians of
calls taken in turn; peak memory beyond what the parameters take; the error is relative to a float64 product. What a
way needs once (a graph, a trace, a compilation) is given apart, in gradients.

    python benchmarks/hvp.py            # minutes; writes benchmarks/results/hvp.csv
    python benchmarks/hvp.py --smoke    # seconds, writes nothing
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from common import arguments, print_table, seconds, small_cnn
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.profiler import profile

from lightning_modules.models.nets.named import make_net
from lightning_modules.models.nets.resnet import resnet
from lightning_modules.models.nets.transformers import vision_transformer
from lightning_modules.support.files import write_csv
from nsgd.curvature.hessian import loss_hessian
from nsgd.curvature.vectors import flatten, split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VECTORS = 4  # in a batch of vectors
EPSILON = 1e-2  # length of a central difference's step


def ways(model: nn.Module, x: Tensor, y: Tensor, vector: Tensor) -> dict[str, tuple[Callable[[], Any], Any, int]]:
    """For each way: what prepares it, what a call does with the preparation, and products in one call."""
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    point = tuple(p.detach() for p in params)
    tangent = tuple(block.contiguous() for block in split(vector, params))

    def loss() -> Tensor:
        return cross_entropy(model(x), y)

    def of(values: tuple[Tensor, ...]) -> Tensor:
        return cross_entropy(functional_call(model, dict(zip(names, values, strict=True)), (x,)), y)

    moved = copy.deepcopy(model)  # changing parameters in place would spoil kept graphs
    moving = list(moved.parameters())

    def gradient() -> Tensor:
        return flatten(torch.autograd.grad(loss(), params), params)

    def moved_gradient(step: list[Tensor], alpha: float) -> Tensor:
        with torch.no_grad():
            torch._foreach_add_(moving, step, alpha=alpha)
        return flatten(torch.autograd.grad(cross_entropy(moved(x), y), moving), moving)

    def kept_graph() -> Any:
        return torch.autograd.grad(loss(), params, create_graph=True)

    def kept(gradients: Any) -> Tensor:
        return flatten(torch.autograd.grad(gradients, params, tangent, retain_graph=True), params)

    def batched(gradients: Any) -> Tensor:
        blocks = tuple(t.expand(VECTORS, *t.shape) for t in tangent)
        found = torch.autograd.grad(gradients, params, blocks, retain_graph=True, is_grads_batched=True)
        return flatten([block[0] for block in found], params)

    def forward_over_reverse(_: Any) -> Tensor:
        return flatten(jvp(grad(of), (point,), (tangent,))[1], params)

    def compiled() -> Any:
        function = torch.compile(lambda p, t: jvp(grad(of), (p,), (t,))[1])
        function(point, tangent)
        return function

    def difference(_: Any) -> Tensor:
        length = torch.linalg.vector_norm(vector)
        step = [EPSILON * t / length for t in tangent]
        ahead, behind = moved_gradient(step, 1.0), moved_gradient(step, -2.0)
        with torch.no_grad():
            torch._foreach_copy_(moving, params)
        return (ahead - behind) * (length / (2 * EPSILON))

    return {
        "gradient": (lambda: None, lambda _: gradient(), 1),
        "kept graph": (kept_graph, kept, 1),
        "rebuilt graph": (lambda: None, lambda _: kept(kept_graph()), 1),
        "forward over reverse": (lambda: None, forward_over_reverse, 1),
        "linearised trace": (
            lambda: linearize(grad(of), point)[1],
            lambda linear: flatten(linear(tangent), params),
            1,
        ),
        "compiled forward over reverse": (compiled, lambda f: flatten(f(point, tangent), params), 1),
        f"kept graph, {VECTORS} vectors": (kept_graph, batched, VECTORS),
        "central difference": (lambda: None, difference, 1),
    }


def peak_mib(call: Callable[[], Any]) -> float:
    """Peak memory of tensors in a call, beyond what is held before it, by the profiler's record of allocations."""
    with profile(profile_memory=True) as profiled:
        call()
    records = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    records.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in records), default=0) / 2**20


def measure(name: str, model: nn.Module, images: int, repeats: int, skipped: tuple[str, ...]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = model.to(DEVICE)
    x, y = torch.randn(images, 3, 32, 32, device=DEVICE), torch.randint(10, (images,), device=DEVICE)
    params = list(model.parameters())
    vector = torch.randn(sum(p.numel() for p in params), device=DEVICE)
    double = copy.deepcopy(model).double()
    with loss_hessian(cross_entropy(double(x.double()), y), double.parameters()) as hessian:
        exact = hessian.hvp(vector.double())
    prepared, calls, once, memory, error = {}, {}, {}, {}, {}
    per_call = {}
    for way, (prepare, call, products) in ways(model, x, y, vector).items():
        if way in skipped:
            continue
        started = time.perf_counter()
        try:
            prepared[way] = prepare()
            result = call(prepared[way])
        except RuntimeError as reason:  # a way that this network does not take is a row of the table too
            print(f"{name}: {way} fails: {str(reason).splitlines()[0]}")
            continue
        once[way] = time.perf_counter() - started
        memory[way] = peak_mib(lambda prepare=prepare, call=call: call(prepare()))
        calls[way] = lambda call=call, way=way: call(prepared[way])
        per_call[way] = products
        error[way] = float(torch.linalg.vector_norm(result.double() - exact) / torch.linalg.vector_norm(exact))
    found = seconds(calls, repeats)
    unit = found["gradient"]
    return [
        {
            "network": name,
            "parameters": vector.numel(),
            "images": images,
            "way": way,
            "gradients": round(found[way] / per_call[way] / unit, 3),
            "once": round(max(0.0, once[way] - found[way]) / unit, 1),
            "memory": round(memory[way] / memory["gradient"], 2),
            "error": float(f"{error[way]:.1e}") if way != "gradient" else "",
            "device": DEVICE,
        }
        for way in calls
    ]


def main() -> None:
    parser = arguments(__doc__, "hvp.csv")
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="torch")  # its tracer warns of its own code
    repeats = 1 if args.smoke else args.repeats
    networks = [
        ("CNN, 2 convolutions", small_cnn(3, 32), 64),
        ("SimpleCNN, 4 convolutions", make_net("simple-cnn-root", (3, 32, 32), 10), 64),
        ("ResNet-20, BatchNorm", resnet((3, 32, 32), 10), 64),
        ("vision transformer", vision_transformer((3, 32, 32), 10), 64),
    ]
    skipped = ("compiled forward over reverse",) if args.smoke else ()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no double backward
        rows = [
            row
            for name, model, images in (networks[:1] if args.smoke else networks)
            for row in measure(name, model, images, repeats, skipped)
        ]
    print_table(*table(rows))
    if not args.smoke:
        write_csv(args.out, rows)


def table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """One product of each way, in gradients."""
    body = [
        [
            f"{r['network']}, {r['way']}",
            f"{r['gradients']:.2f}",
            f"{r['once']:.0f}",
            f"{r['memory']:.1f}",
            f"{r.get('error', '')}",
        ]
        for r in rows
    ]
    return ("way", "seconds / gradient's", "once", "peak memory / gradient's", "relative error"), body


if __name__ == "__main__":
    main()
