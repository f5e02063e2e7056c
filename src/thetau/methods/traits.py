"""What a method needs and how it reads, with its defaults: for the list of methods, its filters and the pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc, getmodule

from thetau.errors import RecipeError, nearest
from thetau.methods.registry import build, describe, get, names
from thetau.parts import Access, Method


@dataclass(frozen=True, kw_only=True)
class Traits:
    """A method's needs and ways.

    - `passes`: walks over the inputs, the one that writes among them.
    - `access`: how the last of them reads: any block of rows, a matrix task by task (`stream`), or all tasks of a tensor (`whole`).
    - `needs_base`: whether it means something only over a base.
    - `evidence`: what it must know of the tasks' data, by kind.
    - `takes`: the fewest and the most models, besides the base; None for no limit.
    - `suits`: kinds of task vectors that its authors made it for.
    - `by_task`: whether each task gets a vector of its own.
    - `around`: whether it works around another method.
    """

    passes: int
    access: Access
    needs_base: bool
    evidence: tuple[str, ...]
    takes: tuple[int, int | None]
    suits: tuple[str, ...]
    by_task: bool
    around: bool

    @property
    def models(self) -> str:
        """How many models it takes, in words."""
        fewest, most = self.takes
        if most is None:
            return "any number" if fewest <= 1 else f"{fewest} or more"
        return str(most) if most == fewest else f"{fewest} to {most}"

    @property
    def needs(self) -> str:
        """What must be there, in a few words."""
        found = ["base"] if self.needs_base else []
        found += self.evidence
        if self.takes[1] is not None:
            found.append(f"{self.models} model{'s' if self.takes[1] != 1 else ''}")
        return ", ".join(found)


PURPOSES: Mapping[str, tuple[str, Callable[[Traits], bool]]] = {
    "lora": ("made or shown by its authors for LoRA adapters", lambda it: "lora" in it.suits),
    "no-base": ("merges models as they are, without a base", lambda it: not it.needs_base),
    "data": ("must know something of the tasks' data", lambda it: bool(it.evidence)),
    "data-free": ("needs models alone", lambda it: not it.evidence),
    "many": ("takes any number of models", lambda it: it.takes[1] is None),
    "by-task": ("gives each task a vector of its own", lambda it: it.by_task),
    "around": ("works around another method (`then`)", lambda it: it.around),
    "block": ("reads any block of rows: a few hundred megabytes for any model", lambda it: it.access == "block"),
    "one-pass": ("reads the inputs once", lambda it: it.passes == 1),
}


def use(name: str) -> str | None:
    """The paragraph that says when to take a method, "Use it …": its class's own, or its file's; None where there is none.

    Raises:
        RecipeError: no method has that name.
    """
    cls = get(name)
    module = getmodule(cls)
    for text in (cls.__doc__, module.__doc__ if module else None):
        for paragraph in cleandoc(text or "").split("\n\n"):
            if paragraph.startswith("Use it "):
                return paragraph
    return None


def traits(name: str) -> Traits | None:
    """What a method needs at its defaults; None where a field has no default.

    Raises:
        RecipeError: no method has that name.
    """
    cls = get(name)
    fields = describe(name)
    if any(field.required for field in fields):
        return None
    method = build(name, {})
    chain = method.chain()
    statistics = [statistic for part in chain.stages if (statistic := part.requires()) is not None]
    return Traits(
        passes=1 + sum(statistic.walks for statistic in statistics),
        access=chain.access,
        needs_base=method.needs_base,
        evidence=chain.needs,
        takes=cls.takes,
        suits=cls.suits,
        by_task=chain.emit is not None,
        around=any(field.holds(Method) for field in fields),
    )


def suited(purposes: Sequence[str], known: Sequence[str] | None = None) -> list[str]:
    """The methods that fit every purpose (`PURPOSES`), of those that are `known`; by default all.

    Raises:
        RecipeError: a purpose is not known.

    Examples:
        >>> suited(["no-base", "many"])
        ['karcher', 'linear', 'multislerp']
    """
    problems = [
        f"unknown purpose {purpose!r}.{nearest(purpose, PURPOSES)} Known: {', '.join(PURPOSES)}."
        for purpose in purposes
        if purpose not in PURPOSES
    ]
    if problems:
        raise RecipeError(problems, "--for")
    found = []
    for name in names() if known is None else known:
        its = traits(name)
        if its is not None and all(PURPOSES[purpose][1](its) for purpose in purposes):
            found.append(name)
    return found
