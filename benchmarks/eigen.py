"""Top eigenvectors of a Hessian, ours and the peers': how good, for how many gradients and seconds?

At checkpoints of training on CIFAR-10, on one batch each, against the exact eigenpairs (ARPACK at tol 1e-6 in
float64): the overlap, which is the mean squared cosine of the principal angles between the spaces, and the largest
relative error of an eigenvalue. Work is counted in gradients of that batch: a gradient 1, a product on a kept graph 2,
on a rebuilt graph 3. Seconds are the processor's, in those of a gradient. Peers run at their documented defaults and at
the best setting that we found; those that are not installed are left out: pip install --no-deps curvlinops-for-pytorch
backpack-for-pytorch einconv einops linear_operator unfoldNd hessian-eigenthings pyhessian.

    python benchmarks/eigen.py --data PATH_OR_HUB_NAME    # an hour; writes benchmarks/results/eigen.csv
    python benchmarks/eigen.py --smoke                    # seconds, on digits, writes nothing

Interrupted, or with another way to measure, the same command goes on with what is missing in the file.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from common import Data, add_data, arguments, load, print_table, small_cnn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from lightning_modules.models.nets.resnet import resnet
from lightning_modules.models.nets.transformers import vision_transformer
from lightning_modules.support.files import read_csv, write_csv
from nsgd import Eigenpairs, sample_losses, top_eigenpairs
from nsgd.curvature.low_rank import low_rank
from nsgd.directions.samples import gradient_moment

Found = tuple[Tensor, Tensor, float]  # eigenvalues (k,), eigenvectors (k, P), gradients of work
Key = tuple[str, int, int, int, str]  # network, step, seed, k, solver


@dataclass(frozen=True)
class Problem:
    """A network at some steps of training, and the batch that its curvature is taken on."""

    network: str
    build: Callable[[], nn.Module]
    steps: tuple[int, ...]
    images: int
    ranks: tuple[int, ...]
    lr: float
    group_size: int = 1  # of the moment of gradients: BatchNorm wants more than one
    power: int = 1  # the largest k for which power iterations, hundreds of products, are run here


def problems(side: int, channels: int, smoke: bool) -> list[Problem]:
    """What is measured."""
    shape = (channels, side, side)
    if smoke:
        return [Problem("CNN", lambda: small_cnn(channels, side), (5,), 64, (3,), 0.05, power=3)]
    ranks = (1, 5, 10, 20)
    return [
        Problem("CNN", lambda: small_cnn(channels, side), (30, 300), 256, ranks, 0.05, power=5),
        Problem("ResNet-20, BatchNorm", lambda: resnet(shape, 10), (100,), 80, (10,), 0.1, group_size=4),
        Problem("vision transformer", lambda: vision_transformer(shape, 10), (100, 200), 64, ranks, 0.05),
    ]


class Batch:
    """One batch of one checkpoint, and every way to its eigenpairs."""

    def __init__(self, problem: Problem, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.problem, self.model, self.images, self.labels = problem, model, images, labels
        self.params = list(model.parameters())

    def loss(self) -> Tensor:
        """The mean loss, with its graph."""
        return cross_entropy(self.model(self.images), self.labels)

    def ours(self, k: int, **options: Any) -> Found:
        """Our solvers on the kept graph."""
        pairs: Eigenpairs = top_eigenpairs(self.loss(), self.params, k=k, **options)
        return pairs.eigenvalues, pairs.eigenvectors, pairs.cost_gradients

    def moment(self, k: int) -> Found:
        """Top of the second moment of gradients: no product at all."""
        losses = sample_losses(
            lambda x, y: cross_entropy(self.model(x), y),
            *(self.images, self.labels),
            group_size=self.problem.group_size,
            module=self.model,
        )
        values, vectors = low_rank(*gradient_moment(losses, self.params), k=k)
        return values, vectors, 1.0

    def sweep(self, k: int, products: int) -> Found:
        """One sweep of products over the top of that moment."""
        block = self.moment(products)[1]
        values, vectors, cost = self.ours(k, solver="nystrom", start=block)
        return values, vectors, cost + 1.0

    def curvlinops(self, k: int, **options: Any) -> Found:
        """SciPy's eigsh on curvlinops' operator, as its documentation has it."""
        from curvlinops import HessianLinearOperator
        from scipy.sparse.linalg import LinearOperator, eigsh

        operator = HessianLinearOperator(
            self.model, nn.CrossEntropyLoss(), self.params, [(self.images, self.labels)], check_deterministic=False
        ).to_scipy()
        count = 0

        def matvec(vector: Any) -> Any:
            nonlocal count
            count += 1
            return operator @ vector

        counted = LinearOperator(operator.shape, matvec=matvec, dtype=operator.dtype)
        values, columns = eigsh(counted, k=k, which="LA", **options)
        return torch.from_numpy(values.copy()).flip(0), torch.from_numpy(columns.T.copy()).flip(0), 3.0 * count

    def eigenthings(self, k: int, *, power: bool = False, **options: Any) -> Found:
        """Lanczos or deflated power iteration of hessian-eigenthings."""
        import hessian_eigenthings as library

        operator = library.HessianOperator(
            self.model, [(self.images, self.labels)], lambda model, batch: cross_entropy(model(batch[0]), batch[1])
        )
        count = 0

        def matvec(vector: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return operator.matvec(vector)

        counted = library.LambdaOperator(matvec, operator.size)
        solve = library.deflated_power_iteration if power else library.lanczos
        found = solve(counted, k=k, seed=0, **options)
        return found.eigenvalues, found.eigenvectors, 3.0 * count

    def pyhessian(self, k: int) -> Found:
        """Power iteration of PyHessian; it leaves the model in eval mode, so it gets a copy."""
        library = importlib.import_module("pyhessian")
        module = sys.modules["pyhessian.hessian"]
        original, count = vars(module)["hessian_vector_product"], 0

        def counted(*args: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args)

        vars(module)["hessian_vector_product"] = counted
        try:
            of = library.hessian(
                copy.deepcopy(self.model), nn.CrossEntropyLoss(), (self.images, self.labels), cuda=False
            )
            values, vectors = of.eigenvalues(top_n=k)
        finally:
            vars(module)["hessian_vector_product"] = original
        rows = torch.stack([torch.cat([part.flatten() for part in vector]) for vector in vectors]).detach()
        return torch.tensor(values), rows, 1.0 + 2.0 * count  # it keeps its graph

    def ways(self, k: int) -> dict[str, Callable[[], Found]]:
        """Every solver with its settings."""
        settings: dict[str, Callable[[], Found]] = {
            "ours: moment of gradients": lambda: self.moment(k),
            f"ours: sweep over it, {k + 2} products": lambda: self.sweep(k, k + 2),
            f"ours: sweep over it, {2 * k} products": lambda: self.sweep(k, 2 * k),
            f"ours: Lanczos, {2 * k} products": lambda: self.ours(k, max_hvps=2 * k, repeated=False),
            f"ours: Lanczos, {2 * k + 2} products": lambda: self.ours(k, max_hvps=2 * k + 2, repeated=False),
            "ours: Lanczos, no search for repeated": lambda: self.ours(k, repeated=False),
            "ours: Lanczos, defaults": lambda: self.ours(k),
            "ours: ARPACK, tol 0.1": lambda: self.ours(k, solver="arpack", tol=0.1),
        }
        if importlib.util.find_spec("curvlinops"):
            settings["curvlinops: eigsh, defaults"] = lambda: self.curvlinops(k)
            settings["curvlinops: eigsh, tol 0.01"] = lambda: self.curvlinops(k, tol=0.01)
        if importlib.util.find_spec("hessian_eigenthings"):
            settings["hessian-eigenthings: Lanczos, defaults"] = lambda: self.eigenthings(k)
            settings[f"hessian-eigenthings: Lanczos, {2 * k + 8} products"] = lambda: self.eigenthings(
                k, max_iter=2 * k + 8, reorthogonalize=True, which="LA"
            )
            if k <= self.problem.power:
                settings["hessian-eigenthings: power, defaults"] = lambda: self.eigenthings(k, power=True)
        if importlib.util.find_spec("pyhessian") and k <= self.problem.power:
            settings["PyHessian: power, defaults"] = lambda: self.pyhessian(k)
        return settings


def checkpoints(problem: Problem, data: Data, seed: int) -> dict[int, nn.Module]:
    """The network after some SGD steps on random batches of 64."""
    torch.manual_seed(seed)
    model = problem.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr, momentum=0.9)
    found = {}
    for step in range(1, max(problem.steps) + 1):
        batch = torch.randint(len(data.labels), (64,))
        optimizer.zero_grad()
        cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
        optimizer.step()
        if step in problem.steps:
            found[step] = copy.deepcopy(model)
    return found


def measure(problem: Problem, data: Data, seed: int, known: set[Key]) -> Iterator[dict[str, Any]]:
    """A row for each checkpoint, rank and way that is not known yet."""
    for step, model in checkpoints(problem, data, seed).items():
        chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))[: problem.images]
        batch = Batch(problem, model, data.images[chosen], data.labels[chosen])
        ways = {
            (problem.network, step, seed, k, name): solve
            for k in problem.ranks
            for name, solve in batch.ways(k).items()
            if (problem.network, step, seed, k, name) not in known
        }
        if not ways:
            continue
        exact = Batch(problem, copy.deepcopy(model).double(), batch.images.double(), batch.labels)
        most = max(problem.ranks)
        all_values, all_vectors, _ = exact.ours(most, solver="arpack", tol=1e-6)
        started = time.process_time()
        for _ in range(3):
            torch.autograd.grad(batch.loss(), batch.params)
        unit = (time.process_time() - started) / 3
        for (network, _, _, k, name), solve in ways.items():
            values, vectors = all_values[:k], all_vectors[:k]
            started = time.process_time()
            try:
                found, rows_found, gradients = solve()
            except RuntimeError as error:  # curvlinops has no BatchNorm in training mode: the table says so
                if name.startswith("ours"):
                    raise
                print(f"{network}, {name}: {str(error).splitlines()[0]}", flush=True)
                found, rows_found, gradients = torch.empty(0), torch.full_like(vectors, math.nan), math.nan
                started = math.nan
            spent = time.process_time() - started
            order = found.double().sort(descending=True)
            cosines = rows_found.double() @ vectors.T
            off = ((order.values[:k] - values) / values).abs().max() if len(order.values) >= k else math.nan
            row = {"network": network, "parameters": vectors.shape[1], "images": problem.images}
            row |= {"step": step, "seed": seed, "k": k, "solver": name, "gradients": gradients}
            row["seconds_in_gradients"] = round(spent / unit, 1)
            row["overlap"] = round(float(cosines.square().sum() / k), 5)
            row["eigenvalue_error"] = float(f"{float(off):.2g}")
            yield row


def main() -> None:
    parser = arguments(__doc__, "eigen.csv")
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # the peers' own deprecations
    data = load(args, limit=12_000, val=2_000)
    _, channels, side, _ = data.images.shape
    rows: list[dict[str, Any]] = read_csv(args.out) if args.out.exists() and not args.smoke else []
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no double backward
        for seed in range(1 if args.smoke else args.seeds):
            for problem in problems(side, channels, args.smoke):
                known = {(row["network"], row["step"], row["seed"], row["k"], row["solver"]) for row in rows}
                for row in measure(problem, data, seed, known):
                    rows.append(row)
                    if not args.smoke:
                        write_csv(args.out, rows)
    print_table(*table(rows))


def table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Medians over checkpoints and seeds."""
    body = []
    networks = list(dict.fromkeys(row["network"] for row in rows))
    libraries = list(dict.fromkeys(row["solver"].split(":")[0] for row in rows))
    keys = dict.fromkeys((row["network"], row["k"], row["solver"]) for row in rows)
    for key in sorted(keys, key=lambda key: (networks.index(key[0]), key[1], libraries.index(key[2].split(":")[0]))):
        own = [row for row in rows if (row["network"], row["k"], row["solver"]) == key]
        overlaps = [row["overlap"] for row in own]
        if any(math.isnan(overlap) for overlap in overlaps):
            body.append([f"{key[0]}, k = {key[1]}, {key[2]}", *["does not run"] * 2, *[""] * 3])
            continue
        middle = {c: median(r[c] for r in own) for c in ("gradients", "seconds_in_gradients", "eigenvalue_error")}
        counts = [f"{middle['gradients']:.0f}", f"{middle['seconds_in_gradients']:.0f}"]
        quality = [f"{median(overlaps):.3f}", f"{min(overlaps):.3f}", f"{middle['eigenvalue_error']:.1e}"]
        body.append([f"{key[0]}, k = {key[1]}, {key[2]}", *counts, *quality])
    return ("solver", "gradients", "seconds / gradient's", "overlap", "least", "eigenvalue error"), body


if __name__ == "__main__":
    main()
