"""Image splits, pixels, image encoders, and heads made from features."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from thetau.errors import AlignmentError, CheckpointError, DataError
from thetau.models import Encoder
from thetau.models.clip_text import clip_text_features, load_clip_text
from thetau.models.encoder import ImageForm
from thetau.models.linear import LinearModel
from thetau.models.vision import (
    CLIP,
    HALF,
    IMAGENET,
    VisionEncoder,
    load_vision_encoder,
)
from thetau.tasks import Split
from thetau.tasks.head import AnyHead
from thetau.tasks.images import (
    EncodedImage,
    ImageSplit,
    Pixels,
    pixels_of,
    preprocess,
    read_image_folder,
    read_image_parquet,
    read_npz,
)
from thetau.tasks.probe import LinearHead, class_means_head, linear_probe_head
from tiny import one_thread as one_thread
from tiny_vision import frame, made, saved, write_npz

transformers = pytest.importorskip("transformers")
PIL = pytest.importorskip("PIL.Image")

LABELS = ("cat", "dog", "bird")
Array = np.ndarray[Any, Any]


def file_of(image: Array, kind: str = "png") -> bytes:
    content = io.BytesIO()
    PIL.fromarray(image).save(content, kind)
    return content.getvalue()


def pixels(images: Sequence[Any], **fields: Any) -> Pixels:
    given = {"size": 28, "patch": 14, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **fields}
    return Pixels(images=images, labels=(0,) * len(images), **given)


# Splits


def test_a_limit_draws_the_same_examples_as_for_texts() -> None:
    images = tuple(frame(4, 4, seed=i) for i in range(20))
    drawn = ImageSplit(images=images, labels=tuple(range(20))).limited(6)
    assert drawn.labels == Split(texts=("a",) * 20, texts2=None, labels=tuple(range(20))).limited(6).labels
    assert all(image is images[label] for image, label in zip(drawn.images, drawn.labels, strict=True))
    assert drawn.limited(None) is drawn.limited(6) is drawn
    with pytest.raises(DataError, match=r"number of examples must be at least 1\. Got 0"):
        drawn.limited(0)


def test_the_hash_is_of_pixels_and_labels_not_of_files(tmp_path: Path) -> None:
    image = frame(5, 4, 3)
    (tmp_path / "a.png").write_bytes(file_of(image))
    split = ImageSplit(images=(image,), labels=(1,))
    assert len(split) == 1
    assert split.hash() == ImageSplit(images=(tmp_path / "a.png",), labels=(1,)).hash()
    assert split.hash() == ImageSplit(images=(EncodedImage(content=file_of(image, "bmp"), where="here"),), labels=(1,)).hash()
    others = [ImageSplit(images=(image,), labels=(0,)), ImageSplit(images=(image[::-1],), labels=(1,))]
    assert split.hash() not in [other.hash() for other in others]
    assert (
        ImageSplit(images=(frame(2, 8),), labels=(0,)).hash()
        != ImageSplit(images=(frame(2, 8).reshape(4, 4),), labels=(0,)).hash()
    )


def test_images_and_labels_must_be_equally_many() -> None:
    with pytest.raises(DataError, match=r"one label an image\. Got 1 images and 2 labels"):
        ImageSplit(images=(frame(2, 2),), labels=(0, 1))


# npz


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 3)])
def test_npz_is_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    split = read_npz(write_npz(tmp_path / "a.npz", train_images=frame(*shape)), "train", LABELS)
    assert split.labels == (0, 1, 2, 0, 1, 2)
    assert np.array_equal(np.stack(split.images), frame(*shape))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_images": None}, r"needs the arrays train_images and train_labels\. train_images is not among train_labels"),
        ({"train_labels": None}, r"train_labels is not among train_images"),
        (
            {"train_images": frame(6, 5, 4).astype(np.float32)},
            r"train_images must be uint8 of shape .* Got float32 of shape \[6, 5, 4\]",
        ),
        ({"train_images": frame(6, 5)}, r"must be uint8 of shape .* Got uint8 of shape \[6, 5\]"),
        ({"train_images": frame(6, 5, 4, 2)}, r"Got uint8 of shape \[6, 5, 4, 2\]"),
        ({"train_images": frame(6, 0, 4)}, r"Got uint8 of shape \[6, 0, 4\]"),
        ({"train_labels": np.zeros(6)}, r"train_labels must be one integer an image\. Got float64 of shape \[6\]"),
        ({"train_labels": np.zeros((6, 1), int)}, r"train_labels must be one integer an image\. Got int64 of shape \[6, 1\]"),
        ({"train_labels": np.zeros(5, int)}, r"must be equally long\. Got 6 and 5"),
        (
            {"train_labels": np.array([0, 1, 3, 0, -1, 2])},
            r"in 0\.\.2, the task has 3 classes\. Got example 2: 3, example 4: -1; correct",
        ),
        ({"train_labels": np.full(6, 9)}, r"example 4: 9 and 1 more"),
        ({"train_images": frame(0, 5, 4), "train_labels": np.zeros(0, int)}, r"must hold at least one example\. Got none"),
        ({"train_labels": np.array([None] * 6)}, r"cannot be read as an npz file of plain arrays"),
    ],
)
def test_a_bad_npz_is_named_with_file_and_rule(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = write_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        read_npz(path, "train", LABELS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as an npz file"):
        read_npz(tmp_path / "a.npz", "train", LABELS)
    with pytest.raises(DataError, match=r"b\.npz: cannot be read as an npz file"):
        read_npz(tmp_path / "b.npz", "train", LABELS)


def test_one_plain_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", frame(6, 5, 4))
    with pytest.raises(DataError, match=r"a\.npy: cannot be read as an npz file"):
        read_npz(tmp_path / "a.npy", "train", LABELS)


def test_a_split_has_one_of_three_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one of train, validation, test\. Got 'val'"):
        read_npz(write_npz(tmp_path / "a.npz"), "val", LABELS)


# Folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val", "test"):
        for number, label in enumerate(LABELS):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            (folder / "b.png").write_bytes(file_of(frame(6, 8, 3, seed=number)))
            (folder / "a.JPG").write_bytes(file_of(frame(6, 8, seed=number), "jpeg"))
            (folder / ".hidden").write_bytes(b"")
    return tmp_path / "data"


def test_a_folder_is_read_class_after_class_and_lazily(root: Path) -> None:
    split = read_image_folder(root, "train", ("dog", "bird", "cat"))
    assert split.labels == (0, 0, 1, 1, 2, 2)
    assert split.images[:2] == (root / "train/dog/a.JPG", root / "train/dog/b.png")
    assert pixels_of(split.images[0]).shape == (6, 8)
    assert np.array_equal(pixels_of(split.images[1]), frame(6, 8, 3, seed=1))


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "ppm"])
def test_other_kinds_of_files(root: Path, kind: str) -> None:
    PIL.fromarray(frame(6, 8, 3)).save(root / f"test/cat/c.{kind}", **({"lossless": True} if kind == "webp" else {}))
    assert np.array_equal(pixels_of(read_image_folder(root, "test", LABELS).images[2]), frame(6, 8, 3))


def test_val_may_stand_for_validation_but_not_beside_it(root: Path) -> None:
    assert len(read_image_folder(root, "validation", LABELS)) == 6
    (root / "validation").mkdir()
    with pytest.raises(DataError, match=r"split 'validation' must be one folder, validation or val\. Got validation and val"):
        read_image_folder(root, "validation", LABELS)
    with pytest.raises(DataError, match=r"split 'validation' must be one folder, validation or val\. Got neither"):
        read_image_folder(root / "train", "validation", LABELS)
    with pytest.raises(DataError, match=r"split 'test' must be one folder, test\. Got none"):
        read_image_folder(root / "train", "test", LABELS)


def test_class_folders_are_the_labels(root: Path) -> None:
    with pytest.raises(
        DataError, match=r"train/bird: a class folder must be one of the task's labels\. Got 'bird'\. Did you mean 'birds'"
    ):
        read_image_folder(root, "train", ("cat", "dog", "birds"))
    with pytest.raises(DataError, match=r"train: every class must have a folder\. There is none for 'fish'; make an empty one"):
        read_image_folder(root, "train", (*LABELS, "fish"))
    (root / "train/fish").mkdir()
    assert len(read_image_folder(root, "train", (*LABELS, "fish"))) == 6


def test_stray_files_are_not_passed_over(root: Path) -> None:
    (root / "train/cat/notes.txt").write_text("")
    with pytest.raises(DataError, match=r"notes\.txt: a class folder must hold images only"):
        read_image_folder(root, "train", LABELS)
    (root / "test/image.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"image\.png: a split's folder must hold one folder a class and no files"):
        read_image_folder(root, "test", LABELS)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    for label in LABELS:
        (tmp_path / "train" / label).mkdir(parents=True)
    with pytest.raises(DataError, match=r"train: a split must hold at least one example\. Got none"):
        read_image_folder(tmp_path, "train", LABELS)


# Single images


def test_a_broken_file_is_named(root: Path) -> None:
    path = root / "train/cat/b.png"
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cat/b\.png: cannot be read as an image .* Replace or drop the file"):
            preprocess(SQUARE, read_image_folder(root, "train", LABELS)).batch([0])


def test_palettes_and_transparency_become_colours_and_greys(tmp_path: Path) -> None:
    red = PIL.new("RGBA", (3, 2), (255, 0, 0, 0))
    for name, image in {"a": red, "p": red.convert("RGB").convert("P"), "la": PIL.new("LA", (3, 2), (9, 0))}.items():
        image.save(tmp_path / f"{name}.png")
    assert np.array_equal(pixels_of(tmp_path / "a.png"), np.broadcast_to(np.array([255, 0, 0], np.uint8), (2, 3, 3)))
    assert pixels_of(tmp_path / "p.png").shape == (2, 3, 3)
    assert np.array_equal(pixels_of(tmp_path / "la.png"), np.full((2, 3), 9))


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = PIL.Exif()
    exif[0x0112] = 6
    PIL.fromarray(frame(4, 6, 3)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels_of(tmp_path / "a.png"), np.rot90(frame(4, 6, 3), -1))


def test_images_are_of_bytes(tmp_path: Path) -> None:
    PIL.fromarray(frame(4, 6).astype(np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: an image must have 8 bits a channel\. Got PIL's mode I;16; convert it"):
        pixels_of(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"an image must be uint8 of shape .* Got float64 of shape \[2, 2\]"):
        pixels_of(np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"Got uint8 of shape \[2, 2, 4\]"):
        pixels_of(frame(2, 2, 4))


# Parquet


def write_parquet(path: Path, images: Any = None, labels: Any = None, names: Sequence[str] | None = None) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="the tests' own set-up may leave pyarrow out")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": file_of(frame(6, 8, 3, seed=i)), "path": f"{i}.png"} for i in range(3)] if images is None else images
    table = arrow.table({"image": rows, "label": [0, 2, 1] if labels is None else labels})
    if names is not None:
        content = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(content)})
    parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("binary", [False, True])
def test_parquet_is_read(tmp_path: Path, binary: bool) -> None:
    images = [file_of(frame(6, 8, 3, seed=i)) for i in range(3)] if binary else None
    split = read_image_parquet(write_parquet(tmp_path / "a.parquet", images, names=LABELS), LABELS)
    assert split.labels == (0, 2, 1)
    assert all(np.array_equal(pixels_of(image), frame(6, 8, 3, seed=i)) for i, image in enumerate(split.images))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": [0, 1, 3]}, r"in 0\.\.2, the task has 3 classes\. Got example 2: 3"),
        ({"labels": [0, None, 1]}, r"a label must be an integer in 0\.\.2.* Got example 1: None"),
        ({"labels": ["cat", "dog", "cat"]}, r"a label must be an integer .* Got example 0: 'cat'"),
        ({"names": ("dog", "cat", "bird")}, r"must be the task's labels, in their order\. Got dog, cat, bird for cat, dog, bird"),
        (
            {"images": [{"bytes": None, "path": f"{i}.png"} for i in range(3)]},
            r"row 0: `image` must .* Got only the path '0\.png'; embed",
        ),
        ({"images": [None, b"a", b"b"]}, r"row 0: `image` must hold the bytes of an image file\. Got NoneType"),
        ({"images": [[1]] * 3}, r"row 0: `image` must hold the bytes of an image file\. Got list"),
        ({"images": [], "labels": []}, r"must hold at least one example\. Got none"),
    ],
)
def test_a_bad_parquet_is_named_with_file_and_rule(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"a\.parquet: .*" + message):
        read_image_parquet(write_parquet(tmp_path / "a.parquet", **fields), LABELS)


def test_a_broken_image_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    split = read_image_parquet(write_parquet(tmp_path / "a.parquet", [file_of(frame(2, 2)), b"no", b"no"]), LABELS)
    with pytest.raises(DataError, match=r"a\.parquet: row 1: cannot be read as an image"):
        split.hash()


def test_files_that_are_no_such_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"no")
    for name in ("a", "b"):
        with pytest.raises(DataError, match=rf"{name}\.parquet: cannot be read as parquet"):
            read_image_parquet(tmp_path / f"{name}.parquet", LABELS)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"img": [b"a"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: must have the columns image and label\. image is not among img, label"):
        read_image_parquet(tmp_path / "a.parquet", LABELS)


@pytest.mark.parametrize(
    ("module", "act", "message"),
    [
        (
            "pyarrow.parquet",
            lambda: read_image_parquet(Path("a"), LABELS),
            r"reading parquet files needs pyarrow\. Install it: pip install",
        ),
        ("PIL.Image", lambda: pixels_of(Path("a.png")), r"reading image files needs pillow\. Install it: pip install pillow"),
        (
            "sklearn.linear_model",
            lambda: linear_probe_head(torch.eye(2), [0, 1], 2),
            r"a linear probe needs scikit-learn\. Install it",
        ),
    ],
)
def test_what_must_be_installed(monkeypatch: pytest.MonkeyPatch, module: str, act: Any, message: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=message):
        act()


# Pixels


SQUARE = ImageForm(size=28, patch=14, mean=CLIP[0], std=CLIP[1])  # what a model of 28 pixels wants


@pytest.mark.parametrize(
    ("shape", "size"), [((40, 60, 3), 28), ((60, 41, 3), 28), ((16, 16, 3), 56), ((28, 28, 3), 28), ((97, 33, 3), 14)]
)
@pytest.mark.parametrize("crop", ["none", "center"])
def test_parity_with_the_processor_of_transformers(shape: tuple[int, ...], size: int, crop: Any) -> None:
    """One step of 255 at most, on few pixels; more on noise that is tall, which Pillow may resize height first, torch width first."""
    module = pytest.importorskip(
        "transformers.models.clip.image_processing_pil_clip", reason="transformers before 5 names it otherwise"
    )
    sides = {"height": size, "width": size}
    processor = module.CLIPImageProcessorPil(
        size={"shortest_edge": size} if crop == "center" else sides, crop_size=sides, do_center_crop=crop == "center"
    )
    expected = torch.as_tensor(np.stack(processor(frame(*shape), return_tensors="np")["pixel_values"]))
    found = pixels((frame(*shape),), size=size, crop=crop, mean=CLIP[0], std=CLIP[1]).batch([0])["pixel_values"]
    assert found.dtype == torch.float32
    assert found.shape == expected.shape == (1, 3, size, size)
    off = (found - expected).abs() * torch.tensor(CLIP[1]).view(3, 1, 1) * 255
    if shape[0] > shape[1]:
        assert off.max() < 8
        assert off.mean() < 0.4
    else:
        assert off.max() < 1.01
        assert (off > 0.01).float().mean() < 0.02


def test_greys_become_three_channels_also_beside_colours() -> None:
    grey, colour = frame(10, 12), frame(10, 12, 3)
    alone = pixels((grey,))
    assert alone.frames.shape == (1, 1, 28, 28)
    mixed = pixels((grey, colour))
    assert mixed.frames.shape == (2, 3, 28, 28)
    batch = alone.batch([0])["pixel_values"]
    assert batch.shape == (1, 3, 28, 28)
    assert torch.equal(batch, mixed.batch([1, 0])["pixel_values"][1:])
    assert torch.equal(batch, pixels((np.repeat(grey[..., None], 3, 2),)).batch([0])["pixel_values"])


def test_pixels_are_normalised_channel_by_channel() -> None:
    white = pixels((np.full((3, 5), 255, np.uint8),), mean=(0.0, 0.5, 0.75), std=(1.0, 0.5, 0.25)).batch([0])["pixel_values"]
    assert torch.equal(white, torch.ones(1, 3, 28, 28))


def test_images_are_resized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("thetau.tasks.images.pixels_of", lambda image: calls.append(1) or pixels_of(image))
    some = pixels([frame(5, 5, seed=i) for i in range(3)])
    assert torch.equal(some.batch([2])["pixel_values"], some.batch([0, 1, 2])["pixel_values"][2:])
    assert len(calls) == 3
    assert some.frames.dtype == torch.uint8


def test_pixels_have_what_tokens_have() -> None:
    split = ImageSplit(images=tuple(frame(9, 9, seed=i) for i in range(3)), labels=(0, 2, 1))
    some = preprocess(SQUARE, split, size=56, crop="center")
    assert (some.labels, len(some), some.lengths, some.truncated) == ((0, 2, 1), 3, (16, 16, 16), 0)
    again = preprocess(SQUARE, split, size=56, crop="center")
    assert (some.hash, some.unlabelled) == (again.hash, again.unlabelled)
    other = preprocess(SQUARE, ImageSplit(images=split.images, labels=(0, 1, 1)), size=56, crop="center")
    assert some.hash != other.hash
    assert some.unlabelled == other.unlabelled
    assert some.unlabelled != preprocess(SQUARE, split).unlabelled
    assert preprocess(SQUARE, split).size == 28


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 30}, r"`Pixels\(size=\.\.\.\)` must be a multiple of the model's patch of 14 pixels\. Got 30"),
        ({"size": 0}, r"must be a multiple of the model's patch of 14 pixels\. Got 0"),
        ({"crop": "middle"}, r"`Pixels\(crop=\.\.\.\)` must be one of none, center\. Got 'middle'"),
        ({"std": (1.0, 0.0, 1.0)}, r"`Pixels\(std=\.\.\.\)` must be above 0 in every channel\. Got \(1\.0, 0\.0, 1\.0\)"),
    ],
)
def test_bad_sizes_and_crops(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pixels((frame(4, 4),), **fields)


# Encoders


KINDS = ("dinov2", "vit", "vit-classifier", "clip", "clip-vision", "clip-projection")


def expected(model: Any, images: Tensor) -> Tensor:
    """The features as transformers' own calls give them."""
    told = {} if "Dinov2" in type(model).__name__ else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        match type(model).__name__:
            case "CLIPModel":
                features = model.visual_projection(model.vision_model(images, **told).pooler_output)
            case "CLIPVisionModel":
                features = model(images, **told).pooler_output
            case "CLIPVisionModelWithProjection":
                features = model(images, **told).image_embeds
            case "ViTForImageClassification":
                features = model.vit(images, **told).last_hidden_state[:, 0]
            case _:
                features = model(images, **told).last_hidden_state[:, 0]
    return torch.nn.functional.normalize(features, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [28, 56])
