"""How many Hessian-vector products do good directions take?

Trains a CNN of 25,578 parameters for 150 SGD steps (lr 0.05, batch 64), takes 800 training images, and compares the
top-k eigenvectors found with m products with the exact ones (ARPACK at tol 1e-10, in float64): subspace overlap,
that is the mean squared cosine of the principal angles, and the largest relative error of an eigenvalue. Work is
counted in gradients of those 800 images.

    python benchmarks/eigen.py --data PATH_OR_HUB_NAME     # writes benchmarks/results/eigen.csv
    python benchmarks/eigen.py --smoke                     # seconds, on digits, writes nothing
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_modules import Digits, HuggingFace
from lightning_modules.compare import write_csv
from nsgd import Eigenpairs, top_eigenpairs

K, STEPS, BATCH, LR, IMAGES = 10, 150, 64, 0.05, 800


def small_cnn(channels: int, side: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 10)),
    )


def checkpoint(images: Tensor, labels: Tensor, seed: int, steps: int) -> nn.Sequential:
    """The network after some SGD steps on random batches."""
    torch.manual_seed(seed)
    model = small_cnn(images.shape[1], images.shape[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,))
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model


def class_gradients(model: nn.Sequential, images: Tensor, labels: Tensor) -> Tensor:
    """Gradients of each class's mean loss, (classes, P)."""
    rows = []
    for label in labels.unique():
        loss = cross_entropy(model(images[labels == label]), labels[labels == label])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def measure(images: Tensor, labels: Tensor, seed: int, steps: int, count: int) -> list[dict[str, object]]:
    model = checkpoint(images, labels, seed, steps)
    sample = torch.randperm(len(labels))[:count]
    images, labels = images[sample], labels[sample]
    params = list(model.parameters())

    def solve(**options: object) -> Eigenpairs:
        return top_eigenpairs(cross_entropy(model(images), labels), params, k=K, **options)

    model.double()
    images = images.double()
    exact = solve(solver="arpack", tol=1e-10)
    model.float()
    images = images.float()
    # Class means span most of the top eigenspace, with random signs none of it cancels: one more gradient in all.
    by_class = class_gradients(model, images, labels)
    signs = torch.randint(0, 2, (len(by_class),)) * 2 - 1
    spread = (signs[:, None] * by_class / torch.linalg.vector_norm(by_class, dim=1, keepdim=True)).sum(0)
    settings: dict[str, dict[str, object]] = {
        f"Lanczos from the gradient, {m} products": {"max_hvps": m, "repeated": False} for m in (12, 15, 18, 20, 22, 26)
    }
    settings |= {
        f"Lanczos from class means, {m} products": {"max_hvps": m, "repeated": False, "start": spread}
        for m in (18, 20, 22)
    }
    settings |= {"Lanczos at its defaults": {}}
    settings |= {f"ARPACK, tol {tol:g}": {"solver": "arpack", "tol": tol} for tol in (1e-1, 1e-2, 1e-3)}
    rows: list[dict[str, object]] = []
    for name, options in settings.items():
        found = solve(**options)
        cosines = found.eigenvectors.double() @ exact.eigenvectors.T
        error = ((found.eigenvalues.double() - exact.eigenvalues) / exact.eigenvalues).abs().max()
        rows.append(
            {
                "seed": seed,
                "solver": name,
                "hvps": found.hvps,
                "gradients": found.cost_gradients + ("start" in options),
                "overlap": round(float(cosines.square().sum() / K), 5),
                "eigenvalue_error": float(f"{float(error):.3g}"),
                "converged": found.converged,
                "lambda_1": round(float(exact.eigenvalues[0]), 3),
                "lambda_k": round(float(exact.eigenvalues[-1]), 3),
                "parameters": sum(p.numel() for p in params),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="CIFAR-10: a hub name or a local folder")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "eigen.csv")
    parser.add_argument("--smoke", action="store_true", help="a few steps on digits")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = Digits() if args.smoke else HuggingFace(args.data, limit=20_000, val_fraction=0.1)
    train = data.splits["train"]
    images = data.normalise(train.pixels)
    seeds, steps, count = (1, 5, 100) if args.smoke else (args.seeds, STEPS, IMAGES)
    rows = [row for seed in range(seeds) for row in measure(images, train.labels, seed, steps, count)]
    print(
        f"{'solver':40} {'products':>8} {'gradients':>9} {'overlap: median':>15} {'least':>7} {'eigenvalue error':>16}"
    )
    for name in dict.fromkeys(row["solver"] for row in rows):
        of_solver = [row for row in rows if row["solver"] == name]
        hvps, gradients, error = (
            median(float(str(r[c])) for r in of_solver) for c in ("hvps", "gradients", "eigenvalue_error")
        )
        overlaps = [float(str(r["overlap"])) for r in of_solver]
        print(f"{name:40} {hvps:8.0f} {gradients:9.0f} {median(overlaps):15.3f} {min(overlaps):7.3f} {error:16.1e}")
    if not args.smoke:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
