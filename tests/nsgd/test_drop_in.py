"""The table of loops that NSGD drops into: each trains 30 steps with the optimizer's line changed and no other.

Of each: directions appear, the step is damped along them, and at gamma = 1 it is bitwise SGD. None of these loops could
be repeated by a second look at the loss without care: they update a teacher, consume their batch, compare samples with
each other, or leave the backward pass to somebody else.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from nsgd import NSGD

STEPS = 30
Make = Callable[..., Optimizer]  # parameters to an optimizer
Run = tuple[list[Tensor], Optimizer]  # what was trained, by what


def seeded(module_of: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return module_of()


def loop(model: nn.Module, make: Make, loss_of: Callable[[nn.Module, int], Tensor]) -> Run:
    optimizer = make(model.parameters())
    torch.manual_seed(1)
    for i in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()
    return list(model.parameters()), optimizer


def batch(i: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + i))


def labels(i: int, n: int, classes: int = 4) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(100 + i))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


# -- plain PyTorch --------------------------------------------------------------------------------------------


def plain(make: Make) -> Run:
    return loop(seeded(mlp), make, lambda model, i: F.cross_entropy(model(batch(i, 16, 6)), labels(i, 16)))


def compiled(make: Make) -> Run:
    torch.compiler.reset()
    model = seeded(mlp)
    fast = torch.compile(model, backend="aot_eager")
    return loop(model, make, lambda _, i: F.cross_entropy(fast(batch(i, 16, 6)), labels(i, 16)))


class Checkpointed(nn.Module):
    """A frozen stem, and a head whose activations are computed again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.body, self.head, self.reentrant = (
            nn.Linear(6, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 4),
            reentrant,
        )
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).requires_grad_(self.reentrant)
        h = checkpoint(lambda h: self.body(h).tanh(), h, use_reentrant=self.reentrant)
        return self.head(h)


def checkpointed(reentrant: bool) -> Callable[[Make], Run]:
    def run(make: Make) -> Run:
        model = seeded(lambda: Checkpointed(reentrant))
        return loop(model, make, lambda model, i: F.cross_entropy(model(batch(i, 16, 6)), labels(i, 16)))

    return run


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(x)[0][-1])
        return out


def time_major(make: Make) -> Run:
    """Batches of shape (time, samples, features)."""
    return loop(seeded(Recurrent), make, lambda m, i: F.cross_entropy(m(batch(i, 5, 16, 6)), labels(i, 16)))


def contrastive(make: Make) -> Run:
    """Samples are compared with each other: one alone has no loss."""

    def loss(model: nn.Module, i: int) -> Tensor:
        x = batch(i, 16, 6)
        one, other = (F.normalize(model(x + 0.1 * torch.randn(16, 6)), dim=1) for _ in range(2))
        return F.cross_entropy(one @ other.T / 0.2, torch.arange(16))

    return loop(seeded(mlp), make, loss)


def ctc(make: Make) -> Run:
    """Targets of all samples end to end."""

    def loss(model: nn.Module, i: int) -> Tensor:
        logits = model(batch(i, 12, 8, 6)).log_softmax(2)  # (time, samples, classes)
        lengths = torch.full((8,), 3)
        return F.ctc_loss(logits, 1 + labels(i, 24, 3), torch.full((8,), 12), lengths)

    return loop(seeded(mlp), make, loss)


def teacher(make: Make) -> Run:
    """The step moves a teacher, an average of the student, by its data."""
    target = copy.deepcopy(seeded(mlp)).requires_grad_(False)

    def loss(model: nn.Module, i: int) -> Tensor:
        for t, s in zip(target.parameters(), model.parameters(), strict=True):
            t.data = 0.9 * t.data + 0.1 * s.data
        x = batch(i, 16, 6)
        return F.cross_entropy(model(x), labels(i, 16)) + F.mse_loss(model(x), target(x))

    return loop(seeded(mlp), make, loss)


def popped(make: Make) -> Run:
    """The step takes its labels out of the batch, and normalises it in place."""

    def loss(model: nn.Module, i: int) -> Tensor:
        b = {"x": batch(i, 16, 6), "y": labels(i, 16)}
        y = b.pop("y")
        return F.cross_entropy(model(b["x"].sub_(0.5)), y)

    return loop(seeded(mlp), make, loss)


def weighted(make: Make) -> Run:
    weights = torch.tensor([1.0, 10.0, 0.1, 1.0])
    return loop(seeded(mlp), make, lambda m, i: F.cross_entropy(m(batch(i, 16, 6)), labels(i, 16), weight=weights))


def accumulated(make: Make) -> Run:
    model = seeded(mlp)
    optimizer = make(model.parameters())
    for i in range(4 * STEPS):
        (F.cross_entropy(model(batch(i, 16, 6)), labels(i, 16)) / 4).backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    return list(model.parameters()), optimizer


# -- loops of other libraries ---------------------------------------------------------------------------------


def with_accelerate(make: Make, passes: int = 1) -> Run:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=passes)
    model = seeded(mlp)
    inner = make(model.parameters())
    model, optimizer = accelerator.prepare(model, inner)
    for i in range(passes * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(batch(i, 16, 6)), labels(i, 16)))
            optimizer.step()
            optimizer.zero_grad()
    return list(model.parameters()), inner


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4 * 8 * STEPS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        words = labels(i, 12, 40)
        return {"input_ids": words, "labels": words, "attention_mask": torch.ones_like(words)}


