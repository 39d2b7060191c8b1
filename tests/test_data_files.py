"""Datasets decoded from files: CelebA's layout with generated pictures, and any folder."""

from __future__ import annotations

import os
import pickle

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
    monkeypatch.setattr(files.Image, "open", lambda f: opened.append(f.name) or original(f))
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
    dataset = data.load_folder(folder, 28, channels=1, split="train", fit="crop")
    assert len(dataset) == 6
    assert dataset.image_shape == (1, 28, 28)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    images = dataset.images()
    assert images.shape == (6, 1, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    assert (dataset.name, dataset.split) == (folder.resolve().name, "train")
    assert len(data.load_folder(folder, 28, split=".")) == 10
    flat = data.load_folder(folder / "test" / "cat", (20, 30))
    assert flat.image_shape == (3, 20, 30)
    assert flat.labels.tolist() == [0, 0]
    assert flat.class_names == ("cat",)


def test_a_folder_keeps_the_centre_of_a_covering_image(tmp_path):
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert data.load_folder(tmp_path, 10, channels=1, fit="crop")[0][0].min() == 1
    wide = data.load_folder(tmp_path, (10, 30), channels=1)[0][0]
    assert torch.equal((wide[0] * 255).byte(), torch.from_numpy(pixels))
    # 20 high: twice as large before the centre is cut out.
    assert data.load_folder(tmp_path, (20, 10), channels=1, fit="crop")[0][0].min() == 1

    # All of it: with black above and below, or stretched to three times the height.
    padded = data.load_folder(tmp_path, 30, channels=1, fit="pad")[0][0]
    expected = torch.zeros(1, 30, 30)
    expected[0, 10:20, 10:20] = 1
    assert torch.equal(padded, expected)
    stretched = data.load_folder(tmp_path, (30, 30), channels=1, fit="stretch")[0][0]
    assert torch.equal((stretched[0] * 255).byte(), torch.from_numpy(pixels).repeat(3, 1))


def test_what_is_cut_off_is_said_once_in_a_process(tmp_path):
    for name in "ab":
        Image.new("L", (30, 10)).save(tmp_path / f"{name}.png")
    images = data.load_folder(tmp_path, 10, channels=1)
    in_a_worker = pickle.loads(pickle.dumps(images))
    for copy in (images, in_a_worker):
        with pytest.warns(UserWarning, match=r"30x10 pixels .* loses 67% of its area at its side"):
            copy.images(0)
        copy.images(1)
    data.load_folder(tmp_path, (10, 29), channels=1).images(0)  # a pixel is rounding
    with pytest.raises(ValueError, match="fit must be one of crop, pad, stretch, got 'cut'"):
        data.load_folder(tmp_path, 10, fit="cut")


def test_bad_folders_and_arguments(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="path='.*nowhere' is no folder"):
        data.load_folder(tmp_path / "nowhere", 28)
    with pytest.raises(FileNotFoundError, match="path='.*valid' is no folder"):
        data.load_folder(folder, 28, split="valid")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image; names must end in .bmp"):
        data.load_folder(tmp_path / "empty", 28)
    for size in (0, 32.0, "32", (8, 0.5)):
        with pytest.raises(ValueError, match="image_size must be an integer of at least 1, got"):
            data.load_folder(folder, size, split=".")
    with pytest.raises(ValueError, match=r"image_size=\(3, 32, 32\) must be one number, or height"):
        data.load_folder(folder, (3, 32, 32), split=".")
    assert data.load_folder(folder, np.int64(28), split=".").image_shape == (3, 28, 28)
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3"):
        data.load_folder(folder, 28, channels=2, split=".")
    with pytest.raises(ValueError, match="2 images but labels of shape"):
        data.ImageFiles(["a", "b"], torch.zeros(3), "x", "all", [], (1, 2, 2), lambda image: image)


def grey(value, size=(4, 3), mode="L"):
    return Image.new(mode, size, value)


def test_grey_stays_grey_and_sizes_stay(tmp_path):
    grey(51).save(tmp_path / "a.png")
    grey(1, mode="1").save(tmp_path / "b.png")
    ramp = Image.linear_gradient("L").resize((4, 3))
    ramp.save(tmp_path / "c.png")
    ramp.convert("P").save(tmp_path / "d.png")  # a palette of greys
    found = data.load_folder(tmp_path)
    assert found.image_shape == (1, 3, 4)
    images = found.images()
    assert (images[0] == 0.2).all()
    assert (images[1] == 1).all()
    assert torch.equal(images[2], torch.from_numpy(np.array(ramp))[None] / 255)
    assert torch.equal(images[3], images[2])
    assert data.load_folder(tmp_path, channels=3).image_shape == (3, 3, 4)
    assert data.load_folder(tmp_path, (6, 8)).image_shape == (1, 6, 8)


def test_colour_stays_colour(tmp_path):
    red = grey((255, 0, 0), mode="RGB")
    red.save(tmp_path / "a.png")
    red.convert("P").save(tmp_path / "b.png")
    opaque = red.copy()
    opaque.putalpha(255)
    opaque.save(tmp_path / "c.png")
    images = data.load_folder(tmp_path).images()
    assert images.shape == (3, 3, 3, 4)
    assert (images[:, 0] == 1).all()
    assert (images[:, 1:] == 0).all()


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (grey((1, 2, 3), mode="RGB"), {"image_size": 3}, r"pass channels=1 \(grey\) or channels=3"),
        (grey(1, (4, 4)), {}, r"\(1, 4, 4\); pass image_size= to make them alike"),
        (grey((1, 2, 3), (4, 4), "RGB"), {}, "pass channels=1 .* and image_size= to make"),
    ],
)
def test_images_that_differ_are_refused_and_both_named(tmp_path, other, options, message):
    grey(0).save(tmp_path / "a.png")
    other.save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=f"images differ: .*a.png has .*b.png has .*{message}"):
        data.load_folder(tmp_path, **options)
    assert len(data.load_folder(tmp_path, 3, channels=1).images()) == 2