def test_features_are_those_of_transformers(tmp_path: Path, kind: str, size: int) -> None:
    model = made(kind)
    encoder = load_vision_encoder(saved(tmp_path / "m", model), size)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = encoder.module(images)
    torch.testing.assert_close(found, expected(model, images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))
    assert encoder.image is not None
    assert (encoder.image.size, encoder.image.patch, encoder.max_length, encoder.tokenizer) == (size, 14, (size // 14) ** 2, None)
    assert not encoder.module.training


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_back_under_the_names_of_the_file(tmp_path: Path, kind: str) -> None:
    encoder = load_vision_encoder(saved(tmp_path / "m", made(kind)))
    stored = load_file(tmp_path / "m/model.safetensors")
    found = encoder.weights()
    assert sorted(found) == sorted(stored)
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert set(encoder.carried) == {
        name for name in stored if name.startswith(("text_", "logit_scale", "classifier", "pooler")) and kind != "clip-projection"
    }
    named = dict(encoder.module.named_parameters())
    assert {name: tensor.shape for name, tensor in encoder.parameters(stored).items()} == {n: p.shape for n, p in named.items()}


def test_half_precision_runs_in_float32_and_goes_back_as_it_was(tmp_path: Path) -> None:
    model = made("dinov2")
    encoder = load_vision_encoder(saved(tmp_path / "m", model, torch.float16))  # `model` now holds the rounded weights
    stored = load_file(tmp_path / "m/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.float32}
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(images), expected(model, images), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in encoder.weights().items())
    assert {tensor.dtype for tensor in encoder.weights(exact=True).values()} == {torch.float32}


def test_other_weights_are_loaded_and_checked(tmp_path: Path) -> None:
    encoder = load_vision_encoder(saved(tmp_path / "m", made("vit")))
    other = {name: 2 * tensor for name, tensor in encoder.weights().items()}
    encoder.load(other, "other")
    assert all(torch.equal(tensor, other[name]) for name, tensor in encoder.weights().items() if name not in encoder.carried)
    with pytest.raises(AlignmentError, match=r"other: does not fit the base model"):
        encoder.load({name: tensor for name, tensor in other.items() if "query" not in name}, "other")


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own forward mode still calls it
def test_an_encoder_has_a_linear_form(tmp_path: Path) -> None:
    encoder = load_vision_encoder(saved(tmp_path / "m", made("dinov2")), 42)
    assert encoder.frozen == ("backbone.embeddings.mask_token",)
    tau = {name: torch.ones_like(p) for name, p in encoder.module.named_parameters() if name not in encoder.frozen}
    model = LinearModel(encoder.module, tau)
    first, change = model.parts(pixels((frame(9, 9), frame(9, 9, 3)), size=42).batch([0, 1]))
    assert first.shape == change.shape == (2, 16)
    assert model.way == "dual"


@pytest.mark.parametrize(("kind", "default"), [("dinov2", IMAGENET), ("vit", HALF), ("clip", CLIP), ("clip-vision", CLIP)])
def test_means_and_sizes_are_the_preprocessors_else_the_models(tmp_path: Path, kind: str, default: Any) -> None:
    folder = saved(tmp_path / "m", made(kind))
    encoder = load_vision_encoder(folder)
    assert encoder.image is not None
    assert ((encoder.image.mean, encoder.image.std), encoder.image.size) == (default, 28)
    own = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1, 1, 1],
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 56, "width": 56},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    encoder = load_vision_encoder(folder)
    assert encoder.image is not None
    assert (encoder.image.mean, encoder.image.std, encoder.image.size) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 56)
    smaller = load_vision_encoder(folder, 42).image
    assert smaller is not None
    assert smaller.size == 42
    assert preprocess(encoder.image, ImageSplit(images=(frame(3, 3),), labels=(0,))).batch([0])["pixel_values"].shape == (
        1,
        3,
        56,
        56,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"preprocessor_config\.json: cannot be read as JSON"),
        ("[]", r"preprocessor_config\.json: must be a JSON object\. Got list"),
        ('{"image_mean": [0.5]}', r"preprocessor_config\.json: `image_mean` must be three numbers\. Got \[0\.5\]"),
        ('{"image_std": "a"}', r"`image_std` must be three numbers\. Got 'a'"),
    ],
)
def test_a_bad_preprocessor_config(tmp_path: Path, content: str, message: str) -> None:
    folder = saved(tmp_path / "m", made("dinov2"))
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_vision_encoder(folder)


