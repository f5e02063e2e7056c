"""Images of one split from npz files, folders and parquet, and from images to batches of pixels.

Greys become three channels, frames are resized by the antialiased bicubic kernel that Pillow has, and normalised last, so that the
resized frames can be kept as bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from thetau.errors import DataError, nearest
from thetau.models.encoder import ImageForm
from thetau.tasks.inputs import label_tensor
from thetau.tasks.rows import SPLITS, drawn

CROPS = ("none", "center")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
_FOLDERS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_DEEP = ("I", "F")  # first letters of PIL's modes with more than 8 bits a channel
_SHOWN = 5


@final
@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """The bytes of an image file; `where` names them in errors."""

    content: bytes
    where: str


@final
@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """The examples of one split, in file order. Labels index the task's `labels`.

    - `images`: uint8 arrays `[height, width]` or `[height, width, 3]`; paths and `EncodedImage`s are read when they are needed.
    """

    images: Sequence[Any]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"a split must have one label an image. Got {len(self.images)} images and {len(self.labels)} labels.")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> ImageSplit:
        """Some of the examples, in the order given."""
        return ImageSplit(images=tuple(self.images[i] for i in indices), labels=tuple(self.labels[i] for i in indices))

    def limited(self, limit: int | None) -> ImageSplit:
        """At most `limit` examples, drawn without regard to their order in the file and always the same ones."""
        return self if limit is None or limit >= len(self) else self.take(drawn(len(self), limit))

    def hash(self) -> str:
        """A hexadecimal digest of pixels and labels in their order; the kind of file does not count."""
        digest = hashlib.blake2b(json.dumps(self.labels).encode(), digest_size=16)
        for image in self.images:
            pixels = pixels_of(image)
            digest.update(f"{pixels.shape}".encode())
            digest.update(np.ascontiguousarray(pixels).data)
        return digest.hexdigest()


def pixels_of(image: Any) -> NDArray[np.uint8]:
    """A uint8 array `[height, width]` or `[height, width, 3]`, from an array, a path or an `EncodedImage`.

    Files are turned upright as their EXIF says; transparency is dropped. Raises `DataError` naming the file.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not _is_frame(image.shape):
            raise DataError(
                f"an image must be uint8 of shape [height, width] or [height, width, 3]. Got {image.dtype} of shape {list(image.shape)}."
            )
        return image
    pil = needed("PIL.Image", "reading image files", "pillow")
    operations = needed("PIL.ImageOps", "reading image files", "pillow")
    where, file = (image.where, io.BytesIO(image.content)) if isinstance(image, EncodedImage) else (str(image), image)
    try:
        with pil.open(file) as opened:
            if opened.mode.startswith(_DEEP):
                raise DataError(f"{where}: an image must have 8 bits a channel. Got PIL's mode {opened.mode}; convert it.")
            upright = operations.exif_transpose(opened)
            return np.array(upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot be read as an image ({error}). Replace or drop the file.") from error


def needed(module: str, purpose: str, package: str) -> Any:
    """An optional dependency's module. Raises `DataError` saying what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(f"{purpose} needs {package}. Install it: pip install {package}") from error


def _is_frame(shape: Sequence[int]) -> bool:
    return min(shape, default=0) > 0 and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3))


# The formats.


def read_npz(path: Path, split: str, labels: tuple[str, ...]) -> ImageSplit:
    """The arrays `<split>_images`, uint8 `[example, height, width]` or `[…, 3]`, and `<split>_labels`. Raises `DataError`."""
    names = [f"{_known(split)}_images", f"{split}_labels"]
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # np.load leaves a broken file open
            if missing := [name for name in names if name not in file]:
                there = ", ".join(file) or "none"
                raise DataError(
                    f"{path}: split {split!r} needs the arrays {' and '.join(names)}. {missing[0]} is not among {there}."
                )
            images, numbers = (file[name] for name in names)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as an npz file of plain arrays ({error}).") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (len(images) and not _is_frame(images.shape[1:])):
        raise DataError(
            f"{path}: {names[0]} must be uint8 of shape [example, height, width] or [example, height, width, 3]. "
            f"Got {images.dtype} of shape {list(images.shape)}; convert it."
        )
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise DataError(
            f"{path}: {names[1]} must be one integer an image. Got {numbers.dtype} of shape {list(numbers.shape)}; convert it."
        )
    if len(images) != len(numbers):
        raise DataError(f"{path}: {names[0]} and {names[1]} must be equally long. Got {len(images)} and {len(numbers)}.")
    return ImageSplit(images=tuple(images), labels=_checked(path, numbers.tolist(), labels))


def read_image_folder(root: Path, split: str, labels: tuple[str, ...]) -> ImageSplit:
    """The files `root/<split>/<class>/*.png` (jpg, jpeg, bmp, webp, ppm), class after class; `val` may stand for `validation`.

    Every class must have a folder, perhaps an empty one. Files whose names begin with a dot are not read, any other file that is
    no image is an error. Raises `DataError`.
    """
    choices = _FOLDERS[_known(split)]
    found = [root / name for name in choices if (root / name).is_dir()]
    if len(found) != 1:
        got = " and ".join(folder.name for folder in found) or "neither" if len(choices) > 1 else "none"
        raise DataError(f"{root}: split {split!r} must be one folder, {' or '.join(choices)}. Got {got}.")
    folder = found[0]
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if stray := [path for path in entries if not path.is_dir()]:
        raise DataError(f"{stray[0]}: a split's folder must hold one folder a class and no files. Move or delete the file.")
    names = [path.name for path in entries]
    if unknown := [name for name in names if name not in labels]:
        raise DataError(
            f"{folder / unknown[0]}: a class folder must be one of the task's labels. Got {unknown[0]!r}.{nearest(unknown[0], labels)}"
        )
    if absent := [label for label in labels if label not in names]:
        raise DataError(
            f"{folder}: every class must have a folder. There is none for {absent[0]!r}; make an empty one if the split has no such image."
        )
    files = [
        (path, number)
        for number, label in enumerate(labels)
        for path in sorted((folder / label).iterdir())
        if path.name[0] != "."
    ]
    if others := [path for path, _ in files if path.suffix.lower() not in _SUFFIXES or not path.is_file()]:
        raise DataError(f"{others[0]}: a class folder must hold images only ({', '.join(_SUFFIXES)}). Move or delete it.")
    return ImageSplit(images=tuple(path for path, _ in files), labels=_checked(folder, [number for _, number in files], labels))


def read_image_parquet(path: Path, labels: tuple[str, ...]) -> ImageSplit:
    """A parquet file with a column `image`, `{bytes, path}` as Hugging Face writes it or binary, and an integer column `label`.

    Where the file names its classes, they must be `labels` in that order. Raises `DataError`.
    """
    parquet = needed("pyarrow.parquet", "reading parquet files", "pyarrow")
    try:
        names = list(parquet.read_schema(path).names)
        if missing := [name for name in ("image", "label") if name not in names]:
            raise DataError(
                f"{path}: must have the columns image and label. {missing[0]} is not among {', '.join(names) or 'none'}."
            )
        table = parquet.read_table(path, columns=["image", "label"])
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path}: cannot be read as parquet ({error}).") from error
    own = _class_names(table.schema.metadata or {})
    if own is not None and own != labels:
        raise DataError(
            f"{path}: the classes that the file names must be the task's labels, in their order. "
            f"Got {_some(own)} for {_some(labels)}; correct the labels of the task."
        )
    return images_of(table.column("image").to_pylist(), table.column("label").to_pylist(), labels, str(path))


def images_of(values: Sequence[Any], numbers: Sequence[Any], labels: tuple[str, ...], where: str) -> ImageSplit:
    """The images of a table's cells: bytes, or `{bytes, path}`. Raises `DataError` for a path that is not there, and bad labels."""
    images: list[Any] = []
    for row, value in enumerate(values):
        content = value.get("bytes") if isinstance(value, dict) else value
        path = value.get("path") if isinstance(value, dict) else None
        if isinstance(content, bytes) and content:
            images.append(EncodedImage(content=content, where=f"{where}: row {row}"))
        elif path and Path(path).is_file():
            images.append(Path(path))
        else:
            got = f"only the path {path!r}" if path else type(content).__name__
            raise DataError(f"{where}: row {row}: `image` must hold the bytes of an image file. Got {got}; embed the file.")
    return ImageSplit(images=tuple(images), labels=_checked(where, numbers, labels))


def _class_names(metadata: Mapping[bytes, bytes]) -> tuple[str, ...] | None:
    """The names in the metadata of the datasets library, where there are any."""
    try:
        found = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, found)) if isinstance(found, list) else None