def transformers_trainer(make: Make, folder: Any, passes: int = 1) -> Run:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = seeded(lambda: transformers.GPT2LMHeadModel(config))
    optimizer = make(model.parameters())
    options = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, max_steps=STEPS, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, seed=3,
        gradient_accumulation_steps=passes,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = transformers.Trainer(
        model=model, args=options, train_dataset=Sentences(), optimizers=(optimizer, schedule)
    )
    trainer.train()
    return list(model.parameters()), optimizer


def lightning(make: Make, folder: Any, manual: bool, passes: int = 1) -> Run:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = mlp(), not manual

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Optimizer:
            return make(self.parameters())

    samples = 16 * passes * STEPS
    data = torch.utils.data.TensorDataset(batch(0, samples, 6), labels(0, samples))
    module = seeded(Module)
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=folder, accumulate_grad_batches=passes,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    return list(module.parameters()), trainer.optimizers[0]


def fabric(make: Make) -> Run:
    pytest.importorskip("lightning_fabric")
    from lightning_fabric import Fabric

    instance = Fabric(accelerator="cpu", devices=1)
    model = seeded(mlp)
    inner = make(model.parameters())
    model, optimizer = instance.setup(model, inner)
    for i in range(STEPS):
        optimizer.zero_grad()
        instance.backward(F.cross_entropy(model(batch(i, 16, 6)), labels(i, 16)))
        optimizer.step()
    return list(model.parameters()), inner


LOOPS: dict[str, Callable[..., Run]] = {
    "plain": plain,
    "compiled": compiled,
    "reentrant checkpointing": checkpointed(True),
    "checkpointing": checkpointed(False),
    "GRU, time-major": time_major,
    "contrastive": contrastive,
    "CTC": ctc,
    "EMA teacher": teacher,
    "a batch that the step pops": popped,
    "class weights": weighted,
    "accumulation": accumulated,
    "accelerate": with_accelerate,
    "Fabric": fabric,
    "transformers.Trainer": transformers_trainer,
    "Lightning": lambda make, folder: lightning(make, folder, manual=False),
    "Lightning, manual": lambda make, folder: lightning(make, folder, manual=True),
}
IN_A_FOLDER = ("transformers.Trainer", "Lightning", "Lightning, manual")
ACCUMULATING: dict[str, Callable[..., Run]] = {
    "plain": lambda make, folder: accumulated(make),
    "accelerate": lambda make, folder: with_accelerate(make, 4),
    "transformers.Trainer": lambda make, folder: transformers_trainer(make, folder, 4),
    "Lightning": lambda make, folder: lightning(make, folder, manual=False, passes=4),
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:pytorch_lightning"
)
@pytest.mark.parametrize("name", LOOPS)
def test_one_line_changes_against_sgd(name, tmp_path):
    def run(make: Make) -> Run:
        return LOOPS[name](make, tmp_path) if name in IN_A_FOLDER else LOOPS[name](make)

    plain_params, _ = run(lambda params: SGD(params, lr=0.05, momentum=0.9))
    same_params, same = run(lambda params: NSGD(params, lr=0.05, momentum=0.9, k=3, gamma=1.0))
    for p, q in zip(plain_params, same_params, strict=True):
        assert torch.equal(p, q)
    params, optimizer = run(lambda params: NSGD(params, lr=0.05, momentum=0.9, k=3, gamma=0.1))
    assert isinstance(optimizer, NSGD)
    for nudged in (optimizer, same):
        assert nudged.steps == STEPS
        assert len(nudged.weights) == 3
        vectors = nudged.directions(params if nudged is optimizer else same_params)
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(3), rtol=0, atol=1e-4)
    assert 0 < optimizer.alignment <= 1
    assert not all(torch.equal(p, q) for p, q in zip(plain_params, params, strict=True))
    shares = [float(optimizer.directions([p]).square().sum()) for p in params if p.requires_grad]
    assert min(shares) > 0  # every parameter that trains has its part
    assert all(p.isfinite().all() for p in params)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:pytorch_lightning"
)
@pytest.mark.parametrize("name", ACCUMULATING)
def test_accumulated_passes_are_told_apart(name, tmp_path):
    params, optimizer = ACCUMULATING[name](lambda params: NSGD(params, lr=0.05, momentum=0.9, k=3), tmp_path)
    assert isinstance(optimizer, NSGD)
    assert optimizer.steps == STEPS
    shares = optimizer._directions.differences.shares
    assert shares[:5].tolist() == pytest.approx(
        [7 / 6] * 4 + [1 / 16]
    )  # the last step's four passes, and its difference
    assert all(p.isfinite().all() for p in params)


def test_the_step_is_damped_along_the_directions_that_it_has_seen():
    """The first code block of the README, step by step: what SGD would do, but for a tenth of it along them."""
    model = seeded(mlp)
    optimizer = NSGD(model.parameters(), lr=0.05, momentum=0.9, k=3)
    twin = copy.deepcopy(model)
    sgd = SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for i in range(STEPS):
        twin.load_state_dict(model.state_dict())
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        for m, o in ((model, optimizer), (twin, sgd)):
            o.zero_grad()
            F.cross_entropy(m(batch(i, 16, 6)), labels(i, 16)).backward()
            o.step()
        step = nn.utils.parameters_to_vector(twin.parameters()).detach() - before  # the same buffer: it is not damped
        change = nn.utils.parameters_to_vector(model.parameters()).detach() - before
        vectors = optimizer.directions(model.parameters())
        torch.testing.assert_close(change, step - 0.9 * vectors.T @ (vectors @ step), rtol=0, atol=1e-6)
    assert all(earlier >= later for earlier, later in itertools.pairwise(optimizer.weights))