def half_transparent():
    image = grey((1, 2, 3), mode="RGB")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize(
    ("name", "image", "options", "message"),
    [
        ("x.png", grey(40_000, mode="I;16"), {}, "its pixels are 'I;16' to Pillow.* 8 bits"),
        ("x.tif", grey(0.5, mode="F"), {}, "its pixels are 'F' to Pillow"),
        ("x.jpg", grey((0, 0, 0, 9), mode="CMYK"), {}, "its pixels are 'CMYK' to Pillow"),
        ("x.png", half_transparent(), {}, "it has transparent pixels"),
        ("x.png", grey(7), {"transparency": 7}, "it has transparent pixels"),
        (
            "x.tif",
            grey(0),
            {"save_all": True, "append_images": [grey(1)]},
            "it holds 2 images: save each",
        ),
    ],
)
def test_files_that_would_be_decoded_wrongly_are_refused(tmp_path, name, image, options, message):
    image.save(tmp_path / name, **options)
    with pytest.raises(ValueError, match=f"cannot read image .*{name} .*{message}"):
        data.load_folder(tmp_path).images()
    with pytest.raises(ValueError, match=f"cannot read image .*{name} .*{message}"):
        data.load_folder(tmp_path, 3, channels=1).images()


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [  # of EXIF: by a half, on its diagonal, and row 0 is the right-hand side
        (3, lambda pixels: np.rot90(pixels, 2)),
        (5, np.transpose),
        (6, lambda pixels: np.rot90(pixels, -1)),
        (9, lambda pixels: pixels),  # no orientation: left alone
    ],
)
def test_a_camera_that_was_turned(tmp_path, suffix, orientation, turn):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    found = data.load_folder(tmp_path)
    expected = torch.from_numpy(turn(pixels).copy())
    assert found.image_shape == (1, *expected.shape)
    assert torch.equal((found[0][0][0] * 255).round().byte(), expected)


