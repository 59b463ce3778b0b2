"""The classifier: what it logs is what plain torch computes from its weights."""

from __future__ import annotations

import pytest
import torch
from strangers import Memory
from torch.nn import functional as F

from lightning_modules import Classifier, Digits, RefreshDirections
from nsgd import NSGD


def test_validation_and_test_results_are_those_of_a_plain_loop(make_trainer):
    torch.manual_seed(0)
    module, data = Classifier(), Digits(batch_size=100)
    trainer = make_trainer()
    found = {**trainer.validate(module, data, verbose=False)[0], **trainer.test(module, data, verbose=False)[0]}
    for split in ("val", "test"):
        images = data.splits[split]
        logits = module(data.normalise(images.pixels))
        assert found[f"{split}_loss"] == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
        correct = (logits.argmax(1) == images.labels).float().mean().item()
        assert found[f"{split}_accuracy"] == pytest.approx(correct, rel=1e-6)


def test_training_accuracy_and_loss_are_logged_and_the_default_optimizer_is_nsgd(make_trainer):
    logger, module = Memory(), Classifier(lr=0.05)
    trainer = make_trainer(logger=logger, callbacks=[RefreshDirections()])
    trainer.fit(module, datamodule=Digits(batch_size=100))
    assert type(trainer.optimizers[0]) is NSGD
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05
    names = {name for _, row in logger.rows for name in row}
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= names
    assert sum("train_loss" in row for _, row in logger.rows) == 11  # every step of 1149 // 100


def test_predictions_are_softmax_probabilities_of_the_test_images(make_trainer):
    torch.manual_seed(0)
    module, data = Classifier(), Digits(batch_size=100)
    predicted = torch.cat(make_trainer().predict(module, data))
    logits = module(data.normalise(data.splits["test"].pixels))
    assert predicted.shape == (360, 10)
    assert torch.allclose(predicted, logits.softmax(1), atol=1e-6)  # batches of another size sum in another order


def test_a_checkpoint_rebuilds_the_module(make_trainer, tmp_path):
    module = Classifier("simple-cnn-root", [1, 8, 8], 10, lr=0.02)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=Digits(limit=200, batch_size=50))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.lr == 0.02
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(images), module.eval()(images))


def test_sizes_reach_the_network_and_its_checkpoint(make_trainer, tmp_path):
    module = Classifier("mlp", sizes={"hidden": [5, 7]})
    assert [p.shape[0] for p in module.net.parameters()] == [5, 5, 7, 7, 10, 10]
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=Digits(limit=200, batch_size=50))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.hparams["sizes"] == {"hidden": [5, 7]}
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded(images), module(images))


def test_a_checkpoint_from_before_sizes_still_loads(make_trainer, tmp_path):
    module = Classifier()
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=Digits(limit=200, batch_size=50))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["hyper_parameters"]["sizes"]
    torch.save(checkpoint, tmp_path / "b.ckpt")
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(Classifier.load_from_checkpoint(tmp_path / "b.ckpt")(images), module(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"net": "resnet"}, "one of mlp"),
        ({"net": "simple-cnn", "input_shape": (1, 2, 2)}, "2 x 2"),
        ({"sizes": {"width": 3}}, "sizes of mlp among hidden, got 'width'"),
    ],
)
def test_a_net_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_channels_are_last_on_a_gpu(monkeypatch, device):
    model = Classifier("simple-cnn-root", (3, 8, 8), 4)
    monkeypatch.setattr(Classifier, "device", torch.device(device))
    model.on_fit_start()
    weights = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) == (device == "cuda") for p in weights)


def test_a_label_that_is_no_class_is_refused():
    model = Classifier("mlp", (1, 2, 2), 3)
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        model.evaluate((torch.zeros(2, 1, 2, 2), torch.tensor([0, 3])), "val")
