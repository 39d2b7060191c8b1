"""Images that stay in their files and are decoded when they are asked for.

What Pillow would decode to something else than the file shows is refused, by the name of the file:
grey values of more than 8 bits, which it clips; transparent pixels, whose hidden colours it
uncovers; several images in one file, of which it takes the first; colours of printers (CMYK) and
other spaces. The orientation that a camera notes (EXIF) is applied.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from pyro_vae_defence.data.datasets import Images, Index
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.files import is_out_of_memory

Prepare: TypeAlias = Callable[[Image.Image], Image.Image]
"""Cuts and scales a decoded image; raises ``ValueError`` for one that does not fit."""

Fit: TypeAlias = Literal["crop", "pad", "stretch"]
"""What :func:`load_folder` does with images of other proportions."""

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""Names of files that :func:`load_folder` takes for images end so, in either case."""

_MODES = {1: "L", 3: "RGB"}
_GREY_MODES = ("1", "L", "LA")
_KNOWN_MODES = (*_GREY_MODES, "P", "PA", "RGB", "RGBA")


class ImageFiles(Images):
    """Images decoded one by one from their files, float32 in [0, 1].

    Args:
        paths: one file per image; the same files whatever directory is the current one later.
        labels, name, split, class_names: see :class:`~pyro_vae_defence.data.datasets.Images`.
        image_shape: ``(C, H, W)`` with 1 or 3 channels.
        prepare: cuts and scales a decoded image to ``H`` by ``W``.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        labels: Tensor,
        name: str,
        split: str,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        prepare: Prepare,
    ) -> None:
        if labels.shape[:1] != (len(paths),):
            raise ValueError(f"{len(paths)} images but labels of shape {tuple(labels.shape)}")
        if image_shape[0] not in _MODES:
            raise ValueError(
                f"channels must be 1 (grey) or 3 (colour), got {image_shape[0]}; "
                "others can be made by a transform"
            )
        super().__init__(labels, name, split, class_names)
        self.paths = tuple(os.path.abspath(path) for path in paths)
        self.image_shape, self._prepare = image_shape, prepare

    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``, as large as that may be).

        Raises:
            ValueError: naming the file, if one is missing, truncated, no image, or unfit.
        """
        items = self._items(index)
        pixels = torch.empty(items.numel(), *self.image_shape, dtype=torch.uint8, device="cpu")
        for row, item in zip(pixels, items.flatten().tolist()):
            row.copy_(self._read(self.paths[item]))
        return pixels.float().div_(255).reshape((*items.shape, *self.image_shape))

    def _read(self, path: str) -> Tensor:
        channels, height, width = self.image_shape
        with _opened(path) as file:
            if file.has_transparency_data and np.array(file.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError("it has transparent pixels: save it without, on a background")
            upright = ImageOps.exif_transpose(file)
            image = self._prepare(upright.convert(_MODES[channels]))
        return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The file's image, not decoded yet; whatever is wrong with it is raised with its name."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("it is no ordinary file")
        # By its name Pillow would map an uncompressed TIFF into memory, wrongly if it is turned.
        with open(path, "rb") as stream, Image.open(stream) as file:
            if file.mode not in _KNOWN_MODES:
                raise ValueError(
                    f"its pixels are {file.mode!r} to Pillow, known are {', '.join(_KNOWN_MODES)}: "
                    "save it with 8 bits per channel, grey or RGB"
                )
            # Cameras put previews behind the picture of an "MPO", which is a JPEG otherwise.
            if (count := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":
                raise ValueError(f"it holds {count} images: save each in a file of its own")
            yield file
    except UserWarning:  # of what is cut off, where warnings are errors
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        if is_out_of_memory(error):
            raise
        message = f"cannot read image {path} ({error}); restore or remove the file"
        raise ValueError(message) from error


def _is_grey(file: Image.Image) -> bool:
    """Whether the file stores shades of grey, not what its pixels happen to look like."""
    if file.mode != "P":
        return file.mode in _GREY_MODES
    palette = np.array(file.getpalette("RGB")).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def _common_shape(
    paths: Sequence[Path], size: tuple[int, int] | None, channels: int | None
) -> tuple[int, int, int]:
    """``(C, H, W)`` from the heads of the files, where it is not given; ``ValueError`` if mixed."""
    first_of: dict[tuple[int, ...], Path] = {}
    for path in paths:
        with _opened(str(path)) as file:
            found_channels = channels or (1 if _is_grey(file) else 3)
            wide, high = file.size
            exif = file.getexif()
            if file.format == "TIFF":  # some versions of Pillow have turned its size by now
                wide, high = exif[ExifTags.Base.ImageWidth], exif[ExifTags.Base.ImageLength]
            if exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # turned by a quarter
                wide, high = high, wide
        first_of.setdefault((found_channels, *(size or (high, wide))), path)
    if len(first_of) > 1:
        (one, file_of_one), (other, file_of_other), *_ = first_of.items()
        mend = []
        if one[0] != other[0]:
            mend.append("channels=1 (grey) or channels=3 (colour)")
        if one[1:] != other[1:]:
            mend.append("image_size=")
        raise ValueError(
            f"images differ: {file_of_one} has (C, H, W) = {one}, {file_of_other} has {other}; "
            f"pass {' and '.join(mend)} to make them alike"
        )
    channels, high, wide = next(iter(first_of))
    return channels, high, wide


def _files_of(folder: Path) -> list[Path]:
    """Images below a folder, relative to it and in the order of their paths; links are followed."""
    found: list[Path] = []

    def look(inside: Path, above: tuple[str, ...]) -> None:
        place = os.path.realpath(folder / inside)
        if place in above:
            raise ValueError(f"{folder / inside} is a link to a folder that holds it; remove it")
        try:
            entries = sorted(os.listdir(place))
        except OSError as error:
            raise ValueError(f"cannot read folder {folder / inside} ({error})") from error
        for name in entries:
            path = inside / name
            if name.startswith("."):
                continue
            if (folder / path).is_dir():
                look(path, (*above, place))
            elif path.suffix.lower() in SUFFIXES:
                found.append(path)

    look(Path(), ())
    return sorted(found)


def _classes_of(files: Sequence[Path]) -> set[str]:
    """The folders of the first level, if all images lie in such."""
    nested = all(len(file.parts) > 1 for file in files)
    return {file.parts[0] for file in files} if nested else set()


@dataclass
class _Fitted:
    """Scales an image to ``height`` and ``width`` as :func:`load_folder` says of ``fit``."""

    height: int
    width: int
    fit: Fit | None

    def __call__(self, image: Image.Image) -> Image.Image:
        """The scaled image; warns of the first that loses more than a pixel, if ``fit`` is open.

        A copy in another process warns of its own first.
        """
        height, width = self.height, self.width
        if self.fit == "stretch":
            return image.resize((width, height), Image.Resampling.BILINEAR)
        bound = min if self.fit == "pad" else max
        scale = bound(height / image.height, width / image.width)
        wide, high = (max(1, round(side * scale)) for side in image.size)
        if self.fit != "pad":
            wide, high = max(width, wide), max(height, high)
        if self.fit is None and max(wide - width, high - height) > 1:
            self.fit = "crop"  # said once in this process
            warnings.warn(
                f"an image of {image.width}x{image.height} pixels (width x height) loses "
                f"{1 - width * height / (wide * high):.0%} of its area at its sides to become "
                f'{width}x{height}, and others may; pass fit="pad" or fit="stretch" to keep all of '
                'it, or fit="crop" if its centre is what matters',
                UserWarning,
                stacklevel=2,
            )
        left, top = (wide - width) // 2, (high - height) // 2
        resized = image.resize((wide, high), Image.Resampling.BILINEAR)
        return resized.crop((left, top, left + width, top + height))  # black beyond the borders


def load_folder(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    split: str | None = None,
    fit: Fit | None = None,
) -> ImageFiles:
    """The images of a folder and its subfolders, in the order of their paths.

    They are decoded when asked for. Where a size is given, each is scaled to it (bilinear, with
    antialiasing) as ``fit`` says. Where all images lie in subfolders, the first level of these
    names the classes; otherwise every label is 0, and a warning says so if there are subfolders
    with images, too. Another one says if none of the classes holds an image itself, as ``train``
    and ``test`` above ``cat`` and ``dog`` do not. Links are followed, and what is hidden (names
    that start with a dot) is left out.

    Args:
        path: the folder.
        image_size: height and width, or one number for both; that of the files when ``None``, which
            must then be the same for all.
        channels: 1 for grey, 3 for colour: images are converted. When ``None``, files that store
            shades of grey stay grey, of one channel, and colour stays colour; a folder with both is
            refused. Grey pictures that are stored as colour, as many JPEGs are, are colour here.
        split: read the subfolder of this name only, e.g. ``"train"`` or ``"images/train"``; all
            when ``None``. Its classes are those of it and the folders beside it together, so that a
            label means the same in each, also where one of them has no image of some class. Where
            images of the split lie in it directly, every label is 0 and the only class has the name
            of ``path``, whatever classes the folders beside it have. ``"."`` is all, without the
            warnings about folders.
            :func:`~pyro_vae_defence.data.random_split` divides a folder that has no such parts.
        fit: what becomes of images of other proportions than ``image_size``. ``"crop"`` scales
            until they just cover the target and keeps its centre, ``"pad"`` until they fit in and
            surrounds them with black, ``"stretch"`` scales sides apart. ``None`` is ``"crop"`` with
            a warning, at the first image that loses more than a pixel, of the share that is cut. It
            comes once in each process that decodes: each worker of a ``DataLoader`` gives its own.

    Without ``image_size`` or ``channels`` every file is opened once at the beginning.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it holds no image, or a link to itself; if a folder cannot be read; if a size
            or number of channels is out of range; or, naming the file, if an image is one of those
            that the module's text refuses. What needs pixels to be noticed is raised when the image
            is asked for.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in "abc":
        ...         Image.new("L", (40, 40)).save(f"{folder}/{name}.png")
        ...     load_folder(folder, image_size=32).image_shape
        (1, 32, 32)
    """
    folder = Path(path) if split is None else Path(path) / split
    if not folder.is_dir():
        raise FileNotFoundError(f"path={str(folder)!r} is no folder: pass one that holds images")
    size = None if image_size is None else _size(image_size)
    if fit not in (None, *get_args(Fit)):
        raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, got {fit!r}")
    files = _files_of(folder)
    if not files:
        raise ValueError(
            f"path={str(folder)!r} holds no image; names must end in {', '.join(sorted(SUFFIXES))}"
        )
    name = Path(path).resolve().name
    classes = _classes_of(files)
    if split is None and all(len(file.parts) > 2 for file in files):
        warnings.warn(
            f"the classes of path={str(folder)!r} are {', '.join(sorted(classes))}, which hold no "
            f"image but folders of images, as {files[0].parent}: pass split= with the one to read, "
            'or the path of a folder below, or split="." if classes are meant',
            UserWarning,
            stacklevel=2,
        )
    nested = [file for file in files if len(file.parts) > 1]
    if split is None and nested and not classes:
        (beside, *_), inside = [file for file in files if len(file.parts) == 1], nested[0]
        warnings.warn(
            f"{beside} lies in path={str(folder)!r} itself, beside folders of images such as "
            f"{inside.parts[0]}, so that these are no classes and every label is 0: take it away "
            'if they are, or pass split="." if not',
            UserWarning,
            stacklevel=2,
        )
    if classes and folder != Path(path):
        for other in folder.parent.iterdir():
            if other.is_dir() and other != folder and not other.name.startswith("."):
                classes |= _classes_of(_files_of(other))
    names = sorted(classes) or [name]
    numbers = [names.index(file.parts[0]) if classes else 0 for file in files]
    labels = torch.tensor(numbers, device="cpu")
    paths = [folder / file for file in files]
    if size is None or channels is None:
        channels, height, width = _common_shape(paths, size, channels)
    else:
        height, width = size
    shape = (channels, height, width)
    fitted = _Fitted(height, width, fit)
    return ImageFiles(paths, labels, name, split or "all", names, shape, fitted)


def _size(image_size: Any) -> tuple[int, int]:
    """Height and width of one number or of both."""
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(
            f"image_size={image_size!r} must be one number, or height and width; the number of "
            "channels is channels="
        )
    for side in sides:
        check_integer("image_size", side)
    return int(sides[0]), int(sides[1])
