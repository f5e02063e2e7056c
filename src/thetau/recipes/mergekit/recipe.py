"""A recipe in mergekit's format as a thing to run, to record, and to run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thetau.engine.executor import Engine
from thetau.engine.patchwork import Patchwork
from thetau.errors import RecipeError
from thetau.recipes.mergekit.moe import is_moe, moe
from thetau.recipes.mergekit.moe.schema import read_moe
from thetau.recipes.mergekit.plan import assemble
from thetau.recipes.mergekit.schema import Script, is_mergekit, read_scripts
from thetau.recipes.reading import Document

KEY = "mergekit"  # in what an output records


@dataclass(frozen=True, kw_only=True)
class MergekitRecipe:
    """One or several documents, read and checked for form; what the command line adds to them stands beside.

    A config of `mergekit-moe` has one document and no scripts.
    """

    scripts: tuple[Script, ...]
    documents: tuple[Any, ...]
    where: str
    folder: Path | None = None
    seed: int = 0
    exclude: tuple[str, ...] = ()
    dtype: str | None = None
    quantise: str | None = None
    shard_size: str | int = "5GB"

    @property
    def mixture(self) -> bool:
        """Whether a mixture of experts is made."""
        return not self.scripts

    def assemble(self, engine: Engine | None = None) -> Patchwork:
        """The model, lazily; only headers and configs are read.

        Raises:
            RecipeError: everything that they can tell is wrong, with line and column.
        """
        if self.mixture:
            if self.exclude:
                raise RecipeError(["a mixture of experts leaves no tensor out: take `--exclude` away."], self.where)
            return moe(self.documents[0], self.where, self.folder, seed=self.seed, engine=engine)
        return assemble(self.scripts, self.where, folder=self.folder, seed=self.seed, exclude=self.exclude, engine=engine)

    def record(self) -> dict[str, Any]:
        """What an output says of how it was made; `read_record` reads it."""
        return {
            KEY: list(self.documents),
            "folder": str(self.folder.resolve()) if self.folder is not None else None,
            "seed": self.seed,
            "exclude": list(self.exclude),
            "dtype": self.dtype,
            **({"quantise": self.quantise} if self.quantise else {}),
        }


def holds_mergekit(documents: Sequence[Document]) -> bool:
    """Whether a file's documents are mergekit's."""
    return any(is_mergekit(document.content) or is_moe(document.content) for document in documents)


def read_documents(documents: Sequence[Document], where: str, folder: Path | None) -> MergekitRecipe:
    """The recipe of a file.

    Raises:
        RecipeError: with every problem of form, by line and column.
    """
    if any(is_moe(document.content) for document in documents):
        if len(documents) > 1:
            raise RecipeError(
                [f"a mixture of experts is one document. Got {len(documents)}: save the models that it is made of first."], where
            )
        try:
            mixture = read_moe(documents[0].content, where, folder)
        except RecipeError as error:
            raise RecipeError([documents[0].placed(problem) for problem in error.problems], where) from error
        return MergekitRecipe(
            scripts=(), documents=(documents[0].content,), where=where, folder=folder, dtype=mixture.dtype, seed=mixture.seed
        )
    scripts = read_scripts(documents, where, folder)
    last = scripts[-1]
    return MergekitRecipe(
        scripts=tuple(scripts),
        documents=tuple(document.content for document in documents),
        where=where,
        folder=folder,
        dtype=last.out_dtype or last.dtype,
    )


def read_record(content: Mapping[str, Any], where: str) -> MergekitRecipe:
    """The recipe that an output was made with.

    Raises:
        RecipeError: the record was changed since.
    """
    documents, folder = content.get(KEY), content.get("folder")
    if not isinstance(documents, list) or not documents:
        raise RecipeError([f"`{KEY}` must hold the documents of a recipe."], where)
    read = read_documents([Document(one, {}) for one in documents], where, Path(folder) if isinstance(folder, str) else None)
    given = {**read.__dict__, "seed": content.get("seed", 0), "exclude": tuple(content.get("exclude", ()))}
    return MergekitRecipe(**{**given, "dtype": content.get("dtype"), "quantise": content.get("quantise")})
