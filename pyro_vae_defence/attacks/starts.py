"""Where attacks start, when not at a random point of the ball.

A start is a function of the references and their rows' random streams; it returns images, and the
attack starts at the point of its ball nearest to them.

- :func:`other_class`: from the nearest image of another class. In an L_inf ball each pixel goes as
  far towards that image as the radius allows; in an L2 ball it is a blend of the two. What a
  decision boundary needs is there before the first query, which few queries would not find.
- :func:`low_frequency`: random signs that are the same over patches of the image, where a start of
  independent pixels is averaged out by filters, smooth encoders and chains alike.

References: Brendel, Rauber, Bethge, "Decision-based adversarial attacks: reliable attacks against
black-box machine learning models", ICLR 2018, https://arxiv.org/abs/1712.04248 (starts of another
class); Guo, Frank, Weinberger, "Low frequency adversarial perturbation", UAI 2019,
https://arxiv.org/abs/1809.08758.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pyro_vae_defence.attacks.base import Start
from pyro_vae_defence.attacks.objectives._rows import of_rows
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams


def other_class(labels: Tensor, images: Tensor, image_labels: Tensor) -> Start:
    """Start from the nearest image of another class, in Euclidean distance.

    Restart r starts from the (r + 1)-th nearest, from the first again when there are no more.

    Args:
        labels: classes of the references, integers ``(N,)``.
        images: where to start from, ``(K, C, H, W)`` in [0, 1]; the references may be among them.
        image_labels: their classes, integers ``(K,)``.

    Raises:
        ValueError: if ``image_labels`` are not those of the images, or there is a class of
            references that all images have.
    """
    if image_labels.shape != (len(images),):
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
        own = of_rows(labels, streams, "labels")[:, None]
        distance = torch.cdist(x_ref.flatten(1), images.flatten(1))
        nearest = distance.masked_fill(own == image_labels, torch.inf).argsort(1)
        rank = streams.chain % (own != image_labels).sum(1)
        return images[nearest.gather(1, rank[:, None])[:, 0]]

    return start


def low_frequency(cells: int = 4) -> Start:
    """Start from random signs, those of normal noise on ``cells`` x ``cells`` points, between which
    it is interpolated.

    Raises:
        ValueError: if ``cells`` is out of range.
    """
    check_integer("cells", cells)

    def start(x_ref: Tensor, streams: Streams) -> Tensor:
        channels, *size = x_ref.shape[1:]
        coarse = streams.normal(0, 0, (channels, cells, cells), x_ref.dtype)
        return x_ref + functional.interpolate(coarse, size, mode="bilinear").sign()

    return start