def _known(split: str) -> str:
    if split not in SPLITS:
        raise DataError(f"a split must be one of {', '.join(SPLITS)}. Got {split!r}.")
    return split


def _checked(path: Path | str, numbers: Sequence[Any], labels: tuple[str, ...]) -> tuple[int, ...]:
    """`numbers` when there are any and all of them index `labels`."""
    if not numbers:
        raise DataError(f"{path}: a split must hold at least one example. Got none; put images in it.")
    wrong = [
        f"example {row}: {number!r}"
        for row, number in enumerate(numbers)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(labels)
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(
            f"{path}: a label must be an integer in 0..{len(labels) - 1}, the task has {len(labels)} classes. "
            f"Got {', '.join(wrong[:_SHOWN])}{more}; correct it or add the class to the task's labels."
        )
    return tuple(numbers)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


# From images to pixels.


@final
@dataclass(frozen=True, kw_only=True)
class Pixels:
    """A split as square images of `size` pixels a side, resized once and kept as bytes; the counterpart of `Tokens`.

    - `crop`: `none` squeezes the whole frame into the square; `center` resizes the shorter side and cuts the middle, as CLIP does.
    - `mean`, `std`: of each channel, with pixels in [0, 1].
    """

    images: Sequence[Any]
    labels: tuple[int, ...]
    size: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: str = "none"

    def __post_init__(self) -> None:
        if self.size < 1 or self.patch < 1 or self.size % self.patch:
            raise DataError(
                f"`Pixels(size=...)` must be a multiple of the model's patch of {self.patch} pixels. Got {self.size}."
            )
        if self.crop not in CROPS:
            raise DataError(f"`Pixels(crop=...)` must be one of {', '.join(CROPS)}. Got {self.crop!r}.")
        if not min(self.std) > 0:
            raise DataError(f"`Pixels(std=...)` must be above 0 in every channel. Got {self.std}.")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def frames(self) -> UInt8[Tensor, "example channel size size"]:
        """The resized images; one channel when all of them are grey, else three."""
        frames = [_frame(pixels_of(image), self.size, self.crop) for image in self.images]
        channels = max(frame.shape[0] for frame in frames)
        return torch.stack([frame.expand(channels, -1, -1) for frame in frames])

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of patches of each example, the same for all."""
        return ((self.size // self.patch) ** 2,) * len(self)

    @property
    def truncated(self) -> int:
        """No image is cut for its length."""
        return 0

    @cached_property
    def hash(self) -> str:
        """A hexadecimal digest of pixels and labels: all that a model sees."""
        return hashlib.blake2b(json.dumps([self.unlabelled, self.labels]).encode(), digest_size=16).hexdigest()

    @cached_property
    def unlabelled(self) -> str:
        """A digest of the pixels alone."""
        digest = hashlib.blake2b(json.dumps([tuple(self.frames.shape), self.mean, self.std]).encode(), digest_size=16)
        digest.update(self.frames.numpy().data)
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> dict[str, Float[Tensor, "example 3 size size"]]:
        """The normalised pixels of some examples, float32."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return {"pixel_values": (self.frames[list(indices)].float() / 255 - mean) / std}

    def targets(self, indices: Sequence[int]) -> Tensor:
        """The labels of some examples."""
        return label_tensor([self.labels[i] for i in indices])


def preprocess(form: ImageForm, split: ImageSplit, size: int | None = None, crop: str = "none") -> Pixels:
    """A split as a model of this form sees it, at the model's own size unless another is given.

    Raises `DataError` for a size that the model does not take.
    """
    if form.fixed and size not in (None, form.size):
        raise DataError(f"this model reads images of {form.size} pixels a side only. Got the size {size}.")
    return Pixels(
        images=split.images,
        labels=split.labels,
        size=form.size if size is None else size,
        patch=form.patch,
        mean=form.mean,
        std=form.std,
        crop=crop,
    )


def _frame(pixels: NDArray[np.uint8], size: int, crop: str) -> UInt8[Tensor, "channel size size"]:
    image = torch.from_numpy(np.array(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)))
    height, width = image.shape[1:]
    if crop == "none":
        shape = (size, size)
    else:
        short = min(height, width)
        shape = (size * height // short, size * width // short)
    if shape != (height, width):
        image = torch.nn.functional.interpolate(image[None], shape, mode="bicubic", antialias=True)[0]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return image[:, top : top + size, left : left + size].contiguous()
