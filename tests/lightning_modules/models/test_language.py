"""The language model and its text: windows by hand, losses by a plain loop, and training with directions."""

from __future__ import annotations

import math
from pydoc_data.topics import topics

import pytest
import pytorch_lightning as pl
import torch
from strangers import Memory

from lightning_modules import Characters, LanguageModel, RefreshDirections
from lightning_modules.callbacks import refresh
from nsgd import NSGD

TEXT = "".join(chr(ord("a") + (i * i + i // 7) % 23) for i in range(1000))  # 800, 100 and 100 characters
TINY = {"context": 16, "dim": 16, "depth": 1, "heads": 2}


@pytest.fixture
def written(tmp_path):
    """Writes a text file and gives its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "text.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# -- data ------------------------------------------------------------------------------------------------------------


def test_windows_are_consecutive_pieces_and_targets_the_characters_that_follow(written):
    data = Characters(written(TEXT), context=16, batch_size=8)
    characters = ["?", *sorted(set(TEXT[:800]))]
    assert data.vocabulary == len(characters) == 24
    for name, text in (("train", TEXT[:800]), ("val", TEXT[800:900]), ("test", TEXT[900:])):
        inputs, targets = data.splits[name].tensors
        count = (len(text) - 1) // 16
        assert inputs.shape == targets.shape == (count, 16)
        assert inputs.dtype == targets.dtype == torch.int64
        assert "".join(characters[i] for i in inputs.flatten()) == text[: 16 * count]
        assert "".join(characters[i] for i in targets.flatten()) == text[1 : 16 * count + 1]


def test_characters_that_the_training_text_lacks_are_one_token(written):
    data = Characters(written("ab" * 400 + "aXbY" * 25 + "Z" * 100), context=9, batch_size=2)
    assert data.vocabulary == 3
    assert data.splits["train"].tensors[0].unique().tolist() == [1, 2]
    assert data.splits["val"].tensors[0][0].tolist() == [1, 0, 2, 0, 1, 0, 2, 0, 1]
    assert data.splits["test"].tensors[1].unique().tolist() == [0]


def test_the_default_text_is_all_of_python_s_documentation():
    data = Characters()
    text = "\n".join(topics[name] for name in sorted(topics))
    assert len(text) > 400_000
    windows = sum(len(split) for split in data.splits.values())
    assert 0 <= len(text) - 64 * windows <= 3 * 64  # less than a window is left over in each split
    assert data.vocabulary == 1 + len(set(text[: round(0.8 * len(text))]))


def test_the_order_of_the_batches_is_a_function_of_seed_and_epoch(written):
    def order(seed: int, epoch: int) -> list[list[int]]:
        torch.manual_seed(seed)
        loader = Characters(written(TEXT), context=16, batch_size=8).train_dataloader()
        loader.sampler.set_epoch(epoch)
        torch.rand(3)  # what else draws random numbers changes nothing
        return [inputs.flatten().tolist() for inputs, _ in loader]

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert [len(batch) for batch in order(0, 0)] == [8 * 16] * 6  # 49 windows


def test_evaluation_goes_through_all_windows_in_order(written):
    data = Characters(written(TEXT), context=16, batch_size=4)
    for name, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        assert [len(inputs) for inputs, _ in batches] == [4, 2]
        for i, column in enumerate(zip(*batches, strict=True)):
            assert torch.equal(torch.cat(column), data.splits[name].tensors[i])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TEXT[:500], {"batch_size": 25}, "at least 401 characters for train, got 400 of 500 in all; give a longer"),
        (TEXT[:160], {"batch_size": 2}, "at least 17 characters for val, got 16 of 160 in all"),
        ("", {}, "at least 129 characters for train, got 0 of 0 in all"),
        (b"caf\xe9", {}, "expected a text in UTF-8, got .*text.txt', which is not from byte 3 on; convert it first"),
    ],
)
def test_a_text_that_does_not_serve_is_refused(written, text, options, message):
    data = Characters(written(text), **{"context": 16, "batch_size": 8, **options})
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_a_path_without_a_text_is_refused(tmp_path, where):
    with pytest.raises(ValueError, match=r"expected path to be a text file, got .* \(.+\); check the path"):
        _ = Characters(str(tmp_path / where)).vocabulary


@pytest.mark.parametrize("option", ["context", "batch_size"])
def test_counts_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"expected {option} of at least 1, got 0"):
        Characters(**{option: 0})


# -- model -----------------------------------------------------------------------------------------------------------


def test_validation_and_test_losses_are_those_of_a_plain_loop(make_trainer, written):
    torch.manual_seed(0)
    data = Characters(written(TEXT), context=16, batch_size=4)
    module = LanguageModel(data.vocabulary, **TINY)
    trainer = make_trainer()
    found = {**trainer.validate(module, data, verbose=False)[0], **trainer.test(module, data, verbose=False)[0]}
    for split in ("val", "test"):
        inputs, targets = data.splits[split].tensors
        log_p = module(inputs).detach().log_softmax(2)
        expected = -sum(float(log_p[i, t, targets[i, t]]) for i in range(6) for t in range(16)) / (6 * 16)
        assert found[f"{split}_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_rebuilds_the_model(make_trainer, tmp_path, written):
    data = Characters(written(TEXT), context=16, batch_size=8)
    module = LanguageModel(data.vocabulary, **TINY, lr=0.02)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.lr == 0.02
    inputs = data.splits["test"].tensors[0]
    assert torch.equal(loaded.eval()(inputs), module.eval()(inputs))


def test_thirty_steps_with_directions_of_single_windows_lower_the_loss(make_trainer, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(refresh, "rank_zero_info", said.append)
    pl.seed_everything(0, verbose=False)
    data = Characters(context=16, batch_size=16)
    module, logger = LanguageModel(data.vocabulary, **TINY, lr=0.5), Memory()
    options = {"max_steps": 30, "limit_val_batches": 0, "logger": logger}
    trainer = make_trainer(callbacks=[RefreshDirections(8)], **options)
    trainer.fit(module, data)
    losses = [row["train_loss"] for _, row in logger.rows if "train_loss" in row]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(math.log(data.vocabulary), rel=0.02)  # it starts uniform
    assert sum(losses[-5:]) / 5 < losses[0] - 0.8
    optimizer = trainer.optimizers[0]
    assert type(optimizer) is NSGD
    assert optimizer.refreshes > 0
    assert optimizer.hvps == 0
    assert said == []  # nor was a window taken by itself: that would be said


def test_directions_come_from_a_sample_of_the_training_text_too(make_trainer, written):
    data = Characters(written(TEXT), context=16, batch_size=8)
    module = LanguageModel(data.vocabulary, **TINY)
    trainer = make_trainer(callbacks=[RefreshDirections(12, source="train")], limit_val_batches=0)
    trainer.fit(module, data)
    optimizer = trainer.optimizers[0]
    assert optimizer.refreshes > 0
    assert len(optimizer.weights) > 1


def test_the_data_s_context_may_not_exceed_the_model_s(make_trainer, written):
    data = Characters(written(TEXT), context=32, batch_size=2)
    with pytest.raises(ValueError, match="expected at most context = 16 tokens in a row, got 32; raise context"):
        make_trainer(limit_val_batches=0).fit(LanguageModel(data.vocabulary, **TINY), data)
