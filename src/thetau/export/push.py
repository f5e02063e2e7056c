"""A finished model to the hub: checked first, then uploaded as one commit."""

from __future__ import annotations

from pathlib import Path

from thetau.checkpoint.hub import reason
from thetau.errors import CheckpointError, OutputError
from thetau.export.card import CARD

NEVER = (".*", "*.partial/*", "*.lock")  # what runs leave while they write


def push(folder: Path, repository: str, *, private: bool = False, message: str = "Upload a merged model") -> str:
    """Upload a model's folder to a repository of the hub, which is made if it is not there; the address of the commit.

    Raises:
        CheckpointError: the folder is no whole model, or has no card.
        OutputError: the hub does not take it.
    """
    if repository.count("/") != 1 or repository.startswith(("/", ".")):
        raise OutputError(f"{repository!r}: must be the name of a repository, as org/name.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json, so nobody could load it. Give the folder of a model.")
    if not (folder / CARD).is_file():
        raise CheckpointError(
            f"{folder}: has no card, so nobody could tell what it is. Make one first: `thetau export card {folder}`."
        )
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=list(NEVER))
    except Exception as error:  # whatever the HTTP library below huggingface_hub raises
        raise OutputError(
            f"{repository}: the hub does not take {folder} ({reason(error)}). Log in with `hf auth login`, then run again."
        ) from error
    return str(commit.commit_url)
