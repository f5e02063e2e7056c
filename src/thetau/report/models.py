"""The page of a merged model: what it was made of, by which recipe, under which licences, what that did to the weights, and whether it is whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from thetau.diagnostics.changes import Change, Changes, changes, check_fit
from thetau.engine.executor import Engine
from thetau.engine.guard import FAR
from thetau.engine.verify import Verification, read_record
from thetau.errors import ThetauError
from thetau.export.card import Evaluation, Parent, parents_of, public_recipe, read_evaluation
from thetau.export.licences import Licence, inherited
from thetau.facade import open as open_weights
from thetau.facade import open_base, verify
from thetau.recipes.mergekit.recipe import KEY
from thetau.report.blocks import Bars, Block, Code, Column, Facts, Graph, Heatmap, Lines, Node, Notes, Page, Section, Table
from thetau.report.text import Span, gigabytes

WORST = 12  # tensors that are named in a chart


@final
@dataclass(frozen=True, kw_only=True)
class Merged:
    """All that the page of a merged model is made of.

    - `checked`: None where the weights were not read. `changes`: None where they were not, or could not be; `lost` says why.
    - `said`: warnings of the run that made it, where they are known.
    """

    name: str
    record: Mapping[str, Any]
    parents: tuple[Parent, ...]
    licence: Licence
    evaluations: tuple[Evaluation, ...] = ()
    checked: Verification | None = None
    changes: Changes | None = None
    lost: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    files: tuple[tuple[str, int], ...] = field(default=())


def read_merged(
    folder: Path,
    *,
    evaluations: Sequence[Path] = (),
    weights: bool = True,
    said: Sequence[str] = (),
    engine: Engine | None = None,
) -> Merged:
    """Look at an output of `thetau merge`: its record, its parents, and with `weights` every tensor of it and of those that are still there.

    Raises:
        CheckpointError: the folder keeps no record of a merge, or an evaluation cannot be read.
    """
    record = read_record(folder)
    parents = tuple(parents_of(record))
    found, lost = _changes(folder, record, parents, engine) if weights else (None, ("The weights were not read.",))
    given = [value for path in evaluations for value in read_evaluation(path)]
    return Merged(
        name=folder.resolve().name,
        record=record,
        parents=parents,
        licence=inherited({parent.name: parent.licence for parent in parents}),
        evaluations=tuple(given or _beside(folder)),
        checked=verify(folder, engine=engine) if weights else None,
        changes=found,
        lost=tuple(lost),
        said=tuple(said),
        files=tuple((path.name, path.stat().st_size) for path in sorted(folder.glob("*.safetensors"))),
    )


def _beside(folder: Path) -> list[Evaluation]:
    """What `thetau evaluate --json` left beside the model, as NAME.json or in it as evaluation.json; a file of another kind is none."""
    values: list[Evaluation] = []
    for path in (folder.with_name(f"{folder.name}.json"), folder / "evaluation.json"):
        if path.is_file():
            try:
                values += read_evaluation(path)
            except ThetauError:
                continue
    return values


def _changes(
    folder: Path, record: Mapping[str, Any], parents: Sequence[Parent], engine: Engine | None
) -> tuple[Changes | None, list[str]]:
    """Merge and parents against the base, and why what is missing is."""
    lost = [
        f"{parent.shown} is not where it was, so nothing is said of its weights."
        for parent in parents
        if not Path(parent.path).exists()
    ]
    here = {parent.name: parent for parent in parents if Path(parent.path).exists()}
    if record.get("kind") == "task_vector":
        return None, [*lost, "This is a task vector: there is no model to set beside its base."]
    if "base" not in here:
        return None, lost or ["The recipe has no base, so there is nothing from which a change could be measured."]
    try:
        base = open_base(here["base"].path)
        merged = open_weights(folder)
    except ThetauError as error:
        return None, [*lost, str(error)]
    models = {}
    for name, parent in here.items():
        if name == "base":
            continue
        try:
            opened = open_weights(parent.path, base=base)
            check_fit(base, opened)
            if opened.terms[-1][1].fingerprint() != parent.fingerprint:
                lost.append(f"{parent.shown} has changed since the merge.")
            models[parent.shown] = opened
        except ThetauError as error:
            lost.append(f"{parent.shown}: {error}")
    while True:
        try:
            return changes(base, merged, list(models.values()), names=list(models), engine=engine), lost
        except ThetauError as error:
            if not models:
                return None, [*lost, str(error)]
            lost.append(f"The models cannot be set beside the merge: {error}")
            models = {}


def model_page(merged: Merged) -> Page:
    """The page."""
    others = [parent for parent in merged.parents if parent.name != "base"]
    base = next((parent.shown for parent in merged.parents if parent.name == "base"), None)
    method = _method(merged.record)
    how = f" by {method}" if method else ""
    over = f" over {base}" if base else ""
    return Page(
        title=merged.name,
        about="merged model" if merged.record.get("kind") != "task_vector" else "merged task vector",
        lead=f"{len(others)} model{'s' if len(others) != 1 else ''} merged{over}{how} with thetau {merged.record.get('thetau', '')}.",
        sections=tuple(
            section
            for section in (
                _overview(merged),
                _lineage(merged),
                _evaluations(merged.evaluations),
                *_layers(merged),
                _checks(merged),
                _again(merged),
            )
            if section is not None
        ),
    )


def _method(record: Mapping[str, Any]) -> str | None:
    """What a recipe of ours, or the last document of mergekit's, merges by; None for arithmetic in Python or on the command line."""
    recipe = record.get("recipe")
    if not isinstance(recipe, Mapping):
        return None
    documents = recipe.get(KEY)
    if isinstance(documents, list) and documents and isinstance(documents[-1], Mapping):
        return str(documents[-1].get("merge_method", "")) or None
    method = recipe.get("method")
    name = method.get("name") if isinstance(method, Mapping) else method
    return str(name) if name else None


