"""Image datasets: the paper's, and small real subsets that come with the library."""

from pyro_vae_defence.data.datasets import ColoredImages, ImageDataset
from pyro_vae_defence.data.loading import DATASETS, SPLITS, batches, default_root, load, stratified

__all__ = [
    "DATASETS",
    "SPLITS",
    "ColoredImages",
    "ImageDataset",
    "batches",
    "default_root",
    "load",
    "stratified",
]
