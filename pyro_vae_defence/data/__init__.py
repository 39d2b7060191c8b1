"""Image datasets: the paper's, small real subsets that come with the library, harder variants, and
one's own."""

from pyro_vae_defence.data.datasets import ColoredImages, ImageDataset, Images
from pyro_vae_defence.data.files import ImageFiles, load_folder
from pyro_vae_defence.data.loading import DATASETS, SPLITS, batches, default_root, load, stratified
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
    "stratified",
]
