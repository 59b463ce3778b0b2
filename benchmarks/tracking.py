"""Which way of following the sharpest directions gives the best basis for its price?

Records training paths of a CNN of 25,578 parameters on 12,000 CIFAR-10 images, with the exact top 20 eigenpairs of the
Hessian on 800 of them at points along the way. Every tracker then follows the same paths. For each, averaged over
those points: the overlap of its basis with the exact top 10; the curvature that it catches, tr(V H V^T) over the sum
of the top 10; the sharpness that a step damped by gamma = 0.1 still feels, the largest eigenvalue of M^(1/2) H M^(1/2),
as a multiple of max(gamma lambda_1, lambda_11) (an upper bound: what lies outside the exact 20 counts with lambda_20).
The price is in gradients of a training batch, a step.

    python benchmarks/tracking.py --data PATH_OR_HUB_NAME    # half an hour; writes benchmarks/results/tracking.csv
    python benchmarks/tracking.py --smoke                    # seconds, on digits, writes nothing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from common import Data, add_data, arguments, load, print_table, small_cnn
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_modules.support.files import write_csv
from nsgd import NSGD, Eigenpairs, backward_in_chunks, sample_losses, top_eigenpairs
from nsgd.curvature.hessian import Losses, loss_hessian
from nsgd.directions.directions import Directions
from nsgd.directions.running_average import Average, Estimate, follow
from nsgd.directions.samples import gradient_moment
from nsgd.options import DampingOptions

K, KEPT, EXACT, GAMMA = 10, 20, 20, 0.1  # directions that are judged, that averages keep, that are known exactly


@dataclass(frozen=True)
class Path:
    """A training run: its optimizer, its length, and how many points of it are looked at."""

    name: str
    batch: int
    steps: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    points: int = 8


PATHS = (
    Path("SGD, batch 128", 128, 560, lambda p: torch.optim.SGD(p, lr=0.1)),
    Path("SGD with momentum, batch 1,024", 1024, 176, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    Path("NSGD with momentum, batch 1,024", 1024, 176, lambda p: NSGD(p, lr=0.1, momentum=0.9, k=20)),
)


class Problem:
    """The network and the images; losses of any of them at any parameters."""

    def __init__(self, data: Data) -> None:
        self.data = data
        torch.manual_seed(0)
        self.model = small_cnn(data.images.shape[1], data.images.shape[2])
        self.params = list(self.model.parameters())

    def loss(self, indices: Tensor) -> Tensor:
        """Mean loss of these images."""
        return cross_entropy(self.model(self.data.images[indices]), self.data.labels[indices])

    def singles(self, indices: Tensor, size: int = 1) -> Losses:
        """Losses of these images in groups of a size."""
        return sample_losses(self.loss, indices, group_size=size, module=self.model)

    def classes(self, indices: Tensor) -> Losses:
        """Losses of these images, a group for each class."""
        labels = self.data.labels[indices]
        return [(lambda own=indices[labels == c]: self.loss(own), int((labels == c).sum())) for c in labels.unique()]


@dataclass
class Recorded:
    """A path with its batches, and the exact eigenpairs at some steps."""

    positions: list[Tensor] = field(default_factory=list)
    batches: list[Tensor] = field(default_factory=list)
    exact: dict[int, Eigenpairs] = field(default_factory=dict)


def record(problem: Problem, path: Path, images: int) -> Recorded:
    """Train, and note parameters and batches of every step, and exact eigenpairs on so many images at some."""
    generator = torch.Generator().manual_seed(1)
    count = len(problem.data.labels)
    fixed = torch.randperm(count, generator=generator)[:images]
    optimizer = path.optimizer(problem.params)
    found = Recorded()
    waiting = torch.empty(0, dtype=torch.long)
    spacing = path.steps // path.points
    for step in range(path.steps):
        if len(waiting) < path.batch:
            waiting = torch.randperm(count, generator=generator)
        batch, waiting = waiting[: path.batch], waiting[path.batch :]
        found.positions.append(parameters_to_vector(problem.params).detach())
        found.batches.append(batch)
        if step % spacing == spacing - 1:
            found.exact[step] = top_eigenpairs(
                problem.loss(fixed), problem.params, k=EXACT, max_hvps=50, tol=1e-2, repeated=False
            )
        optimizer.zero_grad()
        loss = problem.loss(batch)
        if isinstance(optimizer, NSGD):
            groups = problem.singles(batch[:32])
            optimizer.backward(loss, curvature=groups, batch_fraction=32 / path.batch)
        else:
            loss.backward()
        optimizer.step()
    return found


class Tracker:
    """A basis that follows a path: an estimate every so many steps, averaged with the last ones."""

    def __init__(
        self,
        name: str,
        every: int,
        decay: float,
        estimate: Callable[[Problem, Tensor, Tracker], tuple[Estimate, float]],
    ) -> None:
        self.name, self.every, self.decay, self.estimate = name, every, decay, estimate
        self.now: Average | None = None
        self.samples = 0.0  # gradients of one sample, in all
        self.generator = torch.Generator().manual_seed(2)

    def follow(self, problem: Problem, batch: Tensor, step: int) -> None:
        """Take in a step of the path; the parameters are in the network."""
        if step % self.every:
            return
        new, samples = self.estimate(problem, batch, self)
        self.samples += samples
        self.now = follow(self.now, new, decay=self.decay, k=KEPT if self.decay else K)


class FromTraining(Tracker):
    """Training gradients, as the optimizer follows them by default, at no gradient: differences, or of chunks."""

    def __init__(self, decay: float, chunks: int = 1) -> None:
        what = "differences of training gradients" if chunks == 1 else f"training gradients in {chunks} micro-batches"
        super().__init__(f"{what}, decay {decay}", 1, decay, batch_gradient)
        self.chunks = chunks
        self.directions = Directions(DampingOptions(k=KEPT, step_decay=decay))

    def follow(self, problem: Problem, batch: Tensor, step: int) -> None:
        """Take in a step of the path."""
        self.directions.arrange([(0, p) for p in problem.params])
        self.directions.end_step()  # passes of other trackers are none of this one's
        problem.model.zero_grad()
        backward_in_chunks(problem.loss, batch, chunks=self.chunks)
        self.directions.note_gradients(None, None)
        self.directions.counts.steps += 1
        if self.directions.rank:
            self.now = Average(self.directions.weights, self.directions.along(problem.params), 0, 0.0)


def lanczos(products: int, samples: int) -> Callable[..., tuple[Estimate, float]]:
    """Lanczos from the gradient on the first samples of the batch."""

    def estimate(problem: Problem, batch: Tensor, _: Tracker) -> tuple[Estimate, float]:
        options: dict[str, Any] = {"k": min(K, products), "max_hvps": products, "repeated": False}
        pairs = top_eigenpairs(problem.loss(batch[:samples]), problem.params, **options)
        return (pairs.eigenvalues.double().clamp(min=0), pairs.eigenvectors), (1 + 2 * pairs.hvps) * samples

    return estimate


def block_sweep(samples: int) -> Callable[..., tuple[Estimate, float]]:
    """Products of the last basis and the gradient: the Nystroem approximation H W (W^T H W)^-1 W^T H."""

    def estimate(problem: Problem, batch: Tensor, tracker: Tracker) -> tuple[Estimate, float]:
        with loss_hessian(problem.loss(batch[:samples]), problem.params) as hessian:
            rows = (
                torch.randn(K, len(hessian.gradient), generator=tracker.generator)
                if tracker.now is None
                else tracker.now.vectors[:K]
            )
            block = torch.linalg.qr(torch.cat([rows, hessian.gradient[None]]).T).Q.T
            images = torch.stack([hessian.hvp(row) for row in block])
        values, coordinates = torch.linalg.eigh((block @ images.T + images @ block.T) / 2)
        kept = values > 1e-3 * values.max()
        vectors = (coordinates[:, kept] / values[kept].sqrt()).T @ images
        return (torch.ones(len(vectors), dtype=torch.float64), vectors), (1 + 2 * len(block)) * samples

    return estimate


def one_product(samples: int) -> Callable[..., tuple[Estimate, float]]:
    """Orthogonal iteration spread over steps: each replaces one direction by its product, in turn."""

    def estimate(problem: Problem, batch: Tensor, tracker: Tracker) -> tuple[Estimate, float]:
        with loss_hessian(problem.loss(batch[:samples]), problem.params) as hessian:
            if tracker.now is None:
                rows = torch.randn(K, len(hessian.gradient), generator=tracker.generator)
                weights, vectors = torch.ones(K, dtype=torch.float64), torch.linalg.qr(rows.T).Q.T
            else:
                weights, vectors = tracker.now.weights.clone(), tracker.now.vectors.clone()
            turn = int(torch.randint(len(weights), (1,), generator=tracker.generator))
            image = hessian.hvp(vectors[turn])
        length = torch.linalg.vector_norm(image)
        weights[turn], vectors[turn] = length.double(), image / length
        return (weights, torch.linalg.qr(vectors.T).Q.T), 3 * samples

    return estimate


def batch_gradient(problem: Problem, batch: Tensor, _: Tracker) -> tuple[Estimate, float]:
    """The training gradient itself, which is there anyway."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(problem.loss(batch), problem.params)])
    return (torch.ones(1, dtype=torch.float64), gradient[None]), 0.0


