r"""Classifiers of latents, the paper's linear one and one with hidden layers, and a small
convolutional one of images for its features.

The downstream task of the paper is linear in the guide's means, :math:`m = E_q[z \mid x]`,

.. math:: p(y \mid x) = \mathrm{softmax}(W m + b),

trained with cross-entropy by SGD (learning rate 1, halved when the validation loss has not fallen
for 3 epochs, stopped after 20 without improvement; the best epoch's weights are kept).

Where classes are not linear in the latents of a VAE that has never seen one, as on Fashion-MNIST,
hidden layers tell more of the same latents.

The convolutional one reads images. Its penultimate layer is a feature extractor for
:func:`pyro_vae_defence.metrics.frechet`, which must be reported under the extractor's name.

Reference: Kuzina, Welling, Tomczak, "Alleviating Adversarial Attacks on Variational Autoencoders
with MCMC", NeurIPS 2022, section 5.1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae_defence.models import program
from pyro_vae_defence.models.pretrained import WeightCard, load_weights, rebuild
from pyro_vae_defence.models.weights import fill
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import RefusalError, check_finite, check_integer, plain
from pyro_vae_defence.types import VAE, ImagesLike, Latents, LatentsLike


def flatten_latents(latents: LatentsLike) -> Tensor:
    """All latents of an image as one vector ``(N, D)``: sites one after the other, in their order.

    That of what this library returns is the order in which the guide samples them, so that a
    classifier trained on ``flatten_latents(posterior_mean(vae, x))`` reads each where it was.
    """
    return torch.cat([value[..., None].flatten(1) for value in latents.values()], 1)


def class_scores(classifier: Callable[[Tensor], Tensor], latents: LatentsLike) -> Tensor:
    """Scores ``(N, classes)`` that a classifier of latents ``(N, D)`` gives to all sites together.

    Raises:
        ValueError: if it fails, or returns something else, naming D and the sites in their order.
    """
    flat = flatten_latents(latents)
    problem, cause = "", None
    try:
        scores = classifier(flat)
    except (torch.OutOfMemoryError, RefusalError):
        raise
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        problem, cause = f"failed: {error}", error
    else:
        if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != len(flat):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            problem = f"must return scores ({len(flat)}, classes), got {got}"
    if problem:
        sites = ", ".join(f"{name!r} ({value[0].numel()})" for name, value in latents.items())
        raise ValueError(
            f"classifier {problem}; it is given latents of shape {tuple(flat.shape)}, which is "
            f"(M, D) of the guide's sites in their order, {sites}: pass a classifier of these, not "
            "of images"
        ) from cause
    # One-hot classes, such as a tree's or neighbours', are scores, too.
    return scores if scores.is_floating_point() else scores.to(flat)


def scores_of_either(
    classifier: Callable[[Latents], Tensor] | Callable[[Tensor], Tensor], latents: LatentsLike
) -> Tensor:
    """Scores that a classifier gives to latents, whether it takes site -> values, which is tried
    first, or all sites together, as :func:`class_scores` hands them on."""
    read: Any = classifier
    try:
        scores: Tensor = read(latents)
    except (AttributeError, KeyError, TypeError) as error:
        try:
            return class_scores(read, latents)
        except ValueError as refused:
            raise refused from error
    return scores


def class_margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Score of each label less the highest other one, ``(N,)``, of scores ``(N, classes)`` and
    labels int64 ``(N,)``: negative where another class is read."""
    own = labels[:, None]
    return scores.gather(1, own)[:, 0] - scores.scatter(1, own, -torch.inf).amax(1)


