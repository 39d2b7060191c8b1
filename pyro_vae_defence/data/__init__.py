"""Image datasets: the paper's, packaged subsets, harder variants, and one's own."""

from pyro_vae_defence.data.color_mnist import ColoredImages
from pyro_vae_defence.data.datasets import SPLITS, ImageDataset, Images, default_root
from pyro_vae_defence.data.files import ImageFiles, load_folder
from pyro_vae_defence.data.loading import DATASETS, batches, load, random_split, stratified
from pyro_vae_defence.data.variants import TexturedImages, TransformedImages, invert

__all__ = [
    "DATASETS",
    "SPLITS",
    "ColoredImages",
    "ImageDataset",
    "ImageFiles",
    "Images",
    "TexturedImages",
    "TransformedImages",
    "batches",
    "default_root",
    "invert",
    "load",
    "load_folder",
    "random_split",
    "stratified",
]
