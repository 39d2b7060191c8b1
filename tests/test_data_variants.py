"""Variants made on the fly: transforms, inverted images, textured backgrounds."""

from __future__ import annotations

import pytest
import torch

from pyro_vae_defence import data
from pyro_vae_defence.data.variants import textures
from pyro_vae_defence.ops.streams import Streams


def test_a_transform_is_applied_to_float_batches_on_the_fly():
    shapes = []

    def shift(x):
        shapes.append(tuple(x.shape))
        return (x + 0.1 * torch.rand_like(x)).clamp(max=1)

    before = torch.get_rng_state()
    dataset = data.load("mnist_subset", "test", transform=shift)
    assert torch.equal(
        torch.get_rng_state(), before
    )  # finding the shape draws nothing from the run
    plain = data.load("mnist_subset", "test")
    image, label = dataset[3]
    assert image.shape == (1, 28, 28)
    assert label == plain.labels[3]
    assert (image - plain[3][0]).max() > 0
    assert not torch.equal(dataset[3][0], image)  # new noise at every pass
    assert dataset[2:6][0].shape == (4, 1, 28, 28)
    assert shapes == [(1, 1, 28, 28)] * 3 + [(4, 1, 28, 28)]
    assert sum(len(x) for x, _ in data.batches(dataset, 300)) == 1000
    assert repr(dataset) == "TransformedImages('mnist_subset', 'test', 1000 images)"


def test_a_transform_may_change_the_shape():
    dataset = data.load(
        "mnist_subset", "test", transform=lambda x: torch.nn.functional.pad(x, (2,) * 4)
    )
    assert dataset.image_shape == (1, 32, 32)
    assert dataset[[0, 1]][0].shape == (2, 1, 32, 32)


@pytest.mark.parametrize("wrong", [lambda x: x.mean(), lambda x: x[:0], lambda x: x.byte()])
def test_a_transform_that_returns_something_else_is_refused(wrong):
    with pytest.raises(ValueError, match="transform returned .*one floating-point image"):
        data.load("mnist_subset", "test", transform=wrong)


def test_inverted_images():
    plain = data.load("fashion_mnist_subset", "test")
    inverted = data.load("fashion_mnist_subset_inverted", "test")
    assert torch.equal(inverted.images(), 1 - plain.images())
    assert torch.equal(inverted.labels, plain.labels)
    assert inverted.name == "fashion_mnist_subset_inverted"


def test_textured_images_keep_the_digit_and_fill_the_background():
    plain = data.load("mnist_subset", "test")
    textured = data.load("mnist_subset_textured", "test")
    x, y = plain.images(), textured.images()
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert y.min() >= 0
    assert y.max() <= 1
    assert torch.equal(y[x == 1], x[x == 1])
    background = y[x == 0]
    assert background.min() > 0
    assert background.max() <= 0.5
    assert abs(background.mean() - 0.25) < 0.01
    # A clip of 0.2 off dark pixels, which clears a black background, leaves most of this one.
    assert (background > 0.2).float().mean() > 0.6
    texture = textures(torch.arange(1000), (1, 28, 28), "test")
    torch.testing.assert_close(y, x + (1 - x) * texture)


def test_textures_are_of_whole_splits():
    part, _ = data.random_split(data.load("mnist_subset", "test"), (0.5, 0.5))
    with pytest.raises(ValueError, match="dataset must be a whole split, train, validation, test"):
        data.TexturedImages(part, "part")


def test_textures_depend_on_index_and_split_alone():
    dataset = data.load("mnist_subset_textured", "test")
    whole = dataset.images()
    torch.manual_seed(99)
    for index in (17, slice(10, 20), [17, 3], torch.tensor([17])):
        x = dataset[index][0]
        x = x if x.dim() == 4 else x[None]
        position = 7 if isinstance(index, slice) else 0
        assert torch.equal(x[position], whole[17])
    shape = (3, 28, 28)
    first = textures(torch.tensor([0, 1]), shape, "test")
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0, 0], first[0, 1])  # one texture per channel
    assert not torch.equal(first[0], textures(torch.tensor([0]), shape, "train")[0])
    # The definition, to the digit: a change of the generator would be a change of the dataset.
    corner = textures(torch.tensor([5]), shape, "validation")[0, :, 0, 0]
    torch.testing.assert_close(corner, torch.tensor(CORNER), atol=1e-6, rtol=0)


CORNER = [0.3376819, 0.1386069, 0.2438687]


def test_textures_lead_straight_from_corner_to_corner_of_the_grid():
    """On 13 pixels a grid of 7 has each of its numbers at every other one, their means between."""
    items = torch.tensor([3, 8])
    streams = Streams(0x74657874, items, torch.zeros_like(items))
    grid = 0.5 * streams.uniform(1, 0, (2, 7, 7), torch.float32)
    found = textures(items, (2, 13, 13), "validation")
    torch.testing.assert_close(found[..., ::2, ::2], grid)
    torch.testing.assert_close(found[..., 1::2, ::2], (grid[..., 1:, :] + grid[..., :-1, :]) / 2)
    torch.testing.assert_close(found[..., ::2, 1::2], (grid[..., 1:] + grid[..., :-1]) / 2)


def test_textured_colour():
    plain = data.load("color_mnist_subset", "test")
    textured = data.load("color_mnist_subset_textured", "test")
    index = torch.tensor([3, 7 * 12 + 3])
    x, y = plain.images(index), textured.images(index)
    expected = x + (1 - x.amax(1, keepdim=True)) * textures(index, (3, 28, 28), "test")
    assert torch.equal(y, expected)
    assert torch.equal(textured.labels, plain.labels)
    assert len(textured) == 7000


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_name_loads_or_names_its_missing_file(name, tmp_path):
    if "subset" in name:
        dataset = data.load(name, "test", tmp_path)
        assert dataset.name == name
        assert dataset[0][0].shape == dataset.image_shape
    else:
        with pytest.raises(FileNotFoundError, match="pass download=True"):
            data.load(name, "test", tmp_path)
