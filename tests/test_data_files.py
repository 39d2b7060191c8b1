"""Datasets decoded from files: CelebA's layout with generated pictures, and any folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae_defence import data
from pyro_vae_defence.data import files

PARTITION = [0, 0, 0, 1, 2, 2]
ATTRIBUTES = ["5_o_Clock_Shadow", "Male", "Young"]


def picture(seed, size=(178, 218)):
    """A smooth coloured picture, which JPEG keeps well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def celeba(tmp_path):
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, 7)]
    for number, name in enumerate(names):
        picture(number).save(folder / "img_align_celeba" / name, quality=95)
    rows = zip(names, PARTITION, strict=True)
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in rows))
    lines = [f"{n}  1 -1  {1 if i % 2 else -1}\n" for i, n in enumerate(names)]
    (folder / "list_attr_celeba.txt").write_text(f"6\n{' '.join(ATTRIBUTES)}\n{''.join(lines)}")
    (folder / "identity_CelebA.txt").write_text("".join(f"{n} 7\n" for n in names))
    return tmp_path


def test_celeba_has_the_published_splits_and_attributes(celeba):
    sizes = [len(data.load("celeba64", split, celeba)) for split in data.SPLITS]
    assert sizes == [3, 1, 2]
    test = data.load("celeba64", "test", celeba)
    assert test.image_shape == (3, 64, 64)
    assert test.class_names == tuple(ATTRIBUTES)
    assert test.labels.tolist() == [[1, 0, 0], [1, 0, 1]]
    assert repr(test) == "ImageFiles('celeba64', 'test', 2 images)"
    assert data.stratified(test, 2, column=2).tolist() == [0, 1]


def test_celeba_is_cropped_and_scaled_as_in_nvae(celeba):
    images, labels = data.load("celeba64", "test", celeba)[[1, 0]]
    assert labels.tolist() == [[1, 0, 1], [1, 0, 0]]
    assert images.shape == (2, 3, 64, 64)
    assert images.dtype == torch.float32
    source = Image.open(celeba / "celeba" / "img_align_celeba" / "000006.jpg")
    face = torch.from_numpy(np.array(source))[40:188, 15:163].permute(2, 0, 1).float()[None] / 255
    expected = torch.nn.functional.interpolate(
        face, (64, 64), mode="bilinear", antialias=True, align_corners=False
    )[0]
    # Pillow rounds to eighths of a bit at each of two passes.
    torch.testing.assert_close(images[0], expected, atol=1.5 / 255, rtol=0)


def test_torchvision_reads_the_same_pictures(celeba, monkeypatch):
    """The layout is torchvision's: its own class finds the same files and attributes."""
    import torchvision.datasets

    for name in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        text = (celeba / "celeba" / "list_attr_celeba.txt").read_text()
        (celeba / "celeba" / name).write_text(text)
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)
    theirs = torchvision.datasets.CelebA(str(celeba), split="train", target_type="attr")
    ours = data.load("celeba64", "train", celeba)
    assert [path.rsplit("/", 1)[1] for path in ours.paths] == theirs.filename
    assert torch.equal(ours.labels, theirs.attr)


def test_files_are_decoded_when_asked_for(celeba, monkeypatch):
    dataset = data.load("celeba64", "train", celeba)
    opened = []
    original = files.Image.open
    monkeypatch.setattr(files.Image, "open", lambda p: opened.append(p) or original(p))
    image, _ = dataset[1]
    assert opened == [dataset.paths[1]]
    assert torch.equal(dataset[1:3][0][0], image)
    assert torch.equal(dataset[torch.tensor([1])][0][0], image)
    assert dataset[[]][0].shape == (0, 3, 64, 64)
    whole = torch.cat([x for x, _ in data.batches(dataset, 2)])
    assert torch.equal(whole, dataset.images())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("list_attr_celeba.txt", lambda t: t[: t.index("000005")], "is truncated: 4 images"),
        ("list_attr_celeba.txt", lambda t: t[:-6] + "\n", r"line 8: expected a file and 3 times"),
        ("list_attr_celeba.txt", lambda t: "", "must start with the number of images"),
        ("list_eval_partition.txt", lambda t: t[:-2] + "7", r"line 6: expected a file and 0, 1"),
        ("list_eval_partition.txt", lambda t: t[:26], r"list different images \(2 and 6\)"),
    ],
)
def test_damaged_lists_are_refused(celeba, file, change, message):
    path = celeba / "celeba" / file
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message) as caught:
        data.load("celeba64", "test", celeba)
    assert file in str(caught.value)