def test_a_broken_file_of_a_folder_is_named(tmp_path):
    (tmp_path / "a.png").write_text("cat")
    with pytest.raises(ValueError, match=r"cannot read image .*a\.png .*restore or remove"):
        data.load_folder(tmp_path)


# --- What lies about in folders -------------------------------------------------------------------


def put(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    grey(value).save(path)


def test_linked_classes_are_read_and_hidden_ones_are_not(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    for i in range(2):
        put(elsewhere / f"{i}.png", i)
    put(folder / "a" / "x.png", 7)
    put(folder / ".ipynb_checkpoints" / "x.png")
    put(folder / "a" / ".thumbnails" / "x.png")
    put(folder / "a" / "y.png" / "z.txt.png")  # a folder that is called as an image is
    (folder / "b").symlink_to(elsewhere)
    (folder / "c").symlink_to(elsewhere)
    found = data.load_folder(folder)
    assert found.class_names == ("a", "b", "c")
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (found.images()[:, 0, 0, 0] * 255).round().tolist() == [7, 0, 0, 1, 0, 1]


def test_a_link_that_leads_nowhere_or_in_circles_is_named(tmp_path):
    put(tmp_path / "x.png")
    (tmp_path / "y.png").symlink_to(tmp_path / "lost.png")
    with pytest.raises(ValueError, match=r"cannot read image .*y\.png"):
        data.load_folder(tmp_path, 4, 1).images()
    (tmp_path / "y.png").unlink()
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="again is a link to a folder that holds it"):
        data.load_folder(tmp_path)


def test_short_memory_is_no_damage(tmp_path, monkeypatch):
    put(tmp_path / "x.png")

    def decoded(_):
        raise MemoryError

    images = data.load_folder(tmp_path, 8, channels=3)
    monkeypatch.setattr(files.ImageOps, "exif_transpose", decoded)
    with pytest.raises(MemoryError):
        images.images(0)


def test_a_label_means_the_same_in_every_split(tmp_path):
    for name in ("train/ant", "train/bee", "train/cat", "test/ant", "test/cat", "new/dog"):
        put(tmp_path / name / "x.png")
    put(tmp_path / "unlabelled" / "x.png")
    names = ("ant", "bee", "cat", "dog")
    for split, labels in (("train", [0, 1, 2]), ("test", [0, 2]), ("new", [3])):
        found = data.load_folder(tmp_path, split=split)
        assert found.class_names == names
        assert found.labels.tolist() == labels
    unlabelled = data.load_folder(tmp_path, split="unlabelled")
    assert (unlabelled.labels.tolist(), unlabelled.class_names) == ([0], (tmp_path.name,))


@pytest.mark.parametrize("split", ["images/train", "images/train/"])
def test_a_nested_split_has_the_classes_of_the_folders_beside_it(tmp_path, split):
    for name in ("train/cat", "train/zebra", "val/dog"):
        put(tmp_path / "images" / name / "x.png")
    put(tmp_path / "masks" / "train" / "x.png")
    found = data.load_folder(tmp_path, split=split)
    assert found.class_names == ("cat", "dog", "zebra")
    assert found.labels.tolist() == [0, 2]
    whole = data.load_folder(tmp_path / "images", split=".")
    assert whole.class_names == ("train", "val")


def test_a_folder_one_level_too_high_is_noticed(tmp_path):
    for name in ("train/good", "test/good", "test/broken"):
        put(tmp_path / "bottle" / name / "x.png")
    named = r"bottle' are test, train, which hold no image but .* as test/broken: pass split="
    with pytest.warns(UserWarning, match=named):
        assert data.load_folder(tmp_path / "bottle").class_names == ("test", "train")
    assert data.load_folder(tmp_path / "bottle", split=".").class_names == ("test", "train")
    put(tmp_path / "bottle" / "train" / "x.png")  # of a class, whose other images are in groups
    assert data.load_folder(tmp_path / "bottle").labels.tolist() == [0, 0, 1, 1]


def test_an_image_beside_the_classes_is_noticed(tmp_path):
    for name in ("cat/x", "dog/x"):
        put(tmp_path / f"{name}.png")
    assert data.load_folder(tmp_path).labels.tolist() == [0, 1]
    put(tmp_path / "overview.png")
    named = "overview.png lies in .* beside folders of images such as cat, .* every label is 0"
    with pytest.warns(UserWarning, match=named):
        assert data.load_folder(tmp_path).labels.tolist() == [0, 0, 0]
    assert data.load_folder(tmp_path, split=".").labels.tolist() == [0, 0, 0]


def test_a_folder_in_spawned_workers(tmp_path):
    for i in range(3):
        put(tmp_path / f"{i}.png", i)
    found = data.load_folder(tmp_path, (6, 5), fit="crop")
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.images(), found.images())
    assert again.image_shape == (1, 6, 5)