def test_folders_that_hold_no_image_encoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformers cannot read its config\.json"):
        load_vision_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"model_type must be one of dinov2, vit, clip, clip_vision_model\. Got 'bert'"):
        load_vision_encoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"a text tower is part of a model of type clip\. Got 'bert'"):
        load_clip_text(tmp_path)
    folder = saved(tmp_path / "m", made("dinov2"))
    for size in (30, 0):
        with pytest.raises(CheckpointError, match=rf"image size must be a multiple of the patch of 14 pixels\. Got {size}"):
            load_vision_encoder(folder, size)
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AlignmentError, match=r"the model needs 25 tensors, 1 of them are missing: layernorm\.weight"):
        load_vision_encoder(folder)


def test_a_config_that_no_model_is_built_from(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", made("dinov2"))
    config = json.loads((folder / "config.json").read_text()) | {"hidden_act": "none of the known"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"transformers cannot (build the model of|read) its config\.json"):
        load_vision_encoder(folder)


# Texts


def test_sentences_are_embedded_as_transformers_does(tmp_path: Path) -> None:
    from tiny import make_model

    model = made("clip")
    folder = saved(tmp_path / "m", model)
    for path in make_model(tmp_path / "words").iterdir():
        if path.name.startswith("tokenizer"):
            (folder / path.name).write_bytes(path.read_bytes())
    tower, tokenizer = load_clip_text(folder)
    sentences = ["this is a cat", "dog"] * 40  # more than one batch
    found = clip_text_features(tower, tokenizer, sentences)
    columns = tokenizer(sentences[:2], padding=True, return_tensors="pt")
    columns = {name: columns[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        whole = model.get_text_features(**columns)
    whole = torch.nn.functional.normalize(getattr(whole, "pooler_output", whole), dim=-1)
    torch.testing.assert_close(found, whole.repeat(40, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clip_text_features(model, tokenizer, sentences[:2]), whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"must hold at least one sentence\. Got none"):
        clip_text_features(model, tokenizer, [])
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"text_projection.weight": torch.zeros(4, 16)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_projection\.weight must have shape \[8, 16\], got \[4, 16\]"):
        load_clip_text(folder)


# open_clip


def open_clip_folder(folder: Path) -> tuple[Path, Any]:
    api = pytest.importorskip("open_clip", reason="open_clip needs torchvision, which the tests' own set-up may leave out")
    vision = {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    content = {"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    made = api.create_model(f"local-dir:{folder}", load_weights=False).eval()
    stored = {name: tensor.contiguous() for name, tensor in made.half().state_dict().items()}
    save_file(stored, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return folder, made.float()


def test_open_clip_towers_are_those_of_open_clip(tmp_path: Path) -> None:
    folder, model = open_clip_folder(tmp_path / "m")
    encoder = load_vision_encoder(folder)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(images), model.encode_image(images, normalize=True))
    assert encoder.names["conv1.weight"] == "visual.conv1.weight"
    assert encoder.names["positional_embedding"] == "visual.positional_embedding"
    assert encoder.image is not None
    assert (encoder.image.mean, encoder.image.size, encoder.image.patch, encoder.frozen) == ((0.1, 0.2, 0.3), 28, 14, ())
    stored = load_file(folder / "open_clip_model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in encoder.weights().items())
    assert sorted(encoder.weights()) == sorted(stored)
    tower, tokenizer = load_clip_text(folder)
    found = clip_text_features(tower, tokenizer, ["a cat", "two dogs"])
    with torch.no_grad():
        torch.testing.assert_close(found, model.encode_text(tokenizer(["a cat", "two dogs"]), normalize=True))
    with pytest.raises(CheckpointError, match=r"this open_clip tower reads images of 28 pixels only\. Got the size 56"):
        load_vision_encoder(folder, 56)
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"open_clip cannot build the model of its open_clip_config\.json"):
        load_vision_encoder(folder)


def test_open_clip_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    (tmp_path / "open_clip_config.json").write_text("{}")
    for act in (load_vision_encoder, load_clip_text):
        with pytest.raises(CheckpointError, match=r"running this model needs open_clip.* pip install 'open_clip_torch'"):
            act(tmp_path)


# Heads from features


def clusters(count: int, n_classes: int, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Unit features around one axis a class."""
    labels = [i % n_classes for i in range(count)]
    noise = 0.3 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(torch.eye(8)[labels] + noise, dim=-1), labels


def accuracy(head: AnyHead, features: Tensor, labels: list[int]) -> float:
    return float((head.logits(features).argmax(-1) == torch.tensor(labels)).float().mean())


@pytest.mark.parametrize("n_classes", [2, 3])
def test_heads_made_from_features_tell_classes_apart(n_classes: int) -> None:
    train, test = clusters(60, n_classes), clusters(60, n_classes, seed=1)
    means = class_means_head(*train, n_classes)
    torch.testing.assert_close(means.classes.norm(dim=-1), torch.ones(n_classes))
    assert accuracy(means, *test) > 0.9
    pytest.importorskip("sklearn", reason="the tests' own set-up may leave scikit-learn out")
    for head in (linear_probe_head(*train, n_classes), linear_probe_head(*train, n_classes, validation=test)):
        assert isinstance(head, AnyHead)
        assert head.weight.shape == (n_classes, 8)
        assert head.bias.shape == (n_classes,)
        assert accuracy(head, *test) > 0.9
    assert linear_probe_head(*train, n_classes).hash() == linear_probe_head(*train, n_classes).hash()


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_probes_probabilities_are_those_of_scikit_learn(n_classes: int) -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="the tests' own set-up may leave scikit-learn out")
    features, labels = clusters(60, n_classes)
    model = linear.LogisticRegression(C=100.0, max_iter=2000).fit(features.double().numpy(), labels)
    expected = torch.from_numpy(model.predict_proba(features.double().numpy())).float()
    torch.testing.assert_close(
        linear_probe_head(features, labels, n_classes).logits(features).softmax(-1), expected, rtol=1e-4, atol=1e-5
    )


def test_a_linear_head_does_what_every_head_does() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, features, change = (torch.randn(*shape, generator=generator) for shape in ((3, 8), (3,), (5, 8), (5, 8)))
    head = LinearHead(weight=weight, bias=bias, scale=2.0)
    torch.testing.assert_close(head.logits(features + change), head.logits(features) + head.linear(change))
    labels = torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(
        head.loss(features, labels), torch.nn.functional.cross_entropy(2 * (features @ weight.T + bias), labels)
    )
    others = [LinearHead(weight=weight, bias=bias), LinearHead(weight=weight, bias=-bias, scale=2.0)]
    assert head.hash() not in [other.hash() for other in others]
    assert head.to(torch.device("cpu")).hash() == head.hash()
    with pytest.raises(DataError, match=r"`LinearHead\(scale=\.\.\.\)` must be above 0\. Got 0\.0"):
        LinearHead(weight=weight, bias=bias, scale=0.0)


@pytest.mark.parametrize(
    ("features", "labels", "n_classes", "message"),
    [
        (torch.eye(2), [0, 1], 1, r"a head must have at least 2 classes\. Got 1"),
        (torch.eye(2), [0], 2, r"one label a feature, at least one\. Got 2 features, 1 labels"),
        (torch.zeros(0, 2), [], 2, r"Got 0 features, 0 labels"),
        (torch.full((2, 2), torch.nan), [0, 1], 2, r"features must be finite\. Got NaN or Inf"),
        (torch.eye(2), [0, 2], 2, r"labels must be in 0\.\.1, the head has 2 classes\. Got 2"),
        (torch.eye(2), [-1, 1], 2, r"labels must be in 0\.\.1, the head has 2 classes\. Got -1"),
        (torch.eye(2), [0, 1], 3, r"needs an example of each class\. Got none of class 2"),
    ],
)
def test_features_and_labels_that_make_no_head(features: Tensor, labels: list[int], n_classes: int, message: str) -> None:
    for make in (class_means_head, linear_probe_head):
        with pytest.raises(DataError, match=message):
            make(features, labels, n_classes)


def test_a_head_of_an_image_task_end_to_end(tmp_path: Path) -> None:
    """Bright and dark images, through a random model."""
    encoder: Encoder = load_vision_encoder(saved(tmp_path / "m", made("dinov2")))
    images = np.stack([frame(8, 8, seed=i) // 4 + 190 * (i % 2) for i in range(20)]).astype(np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(20) % 2)
    seen = preprocess(encoder.image, read_npz(tmp_path / "a.npz", "train", ("dark", "bright")))
    assert isinstance(encoder.module, VisionEncoder)
    with torch.no_grad():
        features = encoder.module(**seen.batch(range(20)))
    assert accuracy(class_means_head(features, seen.labels, 2), features, list(seen.labels)) == 1.0
