"""Licences of what a model was made of: read from the parents, put together, conflicts named. No lawyer: what differs is said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thetau.errors import CheckpointError

FREE = frozenset(
    (
        "apache-2.0",
        "mit",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "isc",
        "cc0-1.0",
        "unlicense",
        "zlib",
        "wtfpl",
        "cc-by-4.0",
    )
)  # they ask for their notices to be kept, and for nothing of what is made


@dataclass(frozen=True, kw_only=True)
class Licence:
    """What a merged model inherits.

    - `name`: the hub's word for it: the parents' if they agree, `other` if they do not, None if one of them states none.
    - `warnings`: what somebody must look at before the model is given away.
    """

    name: str | None
    warnings: tuple[str, ...]


def inherited(parents: Mapping[str, str | None]) -> Licence:
    """Of parents by name, each with its licence or None.

    Examples:
        >>> inherited({"base": "apache-2.0", "sst2": "apache-2.0"}).name
        'apache-2.0'
        >>> inherited({"base": "llama3", "sst2": "cc-by-nc-4.0"}).warnings[1]
        'sst2 is under cc-by-nc-4.0, so the model may not be used commercially'
    """
    warnings: list[str] = []
    silent = sorted(name for name, licence in parents.items() if licence is None)
    known = {name: licence for name, licence in parents.items() if licence is not None}
    kinds = sorted(set(known.values()))
    bound = [kind for kind in kinds if kind not in FREE]
    said = "; ".join(f"{name}: {licence}" for name, licence in known.items())
    if len(kinds) > 1 and bound:
        warnings.append(
            f"The parents are under different licences ({said}), and the model is under all of them at once: find out whether they allow it"
        )
    warnings.extend(
        f"{name} is under {licence}, which allows no derivatives: a merged model is one"
        for name, licence in known.items()
        if "-nd" in licence
    )
    warnings.extend(
        f"{name} is under {licence}, so the model may not be used commercially"
        for name, licence in known.items()
        if "-nc" in licence
    )
    if silent:
        warnings.append(f"No licence is stated by {', '.join(silent)}: ask before the model is given away")
    if silent or not kinds:
        return Licence(name=None, warnings=tuple(warnings))
    return Licence(name=kinds[0] if len(kinds) == 1 else "other", warnings=tuple(warnings))


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A model of the hub at one commit."""

    name: str
    revision: str

    def is_called(self, identifier: str) -> bool:
        """Whether a hub id, `org/name` or `org/name@revision`, with or without `hub:`, means this repository.

        Examples:
            >>> Commit(name="org/a", revision="81df5c22").is_called("hub:org/a@main")
            True
        """
        return identifier.removeprefix("hub:").partition("@")[0] == self.name


_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]+)/?$")


def commit_of(path: str) -> Commit | None:
    """The model of the hub that a folder of the hub's cache holds; None for any other folder.

    Examples:
        >>> commit_of("/home/me/.cache/huggingface/hub/models--org--a/snapshots/81df5c22").name
        'org/a'
    """
    found = _SNAPSHOT.search(path)
    return None if found is None else Commit(name=found[1].replace("--", "/", 1), revision=found[2])


def licence_on_hub(commit: Commit) -> str | None:
    """The licence that the card of a model on the hub states; None where it states none, or the hub does not tell."""
    from huggingface_hub import hf_hub_download

    try:
        card = hf_hub_download(commit.name, "README.md", revision=commit.revision)
    except Exception:  # whatever the HTTP library below huggingface_hub raises: out of reach, gated, no card
        return None
    return _stated(Path(card))


def licence_of(path: Path) -> str | None:
    """The licence that a model's folder states: in its card's head, or by a licence file whose first lines are known; None otherwise."""
    card = path / "README.md"
    said = _stated(card) if card.is_file() else None
    if said is not None:
        return said
    for file in sorted(path.glob("LICEN[SC]E*")) if path.is_dir() else []:
        return _known(file.read_text("utf-8", errors="replace")[:2000])
    return None


def _stated(card: Path) -> str | None:
    """The licence in a card's head."""
    head = _front_matter(card)
    said = head.get("license")
    if isinstance(said, list) and said:
        return " and ".join(str(one).lower() for one in said)
    if not isinstance(said, str):
        return None
    return str(head.get("license_name") or said).lower() if said == "other" else said.lower()


_OPENINGS: Sequence[tuple[str, str]] = (
    ("Apache License", "apache-2.0"),
    ("MIT License", "mit"),
    ("Permission is hereby granted, free of charge", "mit"),
    ("LLAMA 3.2 COMMUNITY", "llama3.2"),
    ("LLAMA 3.1 COMMUNITY", "llama3.1"),
    ("LLAMA 3 COMMUNITY", "llama3"),
    ("LLAMA 2 COMMUNITY", "llama2"),
)


def _known(text: str) -> str | None:
    upper = text.upper()
    return next((name for opening, name in _OPENINGS if opening.upper() in upper), None)


def _front_matter(card: Path) -> dict[str, Any]:
    """The table at the head of a card; empty where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    import yaml

    text = card.read_text("utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    head, closed, _ = text[4:].partition("\n---")
    try:
        table = yaml.safe_load(head) if closed else {}
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"{card}: its head is no YAML ({str(error).splitlines()[0]}). Mend it, or remove the file."
        ) from error
    return table if isinstance(table, dict) else {}