class _OfLatents(nn.Module):
    """Class scores from the latents of any VAE, ``num_latents`` of all sites together.

    Sites are joined in the guide's order (:func:`flatten_latents`): weights trained on another
    order fit in shape and mean nothing.
    """

    def __init__(self, num_latents: int, num_classes: int) -> None:
        super().__init__()
        check_integer("num_latents", num_latents)
        check_integer("num_classes", num_classes, 2)
        self.config: dict[str, Any] = dict(num_latents=num_latents, num_classes=num_classes)

    def scores(self, flat: Tensor) -> Tensor:
        """Latents ``(N, D)`` to scores."""
        raise NotImplementedError

    def forward(self, latents: Tensor | LatentsLike) -> Tensor:
        """Latents ``(N, D)``, or site -> ``(N, *event)``, to scores ``(N, num_classes)``."""
        flat = latents if isinstance(latents, Tensor) else flatten_latents(latents)
        number = self.config["num_latents"]
        if flat.shape[-1] != number:
            raise ValueError(
                f"a {type(self).__name__} of num_latents={number} is given latents of "
                f"shape {tuple(flat.shape)}; make it of as many as all sites have together"
            )
        return self.scores(flat)

    @public
    def classify(self, vae: VAE, x: ImagesLike) -> Tensor:
        """Classes predicted from the guide's means at images ``(N, C, H, W)`` in [0, 1], or
        ``(x, *conditions)``: int64 ``(N,)``."""
        vae, x = program.at_images(vae, x)
        with torch.no_grad(), program.evaluation_mode(vae, self):
            scores = self(program.posterior_mean(vae, x))
        check_finite("the score of classes", scores, "see what the guide returns for these images")
        return scores.argmax(-1)


class LinearClassifier(_OfLatents):
    """Class scores that are linear in the latents, ``num_latents`` of all sites together.

    ``config`` holds the constructor arguments that rebuild it.
    """

    def __init__(self, num_latents: int, num_classes: int) -> None:
        super().__init__(num_latents, num_classes)
        self.linear = nn.Linear(num_latents, num_classes)

    def scores(self, flat: Tensor) -> Tensor:
        """Latents ``(N, D)`` to scores."""
        return self.linear(flat)


class MLPClassifier(_OfLatents):
    """Class scores from the latents, ``num_latents`` of all sites together, by two hidden layers.

    Args:
        num_latents, num_classes: D, and the number of classes, 2 or more.
        hidden_dim: width of the two hidden layers.
        dropout: share of their units left out in training, in [0, 1).

    ``config`` holds them.
    """

    def __init__(
        self, num_latents: int, num_classes: int, hidden_dim: int = 256, dropout: float = 0.2
    ) -> None:
        super().__init__(num_latents, num_classes)
        check_integer("hidden_dim", hidden_dim)
        dropout = plain(dropout)
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
        self.config |= {"hidden_dim": hidden_dim, "dropout": dropout}
        self.network = nn.Sequential(
            nn.Linear(num_latents, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, num_classes),
        )

    def scores(self, flat: Tensor) -> Tensor:
        """Latents ``(N, D)`` to scores."""
        return self.network(flat)


class ConvClassifier(nn.Module):
    """Class scores from images of 16x16 pixels or more; the penultimate layer are ``features``."""

    def __init__(self, in_channels: int, num_classes: int, num_features: int = 64) -> None:
        super().__init__()
        check_integer("in_channels", in_channels)
        check_integer("num_classes", num_classes, 2)
        check_integer("num_features", num_features)
        self.config = dict(
            in_channels=in_channels, num_classes=num_classes, num_features=num_features
        )
        self.trunk = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, num_features),
        )
        self.linear = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` in [0, 1] to features ``(N, num_features)``, not rectified."""
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to scores ``(N, num_classes)``."""
        return self.linear(self.features(x).relu())


_CLASSIFIERS: dict[str, Any] = {
    "LinearClassifier": lambda config, weights: fill(lambda: LinearClassifier(**config), weights),
    "MLPClassifier": lambda config, weights: fill(lambda: MLPClassifier(**config), weights),
    "ConvClassifier": lambda config, weights: fill(lambda: ConvClassifier(**config), weights),
}


def load_classifier(
    name: str, directory: str | os.PathLike[str] | None = None
) -> tuple[Any, WeightCard]:
    """A trained classifier in eval mode, and its card.

    Arguments as for :func:`~pyro_vae_defence.models.pretrained.load_pretrained`. Raises
    ``ValueError`` for an unknown name, another kind of model, or weights that do not match it.
    """
    card, tensors = load_weights(name, directory)
    if card.architecture not in _CLASSIFIERS:
        raise ValueError(
            f"{name!r} is a {card.architecture}, no classifier; "
            f"this function loads {sorted(_CLASSIFIERS)}"
        )
    return rebuild(_CLASSIFIERS[card.architecture], card, tensors, directory), card
