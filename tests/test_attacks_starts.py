"""Where attacks start: in closed form, for every optimiser, in any batch."""

from __future__ import annotations

import functools

import pytest
import torch
from optimisers import OPTIMISERS

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks.starts import given, in_turn, other_class, stripes
from pyro_vae_defence.ops.balls import L1, L2, Linf


def first_images(start, ball, x, **settings):
    """Where an attack starts that has nothing to climb, per restart."""
    flat = lambda x_ref: lambda y: torch.zeros(len(y), dtype=y.dtype)  # noqa: E731
    attack = attacks.Square(flat, ball, num_steps=1, start=start, **settings)
    return attack(x, torch.Generator().manual_seed(3)).x_adv


@pytest.fixture
def images(float64):
    """Two references of classes 0 and 1, and images at distances that can be told."""
    x = torch.full((2, 1, 4, 4), 0.5)
    levels = torch.tensor([0.55, 0.9, 0.3, 0.5, 0.1])
    others = levels.reshape(-1, 1, 1, 1).expand(5, 1, 4, 4)
    return x, torch.tensor([0, 1]), others, torch.tensor([0, 1, 1, 1, 0])


def test_restarts_start_at_the_nearest_images_of_other_classes(images):
    x, labels, others, image_labels = images
    start = other_class(labels, others, image_labels)
    found = first_images(start, Linf(0.15), x, num_restarts=4)
    # Class 0: 0.5, 0.3, 0.9, and again; class 1: 0.55, 0.1, and again. No pixel by more than 0.15.
    expected = torch.tensor([[0.5, 0.55], [0.35, 0.35], [0.65, 0.55], [0.5, 0.35]])
    torch.testing.assert_close(found, expected.reshape(4, 2, 1, 1, 1).expand_as(found))
    # In L2 it is a blend of both: the whole way is 16 pixels of 0.4.
    blend = first_images(start, L2(0.8), x, num_restarts=3)[2, 0]
    torch.testing.assert_close(blend, torch.full_like(blend, 0.7))


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5)], ids=str)
def test_starts_do_not_depend_on_the_batch(ball, images):
    x, labels, others, image_labels = images
    start = in_turn(stripes(), other_class(labels, others, image_labels))
    whole = first_images(start, ball, x, num_restarts=3)
    assert torch.equal(first_images(start, ball, x, num_restarts=3, batch_size=1), whole)


def test_restarts_take_turns_and_the_first_is_the_published_one(images):
    x, labels, others, image_labels = images
    ball, other = Linf(0.15), other_class(labels, others, image_labels)
    found = first_images(in_turn(stripes(), other), ball, x, num_restarts=4)
    own = first_images(None, ball, x, num_restarts=2)
    assert torch.equal(found[::2], own)
    assert not torch.equal(own[0], own[1])
    assert torch.equal(found[1::2], first_images(other, ball, x, num_restarts=2))
    # Columns, each with one sign.
    moved = (own - x).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.15))
    assert (own == own[..., :1, :]).all()


@pytest.mark.parametrize("name", [n for n in OPTIMISERS if n != "PGD-paper"])
def test_every_optimiser_begins_where_it_is_told(name, images):
    x, labels, others, image_labels = images
    start = other_class(labels, others, image_labels)
    seen = []

    def prepare(x_ref):
        def objective(y):
            seen.append(y.detach())
            return y.square().flatten(1).sum(1)

        return objective

    balls = [Linf(0.15), L2(0.3)] if name == "Square" else [Linf(0.15), L2(0.3), L1(1.0)]
    for ball in balls:
        seen.clear()
        OPTIMISERS[name](prepare, ball, num_steps=1, start=start)(x)
        expected = x + ball.project(start(x, attacks.base.Streams.create(2, seed=0)) - x)
        # NES looks around first, on both sides.
        first = seen[0] if name != "NES" else 0.5 * (seen[0] + seen[1])
        torch.testing.assert_close(first, expected)


def test_mistakes(images):
    x, labels, others, image_labels = images
    with pytest.raises(ValueError, match=r"image_labels must be one class per image, shape \(5,\)"):
        other_class(labels, others, image_labels[:4])
    with pytest.raises(ValueError, match=r"images are all of class \[1\], which references have"):
        other_class(labels, others[1:3], image_labels[1:3])
    other_class(labels[:1], others[1:3], image_labels[1:3])  # all of another one
    with pytest.raises(ValueError, match="starts is empty"):
        in_turn()
    prepare = functools.partial(lambda x: lambda y: y.flatten(1).sum(1))
    with pytest.raises(ValueError, match="start must be a start such as"):
        attacks.APGD(prepare, Linf(0.1), start=0.3)
    with pytest.raises(ValueError, match="preset='paper' has a start of its own"):
        attacks.PGD(prepare, Linf(0.1), preset="paper", start=stripes())
    start = other_class(labels, others, image_labels)
    with pytest.raises(ValueError, match="labels has 2 entries, but the attack has 3"):
        attacks.APGD(prepare, Linf(0.1), num_steps=1, start=start)(x[:1].repeat(3, 1, 1, 1))


def test_starts_for_other_references_are_refused(images):
    """Those of the first images would be taken for these."""
    x, _, others, image_labels = images
    nine = torch.arange(9) % 2
    for start, what in (
        (other_class(nine, others, image_labels), "labels has 9 entries"),
        (given(torch.rand(1, 9, 1, 4, 4)), "images has 9 entries"),
        (
            in_turn(stripes(), other_class(nine, others, image_labels)),
            "labels of start 1 has 9 entries",
        ),
    ):
        with pytest.raises(ValueError, match=f"{what}, but the attack has 2 images"):
            first_images(start, Linf(0.1), x)


def test_a_start_of_another_shape_is_refused_and_one_of_another_dtype_converted(images):
    x = images[0]
    with pytest.raises(ValueError, match=r"start must return an image .* \(2, 1, 4, 4\), got"):
        first_images(lambda x_ref, streams: x_ref[:1], Linf(0.1), x)
    with pytest.raises(ValueError, match=r"start must return an image .*, got list"):
        first_images(lambda x_ref, streams: x_ref.tolist(), Linf(0.1), x)
    with pytest.raises(ValueError, match="images must be a tensor, got a list"):
        given([x])
    _, labels, _, image_labels = images
    start = other_class(labels, torch.rand(5, 3, 4, 4), image_labels)
    with pytest.raises(ValueError, match=r"images must be of the references' shape \(1, 4, 4\), g"):
        first_images(start, Linf(0.1), x)
    found = first_images(given((x + 0.05)[None].float()), Linf(0.1), x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[0], x + 0.05, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(5, 1, 4, 4) * 255}, r"images must lie in \[0, 1\]"),
        ({"images": torch.full((5, 1, 4, 4), torch.nan)}, "images is not finite"),
        ({"labels": [0, 1]}, "labels must be a vector of integer classes"),
        ({"image_labels": torch.rand(5)}, "image_labels must be a vector of integer classes"),
    ],
)
def test_images_to_start_from_are_checked(change, message, images):
    _, labels, others, image_labels = images
    entries = {"labels": labels, "images": others, "image_labels": image_labels, **change}
    with pytest.raises(ValueError, match=message):
        other_class(**entries)


def test_noise_does_not_hang_on_the_images():
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    assert not attacks.random_noise(x, Linf(0.1)).requires_grad
