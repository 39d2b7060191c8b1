r"""Fréchet distance between two sets of images, in the space of a feature extractor.

With mean m and covariance C of each set's features,

.. math:: d^2 = \lVert m_1 - m_2 \rVert^2
                + \mathrm{tr}\bigl(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\bigr),

the squared 2-Wasserstein distance of two Gaussians. Its size means nothing without the extractor:
the name *FID* stands for features of Inception-v3 trained on ImageNet alone (:func:`fid`), and
everything else is reported as ``frechet[<extractor>]``. Estimates from few images are biased
upwards, so compare only values from equally many.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs trained by a two time-scale update rule
converge to a local Nash equilibrium", 2017; https://arxiv.org/abs/1706.08500
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pyro_vae_defence.models.contract import (
    check_images,
    check_networks_on_device,
    evaluation_mode,
)
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_finite, check_integer, check_on_device, check_tensor

Extractor = Callable[[Tensor], Tensor]
"""Images ``(N, C, H, W)`` in [0, 1] -> features ``(N, F)``."""


@public
def frechet_distance(features: Tensor, other: Tensor) -> Tensor:
    """Squared Fréchet distance of two sets of features: a float64 scalar, not negative.

    Args:
        features, other: shapes ``(N, F)`` and ``(M, F)``, two rows or more each.

    Raises:
        ValueError: the shapes do not fit, devices differ, or features are not finite.
    """
    for name, value in (("features", features), ("other", other)):
        check_tensor(name, value)
        if value.ndim != 2 or value.shape[0] < 2 or value.shape[1] != features.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: pass (N, F) with two rows or more and "
                "the same F in both"
            )
        check_finite(name, value, "see what the extractor does with these rows")
    check_on_device("other", other, "features", features.device)
    (mean, covariance), (other_mean, other_covariance) = _moments(features), _moments(other)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    # The product is symmetric, so its root has the square roots of its eigenvalues for a trace.
    overlap = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + (covariance + other_covariance).trace()
    return (distance - 2 * overlap).clamp(min=0)


@public
@torch.no_grad()
def frechet(x: Tensor, y: Tensor, extractor: Extractor, rows: int = 500) -> Tensor:
    """Squared Fréchet distance of two sets of images; report it as ``frechet[<extractor>]``.

    Args:
        x, y: images ``(N, C, H, W)`` and ``(M, C, H, W)`` in [0, 1].
        extractor: images to features, e.g. ``models.classifier.ConvClassifier(...).features``; its
            networks are in eval mode while it runs.
        rows: images at once.

    Raises:
        ValueError: the images are none in [0, 1], or as :func:`frechet_distance`.
    """
    _check(x, y, rows)
    check_networks_on_device("extractor", extractor, "x", x)
    with evaluation_mode(extractor):
        parts = [[extractor(batch) for batch in images.split(rows)] for images in (x, y)]
    for features in (*parts[0], *parts[1]):
        check_tensor("what extractor returns", features)
    return frechet_distance(*map(torch.cat, parts))


@public
@torch.no_grad()
def fid(
    x: Tensor, y: Tensor, weights_path: str | os.PathLike[str] | None = None, rows: int = 50
) -> Tensor:
    """Fréchet Inception distance through torchmetrics (Table 7); grey becomes three channels.

    Args:
        x, y: images ``(N, C, H, W)`` and ``(M, C, H, W)`` in [0, 1] with one or three channels.
        weights_path: file of the Inception weights (``pt_inception-2015-12-05-6726825d.pth`` of
            torch-fidelity); downloaded when ``None``.
        rows: images at once.

    Raises:
        ValueError: torchmetrics is not installed, there is no such file, or the images do not fit.
    """
    if weights_path is not None and not Path(weights_path).is_file():
        raise ValueError(
            f"weights_path={str(weights_path)!r} is no file: download torch-fidelity's Inception "
            "weights and pass their path"
        )
    _check(x, y, rows)
    for name, images in (("x", x), ("y", y)):
        if images.shape[1] not in (1, 3) or images.shape[0] < 2:
            raise ValueError(
                f"{name} has shape {tuple(images.shape)}: pass (N, C, H, W) with two images or "
                "more and one or three channels"
            )
    path = None if weights_path is None else str(weights_path)
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        inception = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=path)
    except ImportError as error:  # of torchmetrics, or by it of torch-fidelity
        raise ValueError(
            "FID needs torchmetrics and torch-fidelity: pip install 'pyro-vae-defence[metrics]'"
        ) from error
    inception.to(x.device)
    for images, real in ((x, True), (y, False)):
        for batch in images.split(rows):
            inception.update(batch.expand(-1, 3, -1, -1), real=real)
    return inception.compute()


def _check(x: Tensor, y: Tensor, rows: int) -> None:
    check_images(x)
    check_images(y, "y")
    check_on_device("y", y, "x", x.device)
    check_integer("rows", rows)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    double = features.detach().double()
    return double.mean(0), torch.atleast_2d(double.mT.cov())
