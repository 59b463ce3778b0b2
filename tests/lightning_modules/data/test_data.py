"""Data: real digits and any Hugging Face folder, split once, ordered by seed and epoch, augmented in training only."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from sklearn.datasets import load_digits
from strangers import seeded
from torch import Tensor

from lightning_modules import Classifier, Digits, HuggingFace
from lightning_modules.data.batches import EpochBatches
from lightning_modules.data.images import augmented

CIFAR10 = Path(__file__).parents[3].parent / "shared" / "data" / "cifar10"


def rows(images: Any) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.pixels}


# -- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_split_into_1149_training_288_validation_and_360_test_images():
    splits = Digits().splits
    assert {name: tuple(s.pixels.shape) for name, s in splits.items()} == {
        "train": (1149, 1, 8, 8),
        "val": (288, 1, 8, 8),
        "test": (360, 1, 8, 8),
    }
    assert all(s.pixels.dtype == torch.uint8 and s.labels.dtype == torch.int64 for s in splits.values())
    assert (Digits().input_shape, Digits().num_classes) == ((1, 8, 8), 10)


def test_splits_are_all_the_digits_once_with_their_labels():
    digits = load_digits()
    labels = {np.uint8(i * 15).tobytes(): y for i, y in zip(digits.images, digits.target, strict=True)}
    splits = Digits().splits
    found = [(p.numpy()[0].tobytes(), int(y)) for s in splits.values() for p, y in zip(*s, strict=True)]
    assert len(found) == len(labels) == len({image for image, _ in found}) == 1797  # every image is another
    assert all(labels[image] == y for image, y in found)


@pytest.mark.parametrize("seed", [0, 7])
def test_splits_do_not_depend_on_the_seed(seed):
    reference = Digits().splits
    pl.seed_everything(seed, verbose=False)
    for name, images in Digits().splits.items():
        assert torch.equal(images.pixels, reference[name].pixels)
        assert torch.equal(images.labels, reference[name].labels)


def test_limit_takes_the_first_training_images_and_all_test_images():
    small, whole = Digits(limit=100, batch_size=10).splits, Digits().splits
    assert {name: len(s.labels) for name, s in small.items()} == {"train": 80, "val": 20, "test": 360}
    assert rows(small["train"]) | rows(small["val"]) <= rows(whole["train"]) | rows(whole["val"])


def test_normalised_training_images_have_mean_zero_and_deviation_one_in_each_channel(images_folder):
    for data in (Digits(), HuggingFace(str(images_folder("rgb")), batch_size=4)):
        images = data.normalise(data.splits["train"].pixels).double()
        assert images.mean((0, 2, 3)) == pytest.approx(torch.zeros(images.shape[1]), abs=1e-5)  # float32 images
        assert images.std((0, 2, 3)) == pytest.approx(torch.ones(images.shape[1]), abs=1e-5)


def test_a_constant_channel_stays_finite():
    data = Digits()
    data.load = lambda: tuple(type(s)(torch.full_like(s.pixels, 9), s.labels) for s in Digits.load(data))
    assert torch.isfinite(data.normalise(data.splits["train"].pixels)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"val_fraction": 0.0}, "val_fraction between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction between 0 and 1, got 1.0"),
        ({"limit": 1}, "limit of at least 2 images, got 1"),
        ({"side": 0}, "side of at least 1 pixel, got 0"),
        ({"side": 9}, "side of at most 8, the images' own, got 9"),
        ({"batch_size": 1150}, "batch_size of at most 1149, the number of training images, got 1150"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _ = Digits(**options).splits


def test_images_shrink_by_averages_over_areas():
    small, whole = Digits(side=4), Digits()
    assert small.input_shape == (1, 4, 4)
    for name, images in small.splits.items():
        blocks = whole.splits[name].pixels.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).double().mean(-1)
        torch.testing.assert_close(images.pixels.double(), blocks, rtol=0, atol=0.5)
        assert images.pixels.dtype == torch.uint8
        assert torch.equal(images.labels, whole.splits[name].labels)


def test_images_lie_on_the_device_that_they_are_trained_on():
    data = Digits()
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    assert {tensor.device.type for tensor in data.train_dataloader().dataset.images} == {"meta"}
    assert {tensor.device.type for tensor in data.splits["train"]} == {"cpu"}
    data.trainer = None
    assert data.val_dataloader().dataset.images is data.splits["val"]


def test_a_batch_size_above_the_training_images_is_refused_at_every_use():
    data = Digits(limit=20, batch_size=17)
    for _ in range(2):
        with pytest.raises(ValueError, match="batch_size of at most 16"):
            _ = data.input_shape


# -- order and augmentation ------------------------------------------------------------------------------------------


def order(seed: int, epoch: int, *, noise: int = 0) -> list[list[int]]:
    pl.seed_everything(seed, verbose=False)
    torch.rand(noise)  # random numbers drawn before
    batches = Digits(batch_size=100).train_dataloader().sampler
    batches.set_epoch(epoch)
    torch.rand(noise)
    return list(batches)


def test_batches_are_a_function_of_seed_and_epoch_alone():
    first = order(0, 0)
    assert order(0, 0, noise=5) == first
    others = [order(0, 1), order(1, 0), order(1, 1)]
    assert all(other != first for other in others)
    assert len({str(o) for o in others}) == 3


def test_training_batches_are_full_and_disjoint_and_evaluation_takes_every_image_in_order():
    batches = list(EpochBatches(103, 10, shuffle=True))
    assert [len(b) for b in batches] == [10] * 10
    assert len({i for b in batches for i in b}) == 100
    assert [i for b in EpochBatches(103, 10, shuffle=False) for i in b] == list(range(103))


class Batches(pl.Callback):
    """Every batch that the module gets, under its split."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}

    def on_train_batch_start(self, _: Any, __: Any, batch: Any, *___: Any) -> None:
        self.seen["train"].append(batch)

    def on_validation_batch_start(self, _: Any, __: Any, batch: Any, *___: Any) -> None:
        self.seen["val"].append(batch)

    def on_test_batch_start(self, _: Any, __: Any, batch: Any, *___: Any) -> None:
        self.seen["test"].append(batch)


