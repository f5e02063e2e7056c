"""The card of a model that was merged: how it was made, of what, under which licences, how well it does, and how to check all of that.

The form is the hub's (<https://huggingface.co/docs/hub/model-cards>): a head in YAML that the hub reads, then a page for people. Folders of
the machine on which it was made are named by their last part only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thetau.checkpoint.config import has_config, read_config
from thetau.checkpoint.disk import write_text
from thetau.checkpoint.locate import known_as
from thetau.engine.verify import read_record
from thetau.errors import CheckpointError, OutputError
from thetau.export.licences import Commit, Licence, commit_of, inherited, licence_of, licence_on_hub

CARD = "README.md"
HUB = "https://huggingface.co"
REPORT = "report.html"  # what `thetau merge --report` writes into the folder
BY_US = "<!-- made by thetau -->"  # a card with this line may be made again; any other is somebody's own


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A model that another was made of: what it is called, its place, its licence, its hash, and what it was trained on.

    `commit`: of a model of the hub.
    """

    name: str
    path: str
    licence: str | None
    fingerprint: str
    commit: Commit | None = None
    task: str | None = None

    @property
    def shown(self) -> str:
        """As others know it: a folder's name is often a hash or a number, and the recipe's name for it is not."""
        if self.commit is not None:
            return self.commit.name
        return known_as(self.path) if self.name == "base" else self.name


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One value of a model: the task, the metric, the value, and what it is known of (`n = 400`, `± 0.9`).

    - `low`, `high`, `n`: the ends of its interval and the number of examples, where they are stated. `model`: the checkpoint that was measured.
    """

    task: str
    metric: str
    value: float
    known: str
    by: str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card, ready to be written: its text, and what somebody must look at before the model is given away."""

    text: str
    warnings: tuple[str, ...]


def card_of(folder: Path, *, evaluations: Sequence[Path] = (), name: str | None = None, licence: str | None = None) -> Card:
    """The card of an output of `thetau merge`.

    - `evaluations`: what `thetau evaluate --json` or lm-evaluation-harness wrote.
    - `name`: the model's title; that of its folder otherwise.
    - `licence`: the hub's word for the licence, where the one that the parents give is not to stand.

    Raises:
        CheckpointError: the folder keeps no record of a merge, or an evaluation cannot be read.
    """
    record = read_record(folder)
    parents = parents_of(record)
    found = inherited({parent.name: parent.licence for parent in parents})
    if licence is not None:
        found = Licence(name=licence, warnings=found.warnings)
    values = [value for path in evaluations for value in read_evaluation(path)]
    title = name or folder.name
    parts = [
        _head(folder, record, parents, found, title, values),
        f"# {_safe(title)}\n\n{BY_US}\n\n{_sentence(record, parents)}",
        _made(record, parents),
        _table(("model", "task", "licence", "weights (SHA-256)"), [_row(parent) for parent in parents], "Made of"),
        _licences(found),
        _table(
            ("task", "metric", "value", "", "measured by"),
            [(one.task, one.metric, f"{one.value:.4g}", one.known, one.by) for one in values],
            "Evaluations",
        ),
        _files(folder),
        _report(folder),
        "## Check it\n\n```\nthetau verify .\n```\n\ncompares every tensor with the checksums that were written with it.",
    ]
    return Card(text="\n\n".join(part for part in parts if part) + "\n", warnings=found.warnings)


def write_card(folder: Path, card: Card) -> Path:
    """Put a card into a model's folder.

    Raises:
        OutputError: a card is there that thetau did not make, or it cannot be written.
    """
    path = folder / CARD
    if path.exists() and BY_US not in path.read_text("utf-8", errors="replace"):
        raise OutputError(f"{path}: exists, and thetau did not make it. Move it away, or print the new one with `--print`.")
    write_text(path, card.text)
    return path


