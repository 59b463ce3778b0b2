"""ReadOuts: averages equal to plain loops over recorded weights, in a run that they do not touch."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strangers import Everything, Memory, Smooth, classes, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules import ReadOuts

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STEPS = 20


class Record(pl.Callback):
    """The weights after every optimizer step, flat."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(flat(pl_module))


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fitted(make_trainer: Any, read_outs: ReadOuts, **options: Any) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    module, record = Everything(SGD), Record()
    trainer = make_trainer(max_epochs=4, callbacks=[read_outs, record], **options)
    trainer.fit(module, loader(samples=80))  # 5 batches
    return module, record.weights


def read(read_outs: ReadOuts, name: Any, module: Any) -> Tensor:
    with read_outs.applied(name, module):
        return flat(module)


@pytest.mark.parametrize(("options", "steps"), [({}, STEPS), ({"accumulate_grad_batches": 2}, 12)])
def test_averages_equal_plain_loops_over_the_weights(make_trainer, options, steps):
    read_outs = ReadOuts(ema_decay=0.8, swa_share=0.25, two_point_share=0.3)
    module, weights = fitted(make_trainer, read_outs, **options)
    assert len(weights) == steps  # of two batches each, and one in the remainder of each epoch
    ema = weights[0].double()
    for step, w in enumerate(weights[1:], start=2):
        decay = min(0.8, (1 + step) / (10 + step))  # warm-up: 3/12, 4/13 ...
        ema = decay * ema + (1 - decay) * w.double()
    begin = {20: 15, 12: 9}[steps]  # SWA: the last quarter of the steps
    swa = torch.stack(weights[begin:]).double().mean(0)
    first = {20: 14, 12: 8}[steps]  # 1 - 0.3 of the steps, rounded
    two = (weights[first - 1].double() + weights[-1].double()) / 2
    assert read_outs.available == ["last", "ema", "swa", "two-point"]
    # float32 running updates against float64 sums
    assert torch.allclose(read(read_outs, "ema", module).double(), ema, atol=1e-6)
    assert torch.allclose(read(read_outs, "swa", module).double(), swa, atol=1e-6)
    assert torch.equal(read(read_outs, "two-point", module), two.float())  # one exact sum, one exact halving
    assert torch.equal(read(read_outs, "last", module), weights[-1])


class TwoOptimizers(pl.LightningModule):
    """Steps both in each batch, as a GAN does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(6, 1), nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, net in zip(self.optimizers(), (self.one, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.one, self.other)]


@pytest.mark.parametrize(
    "options", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 40}, {"max_epochs": 9, "max_steps": 40}], ids=str
)
def test_averages_of_several_optimizers_run_over_batches_and_not_over_steps(make_trainer, options):
    weights: list[Tensor] = []

    class Each(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            weights.append(flat(pl_module))

    read_outs, module = ReadOuts(), TwoOptimizers()
    make_trainer(callbacks=[read_outs, Each()], **options).fit(module, loader(samples=80))
    assert len(weights) == 20
    swa, two = torch.stack(weights[15:]).mean(0), (weights[17] + weights[19]) / 2  # a quarter, and a tenth, of 20
    assert torch.allclose(read(read_outs, "swa", module), swa, atol=1e-6)  # running updates against one sum
    assert torch.allclose(read(read_outs, "two-point", module), two, atol=1e-6)


class Ramp(pl.LightningModule):
    """A weight that goes from 1 to 1.5, so slowly that bfloat16 takes many steps for one of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def go(self, read_outs: ReadOuts, steps: range) -> list[float]:
        weights = []
        for step in steps:
            self.weight.detach().fill_(1 + 0.5 * step / 1000)
            weights.append(self.weight.item())
            trainer: Any = SimpleNamespace(
                optimizers=[], global_step=step, estimated_stepping_batches=1000, max_steps=-1
            )
            read_outs.on_train_batch_end(trainer, self, None, None, step)
        return weights


# A bfloat16 between 1 and 2 is 2^-7 from the next.
@pytest.mark.parametrize(("dtype", "apart"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float64, 1e-12)])
def test_averages_of_weights_in_few_bits_are_those_of_a_loop_in_many(dtype, apart):
    read_outs, module = ReadOuts(), Ramp(dtype)
    weights = module.go(read_outs, range(1, 1001))
    ema = weights[0]
    for step, w in enumerate(weights[1:], start=2):
        decay = min(0.99, (1 + step) / (10 + step))
        ema = decay * ema + (1 - decay) * w
    expected = {"ema": ema, "swa": sum(weights[750:]) / 250, "two-point": (weights[899] + weights[999]) / 2}
    for name, value in expected.items():
        with read_outs.applied(name, module):
            assert module.weight.dtype == dtype
            assert module.weight.item() == pytest.approx(value, abs=apart), name


def test_a_checkpoint_whose_averages_were_in_bfloat16_goes_on_in_float32():
    read_outs, module = ReadOuts(), Ramp(torch.bfloat16)
    module.go(read_outs, range(1, 11))
    state = read_outs.state_dict()
    state["averages"] = {name: [a.bfloat16() for a in values] for name, values in state["averages"].items()}
    resumed = ReadOuts()
    resumed.load_state_dict(state)
    trainer: Any = SimpleNamespace()
    resumed.on_train_start(trainer, module)
    module.go(resumed, range(11, 1001))
    assert read(resumed, "ema", module).item() == pytest.approx(1.452, abs=2**-7)


def test_training_is_bit_identical_with_and_without(make_trainer, random_state):
    found = []
    for callbacks in ([], [ReadOuts()]):
        module, logger = Everything(SGD), Memory()
        torch.manual_seed(5)
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, logger=logger)
        trainer.fit(module, loader(shuffle=True))
        found.append((module.plain_state(), logger.rows, random_state(), [m.training for m in module.modules()]))
    assert found[0] == found[1]


