"""Similarity of image pairs, one value per pair.

*MS-SSIM*. At one scale, with local means m, variances v and covariance c under a Gaussian window,

    luminance  l = (2 m_x m_y + C1) / (m_x^2 + m_y^2 + C1),        C1 = 0.01^2,
    contrast   s = (2 c_xy + C2) / (v_x + v_y + C2),               C2 = 0.03^2,

and SSIM is the average of l s over positions and channels. MS-SSIM multiplies powers of such
averages over five scales, each half the size of the one before. Implementations disagree on the
details, and on 28x28 images the details decide: one pair scored .992, .800, .995 and .779 with four
of them. Values of different variants must never be compared, so a report names the variant: see
:func:`metric_name`.

Wang, Simoncelli, Bovik, "Multiscale structural similarity for image quality assessment", 2003;
https://doi.org/10.1109/ACSSC.2003.1292216
"""

from __future__ import annotations

import pytorch_msssim
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vae_defence.models.contract import check_range
from pyro_vae_defence.ops.boundary import nested, public
from pyro_vae_defence.ops.checks import check_finite, check_on_device, check_positive, check_tensor

MS_SSIM_VARIANTS = ("paper", "standard")
"""The variants of :func:`ms_ssim`."""

_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 4
_C1, _C2 = 0.01**2, 0.03**2  # (K L)^2 with dynamic range L = 1
_SIGMA = 1.5  # Wang et al. 2004, "Image quality assessment", section III.C
_PAPER_WINDOW = 14
_STANDARD_WINDOW = 11


def metric_name(metric: str, variant: str) -> str:
    """Name under which a value is printed or stored, such as ``"ms_ssim[paper]"``."""
    return f"{metric}[{variant}]"


@public
def ms_ssim(x: Tensor, y: Tensor, variant: str = "paper") -> Tensor:
    """Multi-scale structural similarity of each image pair, ``(N,)`` in [0, 1]; 1 if identical.

    ``"paper"`` is the variant behind the MSSSIM columns of Kuzina, Welling, Tomczak (2022). With
    S_j = max(0, average of l s) and R_j = max(0, average of s) at scale j, averages over the
    positions *and* channels of one image, and the weights w = (.0448, .2856, .3001, .2363, .1333),

        MSSSIM = R_1^{w_1} R_2^{w_2} R_3^{w_3} R_4^{w_4} (S_5^{w_5})^4.

    The fourth power is how the published numbers were computed; the 2003 definition has S_5^{w_5},
    and that error is kept only here.

    The window of scale j is the outer product of g with itself, g normalised to sum one,

        g_i ~ exp(-(i - floor(k/2))^2 / (2 * 1.5^2)),  i = 0..k-1,  k = min(14, H_j, W_j).

    An even window is thus off centre by half a pixel, and sigma does not shrink with the window.
    Windows stay inside the image (no padding). Scale j+1 averages the 2x2 blocks of scale j; an odd
    last row or column is dropped. Scale 5 of a 28x28 image is one pixel, where only luminance
    remains. The dynamic range is 1. Where a factor is 0, so are the result and its gradient.

    ``"standard"`` is ``pytorch_msssim.ms_ssim`` (window 11, sigma 1.5, dynamic range 1).

    Args:
        x, y: images ``(N, C, H, W)`` in [0, 1], float32 or float64, on one device, in either order.
        variant: ``"paper"`` (sides of 16 pixels or more) or ``"standard"`` (more than 160).

    Raises:
        ValueError: shapes or dtypes differ or are unsuitable, the images are too small for the
            variant, or the variant is unknown; or values are not in [0, 1], which is not looked at
            inside of another call of this library, such as an attack whose objective this is.
    """
    _check_pair(x, y)
    smaller_side, halvings = min(x.shape[-2:]), len(_WEIGHTS) - 1
    if variant == "paper":
        if smaller_side < 2**halvings:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but five scales need sides of at least "
                f"{2**halvings} pixels: use ssim, or resize the images"
            )
        return _paper_ms_ssim(x, y).clamp(max=1.0)
    if variant == "standard":
        too_small = (_STANDARD_WINDOW - 1) * 2**halvings
        if smaller_side <= too_small:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but variant='standard' needs sides above "
                f"{too_small} pixels: use variant='paper' for small images, or ssim"
            )
        value = pytorch_msssim.ms_ssim(x, y, data_range=1.0, size_average=False)
        return value.clamp(max=1.0)
    raise ValueError(f"variant={variant!r} is unknown: choose one of {MS_SSIM_VARIANTS}")