def moment(samples: int, size: int | None = 1) -> Callable[..., tuple[Estimate, float]]:
    """Second moment of the gradients of groups of a size, or of one group for each class."""

    def estimate(problem: Problem, batch: Tensor, _: Tracker) -> tuple[Estimate, float]:
        groups = problem.classes(batch[:samples]) if size is None else problem.singles(batch[:samples], size)
        return gradient_moment(groups, problem.params), samples

    return estimate


def trackers(batch: int) -> list[Tracker]:
    """All that are compared on a path of this batch size."""
    single = [
        (32, 1, 0.95),
        (32, 1, 0.98),
        (32, 3, 0.857),
        (32, 3, 0.95),
        (128, 12, 0.785),
    ]
    if batch >= 1024:
        single.append((96, 1, 0.95))  # a tenth of a gradient
    return [
        Tracker("Lanczos, 22 products on 128 samples, every 50 steps", 50, 0, lanczos(22, 128)),
        Tracker("Lanczos, 15 products on 128, every 20", 20, 0, lanczos(15, 128)),
        Tracker("averaged Lanczos, 12 products on 32, every 20", 20, 0.8, lanczos(12, 32)),
        Tracker("averaged Lanczos, 6 products on 16, every 20", 20, 0.8, lanczos(6, 16)),
        Tracker("averaged block sweep, 11 products on 32, every 20", 20, 0.8, block_sweep(32)),
        Tracker("one product on 16, every step", 1, 0, one_product(16)),
        Tracker("averaged gradient of the batch", 1, 0.98, batch_gradient),
        *(FromTraining(decay) for decay in (0.95, 0.98, 0.99)),
        *(FromTraining(decay, 8) for decay in (0.95, 0.97, 0.98)),
        FromTraining(0.98, 4),
        Tracker("averaged gradients, 32 classes' samples, every step", 1, 0.95, moment(32, None)),
        *(
            Tracker(f"averaged gradients of single samples, {n}, every {e}, decay {decay}", e, decay, moment(n))
            for n, e, decay in single
        ),
        Tracker("averaged gradients of groups of 4, 32, every step, decay 0.95", 1, 0.95, moment(32, 4)),
        Tracker("averaged gradients of groups of 4, 128, every 4, decay 0.815", 4, 0.815, moment(128, 4)),
    ]