def test_what_decoders_raise_has_the_files_name(tmp_path, monkeypatch):
    for i in range(3):
        grey(i, (40, 40)).save(tmp_path / f"{i}.png")
    found = data.load_folder(tmp_path)
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:45] + b"\xff" * 8 + content[53:])
    with pytest.raises(ValueError, match=r"cannot read image .*1\.png"):
        found.images()
    assert found.images([0, 2]).shape == (2, 1, 40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 1600 are more than twice as many
    with pytest.raises(ValueError, match=r"cannot read image .*0\.png .*decompression bomb"):
        data.load_folder(tmp_path, 4, 1).images()


class TestRandomSplit:
    def test_parts_are_disjoint_and_all(self, folder):
        whole = data.load_folder(folder, 28, split="train", fit="crop")
        parts = data.random_split(whole, (0.5, 1 / 3, 1 / 6), torch.Generator().manual_seed(1))
        assert [len(part) for part in parts] == [3, 2, 1]
        assert torch.cat([part.items for part in parts]).sort().values.tolist() == list(range(6))
        for part in parts:
            assert torch.equal(part.labels, whole.labels[part.items])
            assert torch.equal(part.images(), whole.images(part.items))
            assert torch.equal(part[0][0], whole[int(part.items[0])][0])
            assert part.image_shape == whole.image_shape
        again = data.random_split(whole, (0.5, 1 / 3, 1 / 6), torch.Generator().manual_seed(1))
        assert torch.equal(again[0].items, parts[0].items)
        assert repr(parts[2]).endswith("'train, part 3 of 3', 1 images)")
        batch, labels = next(iter(data.batches(parts[0], 2)))
        assert torch.equal(batch, whole.images(parts[0].items[:2]))
        assert torch.equal(labels, parts[0].labels[:2])
        assert len(data.random_split(parts[0], (0.4, 0.6))[1]) == 2

    @pytest.mark.parametrize(
        ("fractions", "message"),
        [
            ((0.5, 0.4), r"fractions=\(0.5, 0.4\) must be positive and sum to 1"),
            ((1.2, -0.2), "must be positive and sum to 1"),
            ((), "must be positive and sum to 1"),
            ((0.99, 0.01), "leave a part empty: use more images, or fewer parts"),
        ],
    )
    def test_bad_fractions(self, folder, fractions, message):
        with pytest.raises(ValueError, match=message):
            data.random_split(data.load_folder(folder, 28, split="."), fractions)


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"cannot read image .*a\.png \(it is no ordinary file"):
        data.load_folder(tmp_path)


def test_files_are_found_whatever_the_current_directory_is_later(tmp_path, monkeypatch):
    for number, name in enumerate(("here", "there")):
        (tmp_path / name / "pictures").mkdir(parents=True)
        grey = Image.fromarray(np.full((4, 4), 100 * number, np.uint8))
        grey.save(tmp_path / name / "pictures" / "a.png")
    monkeypatch.chdir(tmp_path / "here")
    folder = data.load_folder("pictures")
    monkeypatch.chdir(tmp_path / "there")
    assert (folder.images() == 0).all()
