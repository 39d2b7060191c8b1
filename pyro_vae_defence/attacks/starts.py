"""Where attacks start, when not at a random point of the ball.

A start is a function of the references and their rows' random streams; it returns images, and the
attack starts at the point of its ball nearest to them. :func:`in_turn` gives restarts several.

- :func:`other_class`: from the nearest image of another class. In an L_inf ball each pixel goes as
  far towards that image as the radius allows; in an L2 ball it is a blend of the two. What a
  decision boundary needs is there before the first query, which few queries would not find.
- :func:`stripes`: as Square's, up or down by whole columns, which filters and encoders average out
  less than independent pixels.
- :func:`patches`: up or down by patches some pixels wide, the signs of noise of low frequency.
- :func:`given`: from images that another attack has found.

References: Brendel, Rauber, Bethge, "Decision-based adversarial attacks: reliable attacks against
black-box machine learning models", ICLR 2018, https://arxiv.org/abs/1712.04248 (starts of another
class); Guo, Frank, Weinberger, "Low frequency adversarial perturbation", UAI 2019,
https://arxiv.org/abs/1809.08758 (low frequencies).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae_defence.attacks.base import BLACK_BOX_PURPOSE, Start, random_signs
from pyro_vae_defence.attacks.noise import low_frequency_noise
from pyro_vae_defence.attacks.objectives._rows import of_rows, with_entries
from pyro_vae_defence.models.program import check_images
from pyro_vae_defence.ops.checks import check_on_device, check_tensor, is_integer
from pyro_vae_defence.ops.streams import Streams


def other_class(labels: Tensor, images: Tensor, image_labels: Tensor) -> Start:
    """Start from the nearest image of another class, in Euclidean distance.

    Restart r starts from the (r + 1)-th nearest, from the first again when there are no more.

    Args:
        labels: classes of the references, integers ``(N,)``.
        images: where to start from, ``(K, C, H, W)`` in [0, 1]; the references may be among them.
        image_labels: their classes, integers ``(K,)``.

    Raises:
        ValueError: for images not in [0, 1], classes that are no integers, or ``image_labels`` not
            those of the images; if there is a class of references that all images have; and in an
            attack on another number of references, or on images of another shape.
    """
    check_images(images, "images")
    for name, classes in (("labels", labels), ("image_labels", image_labels)):
        if not isinstance(classes, Tensor) or classes.dim() != 1 or not is_integer(classes):
            raise ValueError(f"{name} must be a vector of integer classes, got {classes!r:.200}")
    if len(image_labels) != len(images):
        raise ValueError(
            f"image_labels must be one class per image, shape ({len(images)},), got "
            f"{tuple(image_labels.shape)}"
        )
    classes = image_labels.unique()
    if len(classes) < 2 and not bool((labels != classes).all()):
        raise ValueError(
            f"images are all of class {classes.tolist()}, which references have too, so that none "
            "is of another class; add images of other classes"
        )

    def start(x_ref: Tensor, streams: Streams) -> Tensor:
        if images.shape[1:] != x_ref.shape[1:]:
            raise ValueError(
                f"images must be of the references' shape {tuple(x_ref.shape[1:])}, got "
                f"{tuple(images.shape[1:])}"
            )
        check_on_device("images", images, "x_ref", x_ref.device)
        own = of_rows(labels, streams, "labels")[:, None]
        distance = torch.cdist(x_ref.flatten(1), images.flatten(1).to(x_ref.dtype))
        nearest = distance.masked_fill(own == image_labels, torch.inf).argsort(1)
        rank = streams.chain % (own != image_labels).sum(1)
        return images[nearest.gather(1, rank[:, None])[:, 0]]

    return with_entries(start, labels=labels)


def stripes() -> Start:
    """Start from vertical stripes, with one random sign per channel and column: those from which
    :class:`~pyro_vae_defence.attacks.Square` starts in an L_inf ball."""

    def start(x_ref: Tensor, streams: Streams) -> Tensor:
        channels, _, width = x_ref.shape[1:]
        return x_ref + random_signs(streams, 0, 0, (channels, 1, width), x_ref.dtype)

    return start


def patches() -> Start:
    """Start from the signs of :func:`~pyro_vae_defence.attacks.noise.low_frequency_noise`."""

    def start(x_ref: Tensor, streams: Streams) -> Tensor:
        shape, purpose = tuple(x_ref.shape[1:]), BLACK_BOX_PURPOSE + 1
        return x_ref + low_frequency_noise(streams, 0, purpose, shape, x_ref.dtype).sign()

    return start


def given(images: Tensor) -> Start:
    """Start from images ``(num_restarts, N, C, H, W)``, one for every restart and reference.

    Raises:
        ValueError: if ``images`` are not in [0, 1]; in an attack whose images have another shape
            or are another number, or which has more restarts.
    """
    check_tensor("images", images)
    if images.dim() == 5:
        check_images(images.flatten(0, 1), "images")

    def start(x_ref: Tensor, streams: Streams) -> Tensor:
        shape = tuple(x_ref.shape[1:])
        fits = images.dim() == 5 and tuple(images.shape[2:]) == shape
        if fits and images.device.type != "meta":
            check_on_device("images", images, "x_ref", x_ref.device)
            last = int(streams.chain.max()), int(streams.image.max())
            fits = last[0] < images.shape[0] and last[1] < images.shape[1]
        if not fits:
            raise ValueError(
                "images must be one for every restart and reference, shape (num_restarts, N, "
                f"{', '.join(map(str, shape))}), got {tuple(images.shape)}"
            )
        return images[streams.chain, streams.image]

    return with_entries(start, images=images[0]) if images.dim() == 5 else start


def in_turn(*starts: Start) -> Start:
    """Restarts take turns: number r has start ``r % len(starts)``, and is the ``r // len(starts)``
    -th restart of it.

    Raises:
        ValueError: without any start.
    """
    if not starts:
        raise ValueError("starts is empty; give one start or more")

    def start(x_ref: Tensor, streams: Streams) -> Tensor:
        number = len(starts)
        own = streams._replace(chain=streams.chain // number)
        found = torch.stack([each(x_ref, own) for each in starts])
        return found[streams.chain % number, torch.arange(len(x_ref), device=x_ref.device)]

    start.entries = {  # type: ignore[attr-defined]
        f"{name} of start {number}": count
        for number, each in enumerate(starts)
        for name, count in getattr(each, "entries", {}).items()
    }
    return start
