"""MNIST: handwritten digits.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998;
https://doi.org/10.1109/5.726791
"""

from pyro_vae_defence.data.idx import IdxDataset

MNIST = IdxDataset(
    name="mnist",
    torchvision_class="MNIST",
    class_names=tuple("0123456789"),
    sha256=(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    subset_sha256="6376ecdba919dc0eb5d44829ac441810f5e142d71d02890da1e072d6b133055e",
)