@public
def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity at one scale, ``pytorch_msssim.ssim`` (window 11, sigma 1.5, range 1).

    Images and errors are those of :func:`ms_ssim`, with sides of 11 pixels or more; the result
    ``(N,)`` lies in [-1, 1], and is 1 for identical images.
    """
    _check_pair(x, y)
    if min(x.shape[-2:]) < _STANDARD_WINDOW:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but ssim needs sides of at least {_STANDARD_WINDOW} "
            "pixels: resize the images"
        )
    return pytorch_msssim.ssim(x, y, data_range=1.0, size_average=False).clamp(max=1.0)


@public
def mse(x: Tensor, y: Tensor, scale: float = 255.0) -> Tensor:
    """Squared difference of each image pair, averaged over pixels and channels, ``(N,)``.

    A difference of 1 counts for ``scale``, positive; the paper (Table 7) reports the 0..255 scale.
    Images and errors are those of :func:`ms_ssim`, of any size; but ``y`` may leave [0, 1], as a
    decoded image does where its likelihood is Gaussian.
    """
    _check_pair(x, y, any_range=True)
    check_positive("scale", scale)
    return (scale * (x - y)).square().mean(dim=(1, 2, 3))


def _paper_ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    result = x.new_ones(x.shape[0])
    *weights, last = _WEIGHTS
    for weight in weights:
        result = result * _relu_power(_similarity_and_contrast(x, y)[1], weight)
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result * _relu_power(_similarity_and_contrast(x, y)[0], last) ** len(weights)


def _similarity_and_contrast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Averages of l s and of s over the positions and channels of each image, both ``(N,)``."""
    height, width = x.shape[-2:]
    size = min(_PAPER_WINDOW, height, width)
    rows, columns = _window_matrix(height, size, x), _window_matrix(width, size, x)

    def local_mean(image: Tensor) -> Tensor:
        return rows @ image @ columns.mT

    mean_x, mean_y = local_mean(x), local_mean(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    # Grouped so that every rounding error cancels for identical images, which score exactly 1.
    covariance = local_mean(x * y) - product
    variances = local_mean(x**2 + y**2) - squares
    contrast = (2 * covariance + _C2) / (variances + _C2)
    luminance = (2 * product + _C1) / (squares + _C1)
    return (luminance * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def _window_matrix(length: int, size: int, like: Tensor) -> Tensor:
    """Banded matrix ``(length - size + 1, length)`` that slides the window along one axis.

    On small images two products with it are some ten times faster than a convolution.
    """
    first = torch.arange(length - size + 1, device=like.device)[:, None]
    index = torch.arange(length, device=like.device) - first
    weight = torch.exp(-((index - size // 2) ** 2).to(like.dtype) / (2 * _SIGMA**2))
    weight = torch.where((index >= 0) & (index < size), weight, 0.0)
    return weight / weight.sum(dim=1, keepdim=True)


def _relu_power(base: Tensor, exponent: float) -> Tensor:
    """max(0, base)^exponent with gradient 0, not NaN, where the base is not positive.

    A base that is no number, of an image that is none, stays so.
    """
    positive = base > 0
    power = torch.where(positive, base, 1.0) ** exponent
    return torch.where(positive, power, torch.where(base.isnan(), base, 0.0))


def _check_pair(x: Tensor, y: Tensor, *, any_range: bool = False) -> None:
    for name, images in (("x", x), ("y", y)):
        check_tensor(name, images)
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}: reshape the images to (N, C, H, W)")
    if x.shape != y.shape:
        raise ValueError(
            f"y has shape {tuple(y.shape)} but x has shape {tuple(x.shape)}: pass one y for every x"
        )
    check_on_device("y", y, "x", x.device)
    if x.dtype not in (torch.float32, torch.float64) or y.dtype != x.dtype:
        raise ValueError(
            f"x has dtype {x.dtype} and y has dtype {y.dtype}: convert both to float32 or float64, "
            "as variances cancel in lower precision"
        )
    if not nested():
        check_range(x)
        if any_range:
            check_finite("y", y, "see where these rows come from")
        else:
            check_range(y, "y")