def _overview(merged: Merged) -> Section:
    tensors = merged.record["tensors"]
    facts = Facts(
        pairs=(
            ("Method", _method(merged.record) or "arithmetic"),
            ("Models", sum(parent.name != "base" for parent in merged.parents)),
            ("Tensors", len(tensors)),
            ("Size", gigabytes(sum(size for _, size in merged.files))),
            ("Licence", merged.licence.name or "not stated"),
            (
                "Checks",
                "not made"
                if merged.checked is None
                else "good"
                if merged.checked.good
                else f"{len(merged.checked.problems)} problems",
            ),
        )
    )
    blocks: list[Block] = [facts]
    warnings = [f"{text}." for text in merged.licence.warnings] + list(merged.said)
    if merged.changes is not None:
        whole = _whole(merged.changes)
        if whole is not None and whole.shift is not None and whole.shift > FAR:
            warnings.append(
                f"The merge lies {whole.shift:.2f} of the base's norm away from it; fine-tuning gives less than {FAR:g}. Measure it before it is used."
            )
    if warnings:
        blocks.append(Notes(texts=tuple(dict.fromkeys(warnings)), tone="warning"))
    return Section(slug="overview", title="Overview", blocks=tuple(blocks))


def _whole(found: Changes) -> Change | None:
    return found.together(lambda tensor: "whole").get("whole")


def _lineage(merged: Merged) -> Section:
    base = next((parent for parent in merged.parents if parent.name == "base"), None)
    others = [parent for parent in merged.parents if parent.name != "base"]
    nodes = []
    if base is not None:
        nodes.append(
            Node(key="base", name=base.shown, said=base.licence or "licence not stated", column=0, tone=_tone(base, "base"))
        )
    nodes += [
        Node(
            key=f"m{place}", name=parent.shown, said=parent.licence or "licence not stated", column=1, tone=_tone(parent, "model")
        )
        for place, parent in enumerate(others)
    ]
    nodes.append(Node(key="made", name=merged.name, said=merged.licence.name or "licence not stated", column=2, tone="made"))
    edges = [("base", f"m{place}", "fine-tuned from") for place in range(len(others)) if base is not None]
    edges += [(f"m{place}", "made", "merged into") for place in range(len(others))]
    if not others and base is not None:
        edges.append(("base", "made", "made of"))
    table = Table(
        title="Made of",
        columns=(
            Column(name="model", number=False),
            Column(name="in the recipe", number=False),
            Column(name="trained on", number=False),
            Column(name="licence", number=False),
            Column(name="commit on the hub", number=False),
            Column(name="weights (SHA-256)", number=False),
        ),
        rows=tuple(
            (
                parent.shown,
                parent.name,
                parent.task or "",
                parent.licence or "not stated",
                "" if parent.commit is None else f"{parent.commit.name}@{parent.commit.revision[:12]}",
                f"{parent.fingerprint[:16]}…",
            )
            for parent in merged.parents
        ),
    )
    graph = Graph(
        title="Where it comes from",
        nodes=tuple(nodes),
        edges=tuple(edges),
        caption="Licences are those that the models' cards and licence files state. A coloured frame: none is stated, or it restricts what may be made.",
    )
    blocks: list[Block] = [graph, table]
    if not merged.licence.warnings and merged.licence.name is not None:
        blocks.insert(0, Notes(texts=(f"All of them are under {merged.licence.name}, and so is this model.",), tone="good"))
    return Section(slug="lineage", title="Lineage and licences", blocks=tuple(blocks))