def read_evaluation(path: Path) -> list[Evaluation]:
    """The values in a result file of `thetau evaluate --json`, with `--harness` or without, or of lm-evaluation-harness.

    Raises:
        CheckpointError: it is neither.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}).") from error
    tasks = content.get("tasks") if isinstance(content, Mapping) else None
    if isinstance(tasks, Mapping) and all(isinstance(one, Mapping) and {"metric", "value"} <= set(one) for one in tasks.values()):
        return [
            Evaluation(
                task=name,
                metric=one["metric"],
                value=float(one["value"]),
                known=_interval(one),
                by="thetau evaluate",
                **({"low": one["low"], "high": one["high"], "n": one["n"]} if {"low", "high", "n"} <= set(one) else {}),
                model=str(content["model"]) if "model" in content else None,
            )
            for name, one in tasks.items()
        ]
    if isinstance(tasks, Mapping) and "version" in content and all(isinstance(one, list) for one in tasks.values()):
        return [
            Evaluation(
                task=task, metric=one["metric"], value=float(one["value"]), known=_interval(one), by="lm-evaluation-harness"
            )
            for task, scores in tasks.items()
            for one in scores
        ]
    results = content.get("results") if isinstance(content, Mapping) else None
    if isinstance(results, Mapping):
        return [
            Evaluation(
                task=task,
                metric=key.partition(",")[0],
                value=float(value),
                known=_deviation(one, key),
                by="lm-evaluation-harness",
            )
            for task, one in results.items()
            for key, value in one.items()
            if "," in key and "_stderr" not in key and isinstance(value, int | float)
        ]
    raise CheckpointError(f"{path}: is neither a result of `thetau evaluate --json` nor one of lm-evaluation-harness.")


def _interval(one: Mapping[str, Any]) -> str:
    if not {"low", "high", "n"} <= set(one):
        return ""
    return f"n = {one['n']}" if one["low"] is None else f"95 %: {one['low']:.4g} – {one['high']:.4g}, n = {one['n']}"


def _deviation(one: Mapping[str, Any], key: str) -> str:
    metric, _, how = key.partition(",")
    error = one.get(f"{metric}_stderr,{how}")
    return f"± {error:.2g} (standard error)" if isinstance(error, int | float) else ""


def parents_of(record: Mapping[str, Any]) -> list[Parent]:
    """What an output's record says that it was made of: the base first, then the models by the names that the recipe gives them.

    Raises:
        CheckpointError: the record is damaged there.
    """
    recipe = record.get("recipe", {})
    members = recipe.get("models", []) if isinstance(recipe, Mapping) else []
    named = [one for one in members if isinstance(one, Mapping)] if isinstance(members, list) else []
    names = {str(one["path"]): str(one["name"]) for one in named if one.get("name") and "path" in one}
    inputs = record.get("inputs", [])
    if not isinstance(inputs, list) or not all(isinstance(one, Mapping) and isinstance(one.get("path"), str) for one in inputs):
        raise CheckpointError("thetau.json: damaged: `inputs` must give a path for each model. Restore it from a copy.")
    base = str(record.get("base", ""))
    parents = []
    for one in sorted(inputs, key=lambda one: str(one["path"]) != base):
        path = str(one["path"])
        here, commit = Path(path), commit_of(path)
        # The record names the folder of the cache that a model of the hub was read from; the recipe, its id.
        said = next((name for name in names if commit is not None and commit.is_called(name)), path)
        stated = licence_of(here) if here.is_dir() else None
        parents.append(
            Parent(
                name="base" if path == base else names.get(said, commit.name if commit is not None else here.name),
                path=path,
                licence=licence_on_hub(commit) if stated is None and commit is not None else stated,
                fingerprint=str(one.get("fingerprint", "")),
                commit=commit,
                task=_task(here),
            )
        )
    return parents


def _task(folder: Path) -> str | None:
    """What a fine-tune of thetau's was trained on, and how."""
    if not has_config(folder if folder.is_dir() else None, "thetau_finetune.json"):
        return None
    record = read_config(folder, "thetau_finetune.json")
    data = f" (data: {record['licence']})" if record.get("licence") else ""
    return f"{record.get('task')}, {record.get('config', {}).get('paradigm', 'standard')} fine-tuning{data}"


