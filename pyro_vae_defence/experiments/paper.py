"""Numbers printed in the paper, to stand beside measured ones; nothing here is a result of this library.

Source: Kuzina, Welling, Tomczak, "Alleviating Adversarial Attacks on Variational Autoencoders with MCMC",
NeurIPS 2022, https://arxiv.org/abs/2203.09940.
"""

from __future__ import annotations

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
"""Table 7 (appendix D.1), test set: NLL in nats by importance sampling with k = 1000, MSE per pixel on the scale
0..255, FID on ColorMNIST alone. Model names are this library's; one-sample reconstructions, 300 epochs."""