def _tone(parent: Parent, plain: Any) -> Any:
    restricted = parent.licence is None or "-nc" in parent.licence or "-nd" in parent.licence
    return "warning" if restricted else plain


def _evaluations(values: Sequence[Evaluation]) -> Section | None:
    if not values:
        return Section(
            slug="evaluation",
            title="How well it does",
            lead="No evaluation lies beside the model.",
            blocks=(
                Code(
                    text="thetau evaluate --model MODEL --task TASK --json MODEL.json",
                    label="Measure it, and make this report again",
                ),
            ),
        )
    table = Table(
        title="Evaluations",
        columns=(
            Column(name="task", number=False),
            Column(name="metric", number=False),
            Column(name="value", spec=".3g"),
            Column(name="n"),
            Column(name="known", number=False),
            Column(name="measured by", number=False),
        ),
        rows=tuple(
            (
                one.task,
                one.metric,
                Span(value=one.value, low=one.low, high=one.high),
                one.n,
                "" if one.low is not None and one.n is not None else one.known,
                one.by,
            )
            for one in values
        ),
    )
    names = _distinct(values)
    bars = Bars(
        title="By task",
        x="value, with its 95 % interval where one is known",
        rows={name: Span(value=one.value, low=one.low, high=one.high, n=one.n) for name, one in zip(names, values, strict=True)},
    )
    return Section(slug="evaluation", title="How well it does", blocks=(bars, table))


def _distinct(values: Sequence[Evaluation]) -> list[str]:
    """A name for each value: its task, and the metric where a task has several."""
    tasks = [one.task for one in values]
    named = [one.task if tasks.count(one.task) == 1 else f"{one.task}, {one.metric}" for one in values]
    return [name if named.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(named, 1)]


def _layers(merged: Merged) -> list[Section]:
    if merged.changes is None or not merged.changes.tensors:
        why = merged.lost or ("No tensor could be set beside the base's.",)
        return [Section(slug="layers", title="What it did to the layers", blocks=(Notes(texts=why, tone="plain"),))]
    found = merged.changes
    layers = found.together(lambda tensor: tensor.layer)
    kinds = found.together(lambda tensor: tensor.kind)
    cells = found.together(lambda tensor: f"{tensor.layer}\n{tensor.kind}")
    order = sorted(layers, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))
    blocks: list[Block] = []
    if merged.lost:
        blocks.append(Notes(texts=merged.lost, tone="warning"))
    heat = Heatmap(
        title="‖τ‖/‖θ₀‖ of the merge, by layer and kind",
        rows=tuple(_block_name(name) for name in order),
        columns=tuple(kinds),
        values=tuple(
            tuple(cells[f"{layer}\n{kind}"].shift if f"{layer}\n{kind}" in cells else None for kind in kinds) for layer in order
        ),
        caption="How far the weights moved from the base, in shares of the base's norm. Hatched: the layer has nothing of this kind, or the base is 0 there.",
        spec=".2g",
    )
    blocks.append(heat)
    blocks_in = [name for name in order if name.isdigit()]
    series = {"the merge": tuple(layers[name].shift for name in blocks_in)}
    if len(found.compared) <= 12:
        series |= {
            model: tuple(layers[name].norms[i] / layers[name].base if layers[name].base else None for name in blocks_in)
            for i, model in enumerate(found.compared)
        }
    if len(blocks_in) > 1:
        blocks.append(
            Lines(
                title="‖τ‖/‖θ₀‖ by block",
                x="block",
                y="‖τ‖/‖θ₀‖",
                series=series,
                start=int(blocks_in[0]),
                caption="The merge beside the models that went into it.",
            )
        )
    section = Section(slug="layers", title="What it did to the layers", blocks=tuple(blocks))
    rest = [_shares(found, order, layers)] if found.compared else []
    return [section, *rest, _tensors(found)]


def _block_name(name: str) -> str:
    return f"block {name}" if name.isdigit() else "outside the blocks"


