"""Datasets: real content, splits, errors that name the file and the mend."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import shared_path
from torch.utils.data import DataLoader

from pyro_vae_defence import data
from pyro_vae_defence.data import idx
from pyro_vae_defence.data._build_subsets import PER_CLASS, some_of_each_class
from pyro_vae_defence.data.color_mnist import COLORS

SUBSETS = ["mnist_subset", "fashion_mnist_subset"]


@pytest.fixture
def root():
    return shared_path("data")


@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.parametrize(("split", "size"), [("train", 6000), ("validation", 500), ("test", 1000)])
def test_subsets_are_balanced_images_in_the_unit_interval(name, split, size):
    dataset = data.load(name, split)
    images = dataset.images()
    assert images.shape == (size, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert dataset.labels.bincount().tolist() == [size // 10] * 10
    assert len(dataset.class_names) == 10
    assert repr(dataset) == f"ImageDataset({name!r}, {split!r}, {size} images)"


@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.parametrize("split", data.SPLITS)
def test_subsets_are_the_images_they_claim_to_be(name, split, root):
    full = data.load(name.removesuffix("_subset"), split, root)
    indices = some_of_each_class(full, PER_CLASS[split])
    subset = data.load(name, split)
    assert torch.equal(subset.images(), full.images(indices))
    assert torch.equal(subset.labels, full.labels[indices])


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_full_splits(name, root):
    sizes = [len(data.load(name, split, root)) for split in data.SPLITS]
    assert sizes == [55_000, 5_000, 10_000]


def test_training_and_validation_do_not_overlap(root):
    train = data.load("mnist", "train", root).images()
    last = data.load("mnist", "validation", root).images()[-1]
    assert not (train == last).flatten(1).all(1).any()


def test_indexing_by_number_slice_list_and_tensor():
    dataset = data.load("mnist_subset", "test")
    image, label = dataset[3]
    assert image.shape == (1, 28, 28)
    for index in (slice(3, 6), [3, 4, 5], torch.tensor([3, 4, 5])):
        images, labels = dataset[index]
        assert torch.equal(images[0], image)
        assert labels[0] == label
        assert len(images) == 3
    # Handing out images leaves the stored ones alone.
    images.zero_()
    assert torch.equal(dataset[3][0], image)


def test_loaders_give_the_dataset_once():
    dataset = data.load("mnist_subset", "test")
    whole = torch.cat([x for x, _ in data.batches(dataset, 300)])
    assert torch.equal(whole, dataset.images())
    plain = torch.cat([x for x, _ in DataLoader(dataset, batch_size=300)])
    assert torch.equal(plain, whole)
    shuffled = data.batches(dataset, 300, shuffle=True, drop_last=True)
    assert [len(y) for _, y in shuffled] == [300] * 3
    assert len(shuffled) == 3
    orders = []
    for _ in range(2):
        torch.manual_seed(5)
        orders.append(torch.cat([y for _, y in data.batches(dataset, 300, shuffle=True)]))
    assert torch.equal(*orders)
    assert not torch.equal(orders[0], dataset.labels)
    generator = torch.Generator().manual_seed(2)
    first = torch.cat([y for _, y in data.batches(dataset, 300, True, generator)])
    generator.manual_seed(2)
    again = torch.cat([y for _, y in data.batches(dataset, 300, True, generator)])
    assert torch.equal(first, again)


def test_color_mnist_is_a_view_in_seven_colours():
    grey = data.load("mnist_subset", "test")
    colored = data.load("color_mnist_subset", "test")
    assert len(colored) == 7000
    assert colored.image_shape == (3, 28, 28)
    stored = colored._grey._images.untyped_storage()
    assert stored.nbytes() == grey._images.untyped_storage().nbytes()
    images, labels = colored[torch.tensor([7 * 12 + 3, 5])]
    assert labels.tolist() == [[int(grey.labels[12]), 3], [int(grey.labels[0]), 5]]
    for image, item, color in ((images[0], 12, "yellow"), (images[1], 0, "cyan")):
        rgb = torch.tensor(COLORS[color], dtype=torch.float32)
        assert torch.equal(image, grey[item][0] * rgb[:, None, None])
    assert torch.equal(colored[7 * 12 + 3][0], images[0])
    assert colored[:14][0].shape == (14, 3, 28, 28)
    assert colored.color_names[3] == "yellow"


@pytest.mark.parametrize("ending", ["", "_inverted", "_textured"])
def test_colours_of_a_digit_have_one_origin(ending):
    dataset = data.load(f"color_mnist_subset{ending}", "test")
    assert torch.equal(dataset.origins(), torch.arange(7000) // 7)
    assert dataset.origins([13, 14]).tolist() == [1, 2]
    part, _ = data.random_split(dataset, (0.5, 0.5), torch.Generator().manual_seed(0))
    assert torch.equal(part.origins(slice(20)), part.items[:20] // 7)
    assert torch.equal(data.load("mnist_subset", "test").origins(), torch.arange(1000))


def test_colours_of_a_digit_are_not_divided():
    """What is trained on some of its colours is no test of the others."""
    dataset = data.load("color_mnist_subset", "test")
    generator = torch.Generator().manual_seed(0)
    parts = data.random_split(dataset, (0.5, 0.3, 0.2), generator)
    assert [len(part) for part in parts] == [3500, 2100, 1400]
    origins = [set(part.origins().tolist()) for part in parts]
    assert [len(each) for each in origins] == [500, 300, 200]
    assert len(set.union(*origins)) == 1000
    assert not torch.equal(parts[0].origins(), parts[0].origins().sort().values)
    # So it is with a part that has some of them.
    again = data.random_split(parts[0], (0.9, 0.1), generator)
    assert not set(again[0].origins().tolist()) & set(again[1].origins().tolist())


def test_stratified_points():
    dataset = data.load("mnist_subset", "test")
    index = data.stratified(dataset, 50, torch.Generator().manual_seed(0))
    assert dataset.labels[index].bincount().tolist() == [5] * 10
    assert len(index.unique()) == 50
    again = data.stratified(dataset, 50, torch.Generator().manual_seed(0))
    assert torch.equal(index, again)
    assert dataset.labels[data.stratified(dataset, 13)].bincount().tolist() == [2] * 3 + [1] * 7


def test_stratified_by_colour(root):
    colored = data.load("color_mnist", "test", root)
    index = data.stratified(colored, 14, column=1)
    assert colored.labels[index, 1].bincount().tolist() == [2] * 7


@pytest.mark.parametrize("num", [0, -3, 2.5])
def test_stratified_needs_a_positive_number(num):
    with pytest.raises(ValueError, match="num must be an integer of at least 1"):
        data.stratified(data.load("mnist_subset", "test"), num)


def test_stratified_has_enough_of_each_class():
    with pytest.raises(ValueError, match="ask for at most 1000"):
        data.stratified(data.load("mnist_subset", "test"), 1001)


def test_stratified_takes_what_classes_have_in_turn():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    dataset = data.ImageDataset(torch.zeros(8, 1, 1, 1, dtype=torch.uint8), labels, "", "", "abc")
    assert labels[data.stratified(dataset, 7)].tolist() == [0, 1, 2, 0, 1, 2, 0]
    for num, lacks in ((8, "3 images of class 1"), (20, "7 images of class 0")):
        with pytest.raises(ValueError, match=f"needs {lacks}.* at most 7"):
            data.stratified(dataset, num)


def test_unknown_names():
    with pytest.raises(ValueError, match="name must be one of mnist, .*got 'mnits'"):
        data.load("mnits", "train")
    with pytest.raises(ValueError, match="split must be one of train, validation, test; got 'val'"):
        data.load("mnist_subset", "val")
    for call in (lambda x: data.random_split(x, (0.5, 0.5)), lambda x: data.stratified(x, 2)):
        with pytest.raises(ValueError, match=r"dataset must be one of .* got a Tensor; images at"):
            call(torch.rand(4, 1, 28, 28))
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        data.batches(data.load("mnist_subset", "test"), 0)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "color_mnist"])
def test_missing_files_name_themselves_and_the_mend(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte; pass download=True"):
        data.load(name, "train", tmp_path)


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_DEFENCE_DATA", str(tmp_path / "here"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "here")):
        data.load("mnist", "test")
    monkeypatch.delenv("PYRO_VAE_DEFENCE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.default_root() == tmp_path / "pyro_vae_defence"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "is truncated .*delete it and load again"),
        (lambda content: content + b"0", "is too long .*delete it and load again"),
        (lambda content: b"9" + content[1:], "is corrupted .*delete it and load again"),
    ],
)
def test_damaged_files_are_refused(root, tmp_path, damage, message):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (root / "MNIST" / "raw").iterdir():
        shutil.copy(file, raw / file.name)
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.chmod(0o644)
    assert len(data.load("mnist", "test", tmp_path)) == 10_000
    labels.write_bytes(damage(labels.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        data.load("mnist", "test", tmp_path)
    assert str(labels) in str(caught.value)


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    import torchvision.datasets

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refuse)
    with pytest.raises(FileNotFoundError, match=r"downloading mnist .* no route to host.*packaged"):
        data.load("mnist", "train", tmp_path, download=True)


def test_damaged_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "PACKAGED", tmp_path)
    with pytest.raises(FileNotFoundError, match="reinstall"):
        data.load("mnist_subset", "test")
    (tmp_path / "mnist_subset.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged .* reinstall"):
        data.load("mnist_subset", "test")


def test_inconsistent_arrays():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="images must be uint8"):
        data.ImageDataset(images.float(), torch.zeros(3), "x", "test", [])
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        data.ImageDataset(images, torch.zeros(2), "x", "test", [])


@pytest.mark.parametrize("name", ["mnist_subset", "mnist_subset_textured", "color_mnist_subset"])
def test_a_tuple_of_numbers_is_a_list_of_them(name):
    """A tensor takes it for one number per dimension: image 5, channel 0."""
    dataset = data.load(name, "test")
    for one, other in zip(dataset[5, 0], dataset[[5, 0]], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(dataset.images((5, 0)), dataset.images([5, 0]))
    with pytest.raises(ValueError, match="index must be the numbers of images, got True"):
        dataset[True]


def test_a_column_of_labels_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"column=1 must be below 1, the labels of .*'mnist_subs"):
        data.stratified(data.load("mnist_subset", "test"), 10, column=1)
    with pytest.raises(ValueError, match="column=2 must be below 2"):
        data.stratified(data.load("color_mnist_subset", "test"), 10, column=2)


def test_numpys_numbers_and_arrays_are_taken_and_lists_of_labels_named():
    test = data.load("mnist_subset", "test")
    assert len(next(iter(data.batches(test, np.int64(3))))[0]) == 3
    assert [len(part) for part in data.random_split(test, np.array([0.7, 0.3]))] == [700, 300]
    with pytest.raises(ValueError, match="must be positive and sum to 1"):
        data.random_split(test, (float("nan"), 0.5))
    with pytest.raises(ValueError, match="labels must be a tensor, got a list"):
        data.ImageDataset(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), [0, 1], "x", "test", [])


@pytest.mark.parametrize("labels", [True, False])
def test_batches_on_a_device(labels):
    test = data.load("mnist_subset", "test")
    plain, moved = (data.batches(test, 300, labels=labels, device=d) for d in (None, "cpu"))
    for one, other in zip(plain, moved, strict=True):
        assert type(one) is type(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    (first, *_) = data.batches(test, 300, labels=labels, device="meta")
    parts = first if labels else [first]
    assert [part.device.type for part in parts] == ["meta"] * len(parts)