@pytest.mark.parametrize("augment", [False, True])
def test_training_sees_another_order_each_epoch_and_only_training_is_augmented(make_trainer, augment):
    pl.seed_everything(2, verbose=False)
    data, seen = Digits(batch_size=100, augment=augment), Batches()
    trainer = make_trainer(max_epochs=2, callbacks=[seen])
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    for epoch in (0, 1):
        batches = EpochBatches(1149, 100, shuffle=True, seed=2)
        batches.set_epoch(epoch)
        for indices, (images, labels) in zip(batches, seen.seen["train"][11 * epoch :], strict=False):
            plain = data.normalise(data.splits["train"].pixels[indices])
            assert torch.equal(labels, data.splits["train"].labels[indices])
            assert torch.equal(images, plain) != augment
    for split, repeats in (("val", 2), ("test", 1)):
        images = torch.cat([x for x, _ in seen.seen[split]])
        assert torch.equal(images, data.normalise(data.splits[split].pixels).repeat(repeats, 1, 1, 1))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9)])
def test_augmented_images_are_shifted_by_up_to_four_pixels_and_flipped(shape):
    channels, height, width = shape
    images = 1 + torch.rand(300, *shape, generator=seeded(0))
    torch.manual_seed(0)
    found = augmented(images)
    used = set()
    for image, result in zip(images, found, strict=True):
        padded = torch.zeros(channels, height + 8, width + 8)
        padded[:, 4:-4, 4:-4] = image
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(padded[:, top : top + height, left : left + width].flip([2] if flip else []), result)
        ]
        assert len(matches) == 1
        used.update(matches)
    assert {t for t, _, _ in used} == {x for _, x, _ in used} == set(range(9))
    assert len(used) > 120  # of 162, 300 draws hit 136 on average