def _shares(found: Changes, order: Sequence[str], layers: Mapping[str, Change]) -> Section:
    whole = _whole(found)
    assert whole is not None
    heat = Heatmap(
        title="Cosine of the merge with each model's vector, by block",
        rows=found.compared,
        columns=tuple(_block_name(name) for name in order),
        values=tuple(tuple(layers[name].cosines[i] for name in order) for i in range(len(found.compared))),
        signed=True,
        top=1.0,
        cluster=len(found.compared) > 12,
        spec=".2f",
        caption="Near 0: little of the model's change is left there. Models that are alike stand together.",
    )
    table = Table(
        title="Each model in the merge",
        columns=(
            Column(name="model", number=False),
            Column(name="‖τ‖", meaning="length of the model's task vector"),
            Column(name="‖τ‖/‖θ₀‖", spec=".3g"),
            Column(name="cosine with the merge", spec=".3f"),
            Column(name="share kept", spec=".3f", meaning="⟨τ, τ_i⟩/‖τ_i‖²: how much of the model's change the merge makes"),
        ),
        rows=tuple(
            (
                model,
                whole.norms[i],
                whole.norms[i] / whole.base if whole.base else None,
                whole.cosines[i],
                whole.inner[i] / whole.norms[i] ** 2 if whole.norms[i] else None,
            )
            for i, model in enumerate(found.compared)
        ),
    )
    return Section(slug="models", title="How much of each model is in it", blocks=(heat, table))


def _tensors(found: Changes) -> Section:
    ranked = sorted(found.tensors, key=lambda tensor: -(tensor.shift or 0.0))
    table = Table(
        title="Every tensor",
        columns=(
            Column(name="tensor", number=False),
            Column(name="kind", number=False),
            Column(name="block", number=False),
            Column(name="shape", number=False),
            Column(name="‖θ₀‖"),
            Column(name="‖τ‖"),
            Column(name="‖τ‖/‖θ₀‖", spec=".3g"),
        ),
        rows=tuple(
            (one.name, one.kind, one.layer, " × ".join(map(str, one.shape)) or "a number", one.base, one.norm, one.shift)
            for one in ranked
        ),
        caption="Those that moved most come first.",
    )
    return Section(slug="tensors", title="Tensors", blocks=(table,))


def _checks(merged: Merged) -> Section:
    blocks: list[Block] = []
    if merged.checked is None:
        blocks.append(
            Notes(texts=("The weights were not read: make the report without --quick, or run `thetau verify`.",), tone="warning")
        )
    elif merged.checked.good:
        against = ", ".join(merged.checked.against) or "itself alone"
        blocks.append(
            Notes(
                texts=(
                    f"{merged.checked.tensors} tensors ({gigabytes(merged.checked.nbytes)}) are there, finite, and good against {against}.",
                ),
                tone="good",
            )
        )
    else:
        blocks.append(Notes(texts=merged.checked.problems, tone="bad"))
    left = merged.record.get("not_merged")
    if isinstance(left, Mapping) and left:
        blocks.append(
            Table(
                title="Not merged",
                columns=(Column(name="tensor", number=False), Column(name="why", number=False)),
                rows=tuple((str(name), str(why)) for name, why in left.items()),
                caption="These are the base's, as they are.",
            )
        )
    blocks.append(
        Table(
            title="Files",
            columns=(Column(name="file", number=False), Column(name="bytes")),
            rows=merged.files,
        )
    )
    return Section(
        slug="checks",
        title="Checks",
        lead="What `thetau verify` finds: every tensor against the checksum that was written with it.",
        blocks=tuple(blocks),
    )


def _again(merged: Merged) -> Section:
    versions = merged.record.get("versions")
    said = {"thetau": merged.record.get("thetau"), **(versions if isinstance(versions, Mapping) else {})}
    recipe = merged.record.get("recipe")
    recorded = isinstance(recipe, Mapping) and ("method" in recipe or KEY in recipe)
    command = "thetau merge recipe.yaml -o merged\nthetau verify merged --again"
    return Section(
        slug="again",
        title="How to make it again",
        lead="Folders of the machine on which it was made are named by their last part."
        + ("" if recorded else " It was made by arithmetic on weights, and not by a recipe."),
        blocks=(
            Code(
                text=public_recipe(merged.record, merged.parents).rstrip(),
                label="recipe.yaml" if recorded else "what was computed",
            ),
            *((Code(text=command, label="Make it, and compare every bit"),) if recorded else ()),
            Facts(pairs=(("Seed", merged.record.get("seed", 0)), *((str(name), str(one)) for name, one in said.items()))),
        ),
    )
