"""Numbers printed in the paper, to stand beside measured ones; nothing here is a result of this
library.

Source: Kuzina, Welling, Tomczak, "Alleviating Adversarial Attacks on Variational Autoencoders with
MCMC", NeurIPS 2022, https://arxiv.org/abs/2203.09940.
"""

from __future__ import annotations

from typing import Any

TABLE_7: dict[str, dict[str, float]] = {
    "mnist_vae": {"nll": 88.3, "mse": 578.6},
    "mnist_beta_vae_2": {"nll": 89.3, "mse": 824.2},
    "mnist_beta_vae_5": {"nll": 100.6, "mse": 1485.1},
    "mnist_beta_vae_10": {"nll": 126.8, "mse": 2498.9},
    "mnist_tcvae_2": {"nll": 89.3, "mse": 828.4},
    "mnist_tcvae_5": {"nll": 96.7, "mse": 1325.4},
    "mnist_tcvae_10": {"nll": 107.2, "mse": 1686.1},
    "fashion_mnist_vae": {"nll": 232.8, "mse": 814.3},
    "fashion_mnist_beta_vae_2": {"nll": 234.1, "mse": 1021.1},
    "fashion_mnist_beta_vae_5": {"nll": 241.8, "mse": 1457.8},
    "fashion_mnist_beta_vae_10": {"nll": 248.7, "mse": 1842.3},
    "fashion_mnist_tcvae_2": {"nll": 233.6, "mse": 980.4},
    "fashion_mnist_tcvae_5": {"nll": 238.2, "mse": 1024.6},
    "fashion_mnist_tcvae_10": {"nll": 247.5, "mse": 1570.0},
    "color_mnist_vae": {"nll": 54.87, "mse": 261.3, "fid": 2.09},
    "color_mnist_beta_vae_2": {"nll": 55.6, "mse": 365.6, "fid": 2.4},
    "color_mnist_beta_vae_5": {"nll": 63.6, "mse": 586.1, "fid": 2.5},
    "color_mnist_beta_vae_10": {"nll": 88.7, "mse": 936.2, "fid": 2.4},
    "color_mnist_tcvae_2": {"nll": 55.8, "mse": 366.4, "fid": 3.0},
    "color_mnist_tcvae_5": {"nll": 63.0, "mse": 574.8, "fid": 2.0},
    "color_mnist_tcvae_10": {"nll": 76.5, "mse": 806.2, "fid": 2.2},
}
"""Table 7 (appendix D.1), test set: NLL in nats by importance sampling with k = 1000, MSE per pixel
on the scale 0..255, FID on ColorMNIST alone. Model names are this library's; one-sample
reconstructions, 300 epochs."""

_RADII = {"ms_ssim": ("0.1", "0.2"), "class": ("0", "0.1", "0.2"), "color": ("0", "0.1", "0.2")}


def _printed(*rows: tuple[Any, ...]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Model -> defence -> measure -> radius -> number, of rows: model, defence, MSSSIM at radii 0.1
    and 0.2, accuracies of the class and of the colour at 0, 0.1 and 0.2; ``None`` is not printed.
    """
    found: dict[str, Any] = {}
    for model, defence, *measures in rows:
        found.setdefault(model, {})[defence] = {
            measure: {r: value for r, value in zip(_RADII[measure], values) if value is not None}
            for measure, values in zip(_RADII, measures)
            if values
        }
    return found


# fmt: off
TABLE_2 = _printed(
    ("mnist_vae", "none",                (0.70, 0.36), (0.90, 0.08, 0.05)),
    ("mnist_vae", "hmc",                 (0.88, 0.76), (0.76, 0.25, 0.19)),
    ("mnist_beta_vae_2", "none",         (0.75, 0.50), (0.90, 0.11, 0.01)),
    ("mnist_beta_vae_2", "hmc",          (0.84, 0.69), (None, 0.30, 0.16)),
    ("mnist_tcvae_2", "none",            (0.70, 0.46), (0.86, 0.05, 0.03)),
    ("mnist_tcvae_2", "hmc",             (0.79, 0.65), (None, 0.25, 0.16)),
    ("fashion_mnist_vae", "none",        (0.59, 0.47), (0.78, 0.00, 0.01)),
    ("fashion_mnist_vae", "hmc",         (0.66, 0.54), (0.56, 0.14, 0.13)),
    ("fashion_mnist_beta_vae_2", "none", (0.52, 0.41), (0.80, 0.00, 0.00)),
    ("fashion_mnist_beta_vae_2", "hmc",  (0.64, 0.50), (None, 0.13, 0.12)),
    ("fashion_mnist_tcvae_2", "none",    (0.52, 0.42), (0.84, 0.00, 0.02)),
    ("fashion_mnist_tcvae_2", "hmc",     (0.66, 0.52), (None, 0.13, 0.11)),
)
"""Table 2 (section 4.2): model, defence, measure (MSSSIM under attacks on the encoder, adversarial
accuracy under attacks on the classifier), radius. Its beta-VAE and beta-TCVAE have the MSE that
Table 7 gives for beta = 2; those with HMC stand in Table 4 (appendix C.2) alone."""

TABLE_3 = _printed(
    ("color_mnist_vae", "none",          (0.36, 0.19), (1.00, 0.04, 0.02), (1.00, 0.06, 0.06)),
    ("color_mnist_vae", "hmc",           (0.96, 0.90), (0.42, 0.16, 0.11), (1.00, 0.68, 0.62)),
    ("color_mnist_beta_vae_2", "none",   (0.50, 0.38), (0.88, 0.08, 0.05), (1.00, 0.21, 0.18)),
    ("color_mnist_beta_vae_2", "hmc",    (0.92, 0.87), (None, 0.14, 0.15), (None, 0.66, 0.56)),
    ("color_mnist_tcvae_2", "none",      (0.35, 0.23), (0.94, 0.08, 0.05), (1.00, 0.06, 0.05)),
    ("color_mnist_tcvae_2", "hmc",       (0.96, 0.87), (None, 0.22, 0.14), (None, 0.81, 0.72)),
    ("color_mnist_se_0.1", "none",       (),           (0.94, 0.89, 0.02), (1.00, 1.00, 0.22)),
    ("color_mnist_se_0.2", "none",       (),           (0.95, 0.92, 0.87), (1.00, 1.00, 1.00)),
    ("color_mnist_avae", "none",         (),           (0.97, 0.88, 0.55), (1.00, 1.00, 0.88)),
    ("color_mnist_se_avae", "none",      (),           (0.97, 0.94, 0.25), (1.00, 1.00, 0.60)),
    ("color_mnist_avae_ss", "none",      (),           (0.94, 0.73, 0.21), (1.00, 1.00, 0.57)),
)
# fmt: on
"""Table 3 (section 4.2), like Table 2; the figures of SE and AVAE are those it quotes from their
authors, of SE-AVAE that for radius 0.1. For beta-VAE it prints the MSSSIM of MNIST's, 0.75 and
0.50; these here are Table 4's."""