def _head(
    folder: Path, record: Mapping[str, Any], parents: Sequence[Parent], licence: Licence, title: str, values: Sequence[Evaluation]
) -> str:
    """What the hub reads."""
    import yaml

    head: dict[str, Any] = {}
    if licence.name is not None:
        head["license"] = licence.name
        if licence.name == "other":
            head["license_name"] = " and ".join(sorted({parent.licence for parent in parents if parent.licence}))
    models = [parent.commit.name for parent in parents if parent.commit is not None]
    if models:
        head |= {"base_model": models, "base_model_relation": "merge"}
    if has_config(folder) and "model_type" in read_config(folder):
        head["library_name"] = "transformers"
    head["tags"] = ["merge", "thetau", "task-arithmetic", *([method] if (method := _method(record)) else [])]
    if values:
        head["model-index"] = [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": one.task, "name": one.task},
                        "dataset": {"type": one.task, "name": one.task},
                        "metrics": [{"type": one.metric, "value": one.value, "name": one.metric}],
                    }
                    for one in values
                ],
            }
        ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip()}\n---"


def _method(record: Mapping[str, Any]) -> str | None:
    recipe = record.get("recipe", {})
    method = recipe.get("method") if isinstance(recipe, Mapping) else None
    name = method.get("name") if isinstance(method, Mapping) else method
    return str(name) if name else None


def _sentence(record: Mapping[str, Any], parents: Sequence[Parent]) -> str:
    others = [parent for parent in parents if parent.name != "base"]
    base = next((parent.shown for parent in parents if parent.name == "base"), None)
    how = f"by `{method}`" if (method := _method(record)) else "by arithmetic on their weights"
    over = f" over {_safe(base)}" if base else ""
    plural = "s" if len(others) != 1 else ""
    return f"A merge of {len(others)} model{plural}{over}, made {how} with thetau {record.get('thetau', '')}."


def _made(record: Mapping[str, Any], parents: Sequence[Parent]) -> str:
    text = public_recipe(record, parents)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any in a name
    return f"## How it was made\n\n{fence}yaml\n{text.rstrip()}\n{fence}\n\n```\nthetau merge recipe.yaml -o merged\n```"


def public_recipe(record: Mapping[str, Any], parents: Sequence[Parent]) -> str:
    """The recipe in YAML, with the parents' names in place of this machine's paths."""
    import yaml

    names = {parent.path: parent.shown for parent in parents}

    def public(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: public(one) for key, one in value.items() if one is not None and key != "folder"}
        if isinstance(value, list | tuple):
            return [public(one) for one in value]
        if not isinstance(value, str):
            return value
        here = value.startswith(("/", "~", ".")) or ("/" in value and Path(value).exists())
        return names.get(value, Path(value).name if here else value)

    return yaml.safe_dump(
        public(record.get("recipe", {})), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )


def _row(parent: Parent) -> tuple[str, ...]:
    commit = parent.commit
    link = _safe(parent.shown) if commit is None else f"[{_safe(commit.name)}]({HUB}/{commit.name}/tree/{commit.revision})"
    known = " (base)" if parent.name == "base" else "" if parent.name == parent.shown else f" as {_safe(parent.name)}"
    return (
        link + known,
        _safe(parent.task or ""),
        _safe(parent.licence or "not stated"),
        f"`{parent.fingerprint[:16]}…`",
    )


def _licences(licence: Licence) -> str:
    if not licence.warnings:
        return f"All of them are under {licence.name}, and so is this model." if licence.name not in (None, "other") else ""
    return "## Licences\n\n" + "\n".join(f"- {_safe(warning)}." for warning in licence.warnings)


def _files(folder: Path) -> str:
    import hashlib

    rows = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            rows.append((_safe(path.name), f"{path.stat().st_size:,}", f"`{hashlib.file_digest(file, 'sha256').hexdigest()}`"))
    return _table(("file", "bytes", "SHA-256"), rows, "Files")


def _report(folder: Path) -> str:
    """A link to the report, where one lies beside the weights."""
    if not (folder / REPORT).is_file():
        return ""
    return f"## Look at it\n\n[{REPORT}]({REPORT}) shows lineage, layers and checks; it opens in any browser, without a network."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *("| " + " | ".join(row) + " |" for row in rows)]
    return f"## {title}\n\n" + "\n".join(lines)


def _safe(text: str) -> str:
    """A name as text: nothing in it is markup."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