def test_augmentation_follows_the_global_random_state():
    images = torch.rand(20, 1, 8, 8)
    torch.manual_seed(3)
    first, second = augmented(images), augmented(images)
    torch.manual_seed(3)
    assert torch.equal(augmented(images), first)
    assert not torch.equal(first, second)


# -- Hugging Face ----------------------------------------------------------------------------------------------------


def picture(i: int, mode: str, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    """Distinct deterministic pixels, (H, W) or (H, W, 3)."""
    shape = size if mode == "grey" else (*size, 3)
    return np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image", reason="needs the extra nsgd[data]")
    stream = io.BytesIO()
    image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def images_folder(tmp_path):
    """Writes a data set of 40 training and 10 test images in one of the ways found on the hub."""
    datasets = pytest.importorskip("datasets", reason="needs the extra nsgd[data]")
    import pyarrow
    import pyarrow.parquet

    def write(mode: str, *, schema: bool = True, splits: Any = ("train", "test"), sizes: Any = None) -> Path:
        folder = tmp_path / f"{mode}-{schema}"
        folder.mkdir()
        for split in splits:
            indices = range(40) if split == "train" else range(100, 110)
            cells = [
                {"bytes": png(picture(i, mode, *((sizes[i % 2],) if sizes else ()))), "path": None} for i in indices
            ]
            labels = [i % 3 for i in indices]
            path = folder / f"{split}-00000-of-00001.parquet"
            if schema:
                features = datasets.Features(
                    {"id": datasets.Value("int64"), "img": datasets.Image(), "kind": datasets.ClassLabel(3)}
                )
                content = {"id": list(indices), "img": cells, "kind": labels}
                datasets.Dataset.from_dict(content, features=features).to_parquet(path)
            else:
                table = pyarrow.table({"id": list(indices), "img": cells, "kind": labels})
                assert b"huggingface" not in (table.schema.metadata or {})
                pyarrow.parquet.write_table(table, path)
        return folder

    return write


def expected(indices: Any, mode: str) -> dict[bytes, int]:
    def channels_first(array: np.ndarray) -> bytes:
        return (array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).tobytes()

    return {channels_first(picture(i, mode)): i % 3 for i in indices}


def contents(*images: Any) -> dict[bytes, int]:
    return {p.numpy().tobytes(): int(y) for s in images for p, y in zip(*s, strict=True)}


@pytest.mark.parametrize("mode", ["grey", "rgb"])
@pytest.mark.parametrize("schema", [True, False], ids=["with schema", "without schema"])
def test_parquet_folders_give_every_pixel_and_label(images_folder, mode, schema):
    folder = images_folder(mode, schema=schema)
    data = HuggingFace(str(folder), batch_size=8, label_column=None if schema else "kind")
    splits = data.splits
    assert {name: len(s.labels) for name, s in splits.items()} == {"train": 32, "val": 8, "test": 10}
    assert contents(splits["train"], splits["val"]) == expected(range(40), mode)
    assert contents(splits["test"]) == expected(range(100, 110), mode)
    assert (data.input_shape, data.num_classes) == ((1 if mode == "grey" else 3, 6, 5), 3)


def test_a_folder_of_images_in_one_folder_a_class(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra nsgd[data]")
    for split, indices in (("train", range(12)), ("test", range(100, 106))):
        for i in indices:
            path = tmp_path / "pets" / split / ("ant", "bee", "cat")[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(picture(i, "rgb")))
    splits = HuggingFace(str(tmp_path / "pets"), batch_size=4, val_fraction=0.25).splits
    assert contents(splits["train"], splits["val"]) == expected(range(12), "rgb")
    assert contents(splits["test"]) == expected(range(100, 106), "rgb")


def test_without_a_test_split_a_fifth_of_the_training_images_is_kept_apart(images_folder):
    folder = str(images_folder("grey", splits=("train",)))
    splits = HuggingFace(folder, batch_size=4).splits
    assert len(splits["test"].labels) == 8
    assert contents(*splits.values()) == expected(range(40), "grey")
    assert contents(HuggingFace(folder, batch_size=4).splits["test"]) == contents(splits["test"])


def test_validation_stands_in_for_a_test_split_and_another_can_be_named(images_folder):
    folder = str(images_folder("grey", splits=("train", "validation")))
    assert contents(HuggingFace(folder, batch_size=4).splits["test"]) == expected(range(100, 110), "grey")


def test_limit_draws_training_images_at_random_and_always_the_same(images_folder):
    folder = str(images_folder("grey"))
    splits = HuggingFace(folder, batch_size=4, limit=20).splits
    drawn = contents(splits["train"], splits["val"])
    assert len(drawn) == 20
    assert drawn.items() <= expected(range(40), "grey").items()
    assert drawn != expected(range(20), "grey")  # folders hold one class after the other
    again = HuggingFace(folder, batch_size=4, limit=20).splits
    assert contents(again["train"], again["val"]) == drawn


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    for split, mode in (("train", "L"), ("test", "RGB")):
        for label in ("a", "b"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(6):
                Image.new(mode, (4, 4), i if mode == "L" else (i, 2 * i, 0)).save(folder / f"{i}.png")
    splits = HuggingFace(str(tmp_path), batch_size=4).splits
    assert splits["train"].pixels.shape[1] == splits["test"].pixels.shape[1] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, "expected image_column to be one of id, img, kind, got 'picture'"),
        ({"label_column": "class"}, "expected label_column to be one of id, img, kind, got 'class'"),
    ],
)
def test_an_unknown_column_is_refused(images_folder, options, message):
    with pytest.raises(ValueError, match=message):
        _ = HuggingFace(str(images_folder("grey")), **options).splits