def test_an_average_that_never_began_is_not_available(make_trainer):
    read_outs = ReadOuts()
    assert read_outs.available == ["last"]
    module = Everything(SGD)
    before = flat(module)
    trainer = make_trainer(max_epochs=4, callbacks=[read_outs])

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    trainer.callbacks.append(Stop())
    trainer.fit(module, loader())
    assert trainer.global_step < 6
    assert read_outs.available == ["last", "ema"]
    last = flat(module)
    for name in ("swa", "two-point", "mean"):
        with (
            pytest.raises(ValueError, match=f"expected a read-out among last, ema, got '{name}'"),
            read_outs.applied(name, module),
        ):
            pass
    assert torch.equal(flat(module), last)
    assert not torch.equal(last, before)


class Unending(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return zip(*classes(64, 2, 2).tensors, strict=True)


@pytest.mark.parametrize(
    "options", [{"max_epochs": -1, "max_steps": -1, "max_time": {"seconds": 20}}, {"max_epochs": 2}]
)
def test_a_run_without_a_known_length_still_trains_and_averages(make_trainer, options):
    """Lightning then estimates infinitely many steps, or -1; no share of them has begun."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    read_outs = ReadOuts()
    trainer = make_trainer(**options, callbacks=[read_outs, Stop()])
    trainer.fit(Smooth(SGD), DataLoader(Unending(), batch_size=16))
    assert read_outs.available == ["last", "ema"]


# -- applying --------------------------------------------------------------------------------------------------------


def snapshot(module: Everything, random_state: Any) -> Any:
    bn = [m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm1d)]
    return module.plain_state(), [m.training for m in module.modules()], bn, random_state()


@pytest.mark.parametrize("name", ["last", "ema", "swa", "two-point"])
@pytest.mark.parametrize("where", [None, "inside", "calibration"])
def test_weights_buffers_and_modes_are_put_back(make_trainer, random_state, name, where):
    read_outs = ReadOuts()
    module, _ = fitted(make_trainer, read_outs)
    module.train()
    module.net[3].eval()
    before = snapshot(module, random_state)

    def batches() -> Any:
        yield classes().tensors
        if where == "calibration":
            raise RuntimeError("as planned")

    def use() -> None:
        with read_outs.applied(name, module, batches()) as applied:
            assert applied is module
            assert not any(m.training for m in module.modules())
            torch.rand(3)
            with torch.no_grad():
                module.net[0].weight.zero_()
            module.net[1].running_mean.zero_()
            if where == "inside":
                raise RuntimeError("as planned")

    if where is None:
        use()
    else:
        with pytest.raises(RuntimeError, match="as planned"):
            use()
    assert snapshot(module, random_state) == before


def test_batchnorm_statistics_are_those_of_the_calibration_batches(make_trainer):
    """Of two layers: the second sees the first normalise with each batch's own statistics, as in training."""
    read_outs = ReadOuts()
    torch.manual_seed(0)

    class Plain(Everything):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            self.net[3] = nn.Identity()  # no dropout

    module = Plain(SGD)
    make_trainer(max_epochs=4, callbacks=[read_outs]).fit(module, loader(samples=80))
    x, y = classes(64, seed=9).tensors
    batches = [x[:16], x[16:32], x[32:48]]
    with read_outs.applied("swa", module, list(zip(batches, y.split(16), strict=False))):
        first, bn, _, _, last, bn_last = module.net
        hidden = [first(b) for b in batches]
        scaled = [(h - h.mean(0)) / (h.var(0, unbiased=False) + bn.eps).sqrt() * bn.weight + bn.bias for h in hidden]
        outputs = [last(s.relu()) for s in scaled]
        for layer, values in ((bn, hidden), (bn_last, outputs)):  # cumulative: means over batches
            assert torch.allclose(layer.running_mean, torch.stack([v.mean(0) for v in values]).mean(0), atol=1e-5)
            assert torch.allclose(layer.running_var, torch.stack([v.var(0) for v in values]).mean(0), atol=1e-5)


def test_without_calibration_the_last_weights_keep_their_own_statistics(make_trainer):
    read_outs = ReadOuts()
    module, _ = fitted(make_trainer, read_outs)
    own = module.net[1].running_mean.clone()
    assert own.abs().max() > 0.01
    with read_outs.applied("last", module):
        assert torch.equal(module.net[1].running_mean, own)


# -- checkpoints and options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_averages_resumed_from_a_checkpoint_are_bitwise_uninterrupted(make_trainer, tmp_path, epoch, accumulate):
    def run(resume: Any = None) -> tuple[Any, ReadOuts]:
        torch.manual_seed(0)
        module, read_outs = Smooth(SGD), ReadOuts(swa_share=0.4, two_point_share=0.5)
        saves = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
        callbacks = [read_outs, *([] if resume else [saves])]
        options = {"enable_checkpointing": not resume, "accumulate_grad_batches": accumulate}
        trainer = make_trainer(max_epochs=5, callbacks=callbacks, **options)
        trainer.fit(module, loader(features=2, number=2), ckpt_path=resume)
        return module, read_outs

    (module, whole), (again, resumed) = run(), run(tmp_path / f"epoch={epoch}.ckpt")
    assert resumed.available == whole.available == ["last", "ema", "swa", "two-point"]
    for name in whole.available:
        assert torch.equal(read(resumed, name, again), read(whole, name, module)), name


@pytest.mark.parametrize("option", ["ema_decay", "swa_share", "two_point_share"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, float("nan")])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"expected {option} between 0 and 1"):
        ReadOuts(**{option: value})
