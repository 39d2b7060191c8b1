"""Fashion-MNIST: pictures of clothes in the format of MNIST.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning
algorithms", 2017; https://arxiv.org/abs/1708.07747
"""

from pyro_vae_defence.data.idx import IdxDataset

FASHION_MNIST = IdxDataset(
    name="fashion_mnist",
    torchvision_class="FashionMNIST",
    class_names=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
        "Ankle boot",
    ),
    sha256=(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    subset_sha256="85f39641f596f180c39f309c5069f9261b0fc5e9b5354a5d81c8f03d98f77207",
)  # fmt: skip