@pytest.mark.parametrize("options", [{"image_column": "id"}, {"label_column": "img"}])
def test_a_column_of_another_kind_is_refused(images_folder, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"expected {name}"):
        _ = HuggingFace(str(images_folder("grey")), batch_size=4, **options).splits


def test_without_a_schema_the_label_column_has_to_be_named(images_folder):
    folder = images_folder("grey", schema=False)
    with pytest.raises(ValueError, match=r"expected one label column in .* got 0 among id, img, kind; .*label_column"):
        _ = HuggingFace(str(folder)).splits


def test_images_of_several_sizes_are_refused(images_folder):
    folder = images_folder("grey", sizes=[(6, 5), (6, 7)])
    with pytest.raises(ValueError, match=r"expected images of one size in .*got \(6, 5\) and \(6, 7\); resize"):
        _ = HuggingFace(str(folder)).splits


def test_a_split_that_is_not_named_train_is_refused(images_folder):
    with pytest.raises(ValueError, match="expected a split named train"):
        _ = HuggingFace(str(images_folder("grey", splits=("test",)))).splits


@pytest.mark.parametrize("kind", ["empty", "text", "nothing", "hub", "file"])
def test_a_path_without_images_is_refused_in_one_sentence(tmp_path, kind):
    pytest.importorskip("datasets", reason="needs the extra nsgd[data]")
    path = tmp_path / kind
    if kind in ("empty", "text"):
        (path / "deeper").mkdir(parents=True)
    if kind == "text":
        (path / "deeper" / "notes.txt").write_text("no image\n")
    if kind == "file":
        path.write_text("no image\n")
    name = "nobody/no-such-data" if kind == "hub" else str(path)
    with pytest.raises(ValueError, match=name) as error:
        _ = HuggingFace(name, batch_size=4).splits
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("expected ")


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"CIFAR-10 is not at {CIFAR10.parent.name}/{CIFAR10.name}")
def test_cifar10_reads_as_32_x_32_colour_images_of_ten_classes():
    data = HuggingFace(str(CIFAR10), limit=200, batch_size=50)
    assert (data.input_shape, data.num_classes) == ((3, 32, 32), 10)
    assert {name: len(s.labels) for name, s in data.splits.items() if name != "test"} == {"train": 160, "val": 40}
    pixels = data.splits["train"].pixels.float()
    assert pixels.std() > 50  # colours, not labels or zeros
    assert data.splits["test"].pixels.shape[1:] == (3, 32, 32)