def quality(vectors: Tensor, exact: Eigenpairs) -> dict[str, float]:
    """Overlap, curvature caught and sharpness felt of a basis (r, P)."""
    values, axes = exact.eigenvalues.double(), exact.eigenvectors.double()
    basis = vectors[:K].double()
    squares = (basis @ axes.T).square()  # (r, EXACT)
    joint = torch.linalg.qr(torch.cat([axes, basis]).T).Q.T  # everything happens in the span of both
    inside, damped = joint @ axes.T, joint @ basis.T
    hessian = (inside * (values - values[-1])) @ inside.T + values[-1] * torch.eye(len(joint), dtype=torch.float64)
    root = torch.eye(len(joint), dtype=torch.float64) - (1 - GAMMA**0.5) * damped @ damped.T
    felt = torch.linalg.eigvalsh(root @ hessian @ root).max()
    return {
        "overlap": float(squares[:, :K].sum() / K),
        "caught": float((squares @ values).sum() / values[:K].sum()),
        "felt": float(felt / max(GAMMA * values[0], values[K])),
    }


def measure(problem: Problem, path: Path, recorded: Recorded) -> list[dict[str, Any]]:
    """Let every tracker follow a recorded path, and measure it where the exact eigenpairs are known."""
    rows = []
    running = trackers(path.batch)
    for step in range(max(recorded.exact) + 1):
        vector_to_parameters(recorded.positions[step], problem.params)
        for tracker in running:
            tracker.follow(problem, recorded.batches[step], step)
            if step in recorded.exact and tracker.now is not None:
                row = {"path": path.name, "step": step, "tracker": tracker.name}
                price = tracker.samples / path.batch / (step + 1)
                rows.append({**row, "gradients_per_step": price, **quality(tracker.now.vectors, recorded.exact[step])})
    return rows


def main() -> None:
    parser = arguments(__doc__, "tracking.csv")
    add_data(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args, limit=12_000, val=2_000)
    paths = (Path("smoke", 128, 12, lambda p: torch.optim.SGD(p, lr=0.1), 2),) if args.smoke else PATHS
    rows = []
    for path in paths:
        problem = Problem(data)
        rows += measure(problem, path, record(problem, path, 100 if args.smoke else 800))
        if not args.smoke:
            write_csv(args.out, rows)
    print_table(*table(rows))


def table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Means over the points of each path: price, overlap, curvature caught and sharpness felt."""
    body = []
    for path, name in dict.fromkeys((row["path"], row["tracker"]) for row in rows):
        own = [row for row in rows if (row["path"], row["tracker"]) == (path, name)]
        means = [f"{mean(row[m] for row in own):.2f}" for m in ("overlap", "caught", "felt")]
        body.append([f"{path}: {name}", f"{own[-1]['gradients_per_step']:.3f}", *means])
    return ("tracker", "gradients a step", "overlap", "caught", "felt"), body


if __name__ == "__main__":
    main()
