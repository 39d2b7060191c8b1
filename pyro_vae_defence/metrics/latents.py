"""How many latent dimensions a VAE uses.

A dimension d is *active* when its posterior mean moves with the data, Var_x(E_q(z_d | x)[z_d]) >
0.01: in an unused one the guide has collapsed to the prior and the mean stays put.

Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", 2016, section 5.2;
https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

from torch import Tensor

from pyro_vae_defence.ops.checks import check_tensor, check_within

ACTIVITY_THRESHOLD = 0.01
"""Burda et al. (2016), section 5.2."""


def active_units(means: Tensor, threshold: float = ACTIVITY_THRESHOLD) -> Tensor:
    """Which latent dimensions are active: bool, shape ``event``; its sum is their number.

    Args:
        means: means of q(z | x), shape ``(N, *event)``, one row per image, at least two.
        threshold: (unbiased) variance over images that an active unit's exceeds, not negative.

    Raises:
        ValueError: fewer than two rows, no latent dimension, means that are not finite, or a
            negative threshold.
    """
    check_tensor("means", means)
    if not means.is_floating_point():
        raise ValueError(f"means has dtype {means.dtype}: pass floating-point numbers")
    if means.ndim < 2 or means.shape[0] < 2:
        shape = tuple(means.shape)
        raise ValueError(f"means has shape {shape}: pass (N, *event), one row per image, N >= 2")
    if means.device.type != "meta" and not bool(means.isfinite().all()):
        raise ValueError("means has entries that are not finite: see what the guide returns there")
    check_within("threshold", threshold, "[0, inf]", "it is a variance")
    return means.var(dim=0) > threshold
