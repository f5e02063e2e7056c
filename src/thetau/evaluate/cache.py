"""Results on disk, by the content that they depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from pydantic import TypeAdapter, ValidationError

from thetau.checkpoint.disk import write_bytes

T = TypeVar("T")


@final
@dataclass(frozen=True, kw_only=True)
class Cache:
    """A folder of small JSON files; without a folder nothing is kept. A file that cannot be read counts as absent."""

    folder: Path | None = None

    @staticmethod
    def key(parts: Any) -> str:
        """A hexadecimal digest of anything that JSON can hold."""
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def get(self, kind: type[T], parts: Any) -> T | None:
        """The result of type `kind` that was kept for `parts` (anything JSON can hold)."""
        if self.folder is None:
            return None
        try:
            return TypeAdapter(kind).validate_json(_file(self.folder, kind, parts).read_bytes())
        except (OSError, ValidationError):
            return None

    def put(self, value: Any, parts: Any) -> None:
        """Keep a result for `parts`. Raises `OutputError`."""
        if self.folder is not None:
            write_bytes(_file(self.folder, type(value), parts), TypeAdapter(type(value)).dump_json(value))


def _file(folder: Path, kind: type[Any], parts: Any) -> Path:
    return folder / f"{kind.__name__.lower()}-{Cache.key(parts)}.json"