def test_missing_celeba_names_the_mend(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"celeba64: no .*partition\.txt; pass download"):
        data.load("celeba64", "test", tmp_path)
    import torchvision.datasets

    def refuse(*args, **kwargs):
        raise RuntimeError("quota exceeded")

    monkeypatch.setattr(torchvision.datasets, "CelebA", refuse)
    with pytest.raises(FileNotFoundError, match=r"downloading celeba64 .*quota exceeded"):
        data.load("celeba64", "test", tmp_path, download=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "small"])
def test_a_broken_picture_is_named(celeba, damage):
    path = celeba / "celeba" / "img_align_celeba" / "000006.jpg"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "small":
        picture(0, (100, 218)).save(path)
    else:
        path.write_bytes({"truncated": content[:-500], "empty": b"", "text": b"cat"}[damage])
    dataset = data.load("celeba64", "test", celeba)
    assert dataset[0][0].shape == (3, 64, 64)  # the others can still be read
    with pytest.raises(ValueError, match=r"cannot read image .*000006\.jpg .*restore or remove"):
        dataset[[0, 1]]


@pytest.fixture
def folder(tmp_path):
    for split, number in (("train", 3), ("test", 2)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(number):
                suffix = (".png", ".JPG", ".bmp")[i]
                picture(i, (60 + 30 * i, 50)).save(tmp_path / split / label / f"{i}{suffix}")
    (tmp_path / "train" / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_images(folder):
    dataset = data.load_folder(folder, 28, channels=1, split="train")
    assert len(dataset) == 6
    assert dataset.image_shape == (1, 28, 28)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    images = dataset.images()
    assert images.shape == (6, 1, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    assert (dataset.name, dataset.split) == (folder.resolve().name, "train")
    assert len(data.load_folder(folder, 28)) == 10
    flat = data.load_folder(folder / "test" / "cat", (20, 30))
    assert flat.image_shape == (3, 20, 30)
    assert flat.labels.tolist() == [0, 0]
    assert flat.class_names == ("cat",)


def test_a_folder_keeps_the_centre_of_a_covering_image(tmp_path):
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert data.load_folder(tmp_path, 10, channels=1)[0][0].min() == 1
    wide = data.load_folder(tmp_path, (10, 30), channels=1)[0][0]
    assert torch.equal((wide[0] * 255).byte(), torch.from_numpy(pixels))
    # 20 high: twice as large before the centre is cut out.
    assert data.load_folder(tmp_path, (20, 10), channels=1)[0][0].min() == 1


def test_bad_folders_and_arguments(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="path='.*nowhere' is no folder"):
        data.load_folder(tmp_path / "nowhere", 28)
    with pytest.raises(FileNotFoundError, match="path='.*valid' is no folder"):
        data.load_folder(folder, 28, split="valid")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image; names must end in .bmp"):
        data.load_folder(tmp_path / "empty", 28)
    with pytest.raises(ValueError, match="image_size=0 must be positive"):
        data.load_folder(folder, 0)
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3"):
        data.load_folder(folder, 28, channels=2)
    with pytest.raises(ValueError, match="2 images but labels of shape"):
        data.ImageFiles(["a", "b"], torch.zeros(3), "x", "all", [], (1, 2, 2), lambda image: image)
