"""Things to report on, small or hostile, and a reader of pages that is strict: what a browser would make of them, as far as that can be told without one."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from thetau.diagnostics.doctor import Advice, Doctor, Finding, Group, Harm, HitRate, OnTask, Pair, Spectrum, Subject
from thetau.evaluate.accuracy import Accuracy
from thetau.evaluate.search import ScaleTrial
from thetau.studies.suite_results import Row, SuiteResults, TaskFacts

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "</script><script>alert(2)</script>",
    "'; alert(3); '",
    "{{ 7 * 7 }}{% raw %}",
    "a\u202egnp.exe\x00\ud800",
    "</style><svg/onload=alert(4)>",
    "]]><!--",
    "&lt;b&gt; &amp;",
    "`</code><b>x</b>`",
)
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "main",
        "section",
        "nav",
        "footer",
        "script",
        "details",
        "summary",
    ),
    *(
        "a",
        "div",
        "p",
        "button",
        "h1",
        "h2",
        "h3",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "figure",
        "figcaption",
        "label",
        "input",
        "span",
    ),
    *(
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "pre",
        "code",
        "svg",
        "defs",
        "pattern",
        "rect",
        "circle",
        "line",
        "path",
        "text",
    ),
}


@dataclass
class Element:
    """One element: its tag, its attributes, and its own text."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Read(HTMLParser):
    """A page taken apart."""

    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        assert len(element.attributes) == len(attrs), f"an attribute twice: {attrs}"
        self.elements.append(element)
        if tag not in ("meta", "input"):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1].tag == tag, f"</{tag}> closes {self.open[-1].tag if self.open else 'nothing'}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open[-1:]:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]


def read_page(text: str) -> Read:
    """Take a page apart, and refuse one that is not whole, asks for anything outside, or could run what is not ours."""
    page = Read()
    page.feed(text)
    page.close()
    assert not page.open, f"not closed: {[element.tag for element in page.open]}"
    assert {element.tag for element in page.elements} <= TAGS
    for element in page.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("style", "src", "srcdoc", "action", "formaction", "xlink:href"), (
                name,
                value,
            )
            if name == "href":
                assert re.fullmatch(r"#[a-z-]+", value), value
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    (style,) = page.all("style")
    assert "@import" not in style.text and not re.findall(r"url\((?!#)", style.text)
    own = [script for script in page.all("script") if script.attributes.get("type") != "application/json"]
    assert len(own) == 1
    (policy,) = [one.attributes["content"] for one in page.all("meta") if "http-equiv" in one.attributes]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for element in (own[0], style):
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|WebSocket|eval|innerHTML|outerHTML|insertAdjacentHTML|document\.write)\b", own[0].text
    )
    for script in page.all("script"):
        if script is not own[0]:
            json.loads(script.text)
    return page


def words(page: Read) -> str:
    """All that can be read on a page, tips and hidden figures included."""
    parts = [element.text for element in page.elements if element.tag not in ("script", "style")]
    parts += [element.attributes.get("data-tip", "") for element in page.elements]
    parts += [script.text for script in page.all("script") if script.attributes.get("type") == "application/json"]
    return "\n".join(parts)


def suite_results(
    methods: int = 4, tasks: int = 3, *, names: tuple[str, ...] = (), seed: int = 0, memory: bool = False
) -> SuiteResults:
    """Results of a suite that never ran."""
    draw = random.Random(seed)
    called = [names[i % len(names)] + str(i // len(names) or "") if names else f"task{i}" for i in range(tasks)]
    rows = []
    for i, role in enumerate(["pretrained", "individual", *["merged"] * methods]):
        accuracy = {task: Accuracy.of(draw.randint(40, 100) if role != "individual" else 100, 100) for task in called}
        mean = sum(one.value for one in accuracy.values()) / tasks
        merged: dict[str, Any] = {
            "method": f"Method(scale={i})",
            "scale": 0.5,
            "trials": (ScaleTrial(scale=0.5, normalised=0.8), ScaleTrial(scale=1.0, normalised=0.7)),
            "merge_seconds": round(draw.uniform(0.5, 50), 2),
            "peak_gigabytes": round(draw.uniform(0.5, 4), 2) if memory else None,
        }
        name = names[i % len(names)] + f" {i}" if names else f"method {i}" if role == "merged" else role
        rows.append(
            Row(name=name, role=role, accuracy=accuracy, absolute=mean, normalised=mean, **(merged if role == "merged" else {}))
        )  # type: ignore[arg-type]
    facts = [
        TaskFacts(
            name=task,
            kind="text",
            labels=("no", "yes"),
            licence=names[0] if names else "MIT",
            source=names[-1] if names else "here",
            train=10,
            validation=20,
            test=100,
            truncated_test=0,
            config={"steps": 3},
            finetune_key="",
            finetune_seconds=1.0,
            first_loss=2.0,
            last_loss=1.0,
        )
        for task in called
    ]
    return SuiteResults(
        suite=names[0] if names else "demo",
        description=names[1] if names else "A suite.",
        backbone=names[2] if names else "tiny",
        base_hash="",
        tasks=tuple(facts),
        rows=tuple(rows),
        limits={"validation": 20, "test": 100},
        quick=False,
        versions={"thetau": "0", (names[3] if names else "torch"): "1"},
        seconds=3.0,
    )


def doctor_result(models: int = 3, *, names: tuple[str, ...] = (), layers: int = 2, seed: int = 0) -> Doctor:
    """A doctor's result of models that never were."""
    draw = random.Random(seed)
    called = tuple((names[i % len(names)] + str(i // len(names) or "")) if names else f"model{i}" for i in range(models))
    hostile = names[0] if names else "plain"

    def subject(name: str) -> Subject:
        return Subject(
            name=name,
            path=name,
            form="model",
            architecture=hostile,
            dtypes={hostile: 3},
            quantised="",
            tensors=3,
            parameters=10,
            norm=2.0,
            shift=float("nan") if name == called[0] else 0.1,
            tied=(hostile,),
            beside=(hostile,),
            notes=(hostile,),
            problems=(),
        )

    def group(by: Any, name: str) -> Group:
        cosine = [[1.0 if i == j else draw.uniform(-1, 1) for j in range(models)] for i in range(models)]
        return Group(by=by, name=name, tensors=1, parameters=1, base=1.0, norms=(0.1,) * models, cosine=tuple(map(tuple, cosine)))

    pairs = [
        Pair(
            a=called[i],
            b=called[j],
            cosine=draw.uniform(-1, 1),
            projection=0.1,
            back=0.2,
            steady=0.0,
            steady_back=0.0,
            distance=1.0,
            overlap=0.3,
            conflict=0.5,
            inputs=0.1,
            outputs=0.1,
            inputs_by_chance=0.05,
            outputs_by_chance=0.05,
            a_on_b=0.4,
            b_on_a=None,
        )
        for i in range(models)
        for j in range(i)
    ]
    spectra = [
        Spectrum(
            model=name,
            tensor=f"layer.{k}.{hostile}",
            kind="mlp",
            layer=k,
            full=8,
            stable_rank=2.0,
            effective_rank=3.0,
            exact=True,
            shares=(0.6, 0.3, 0.1),
        )
        for name in called
        for k in range(layers)
    ]
    return Doctor(
        base=subject("base"),
        models=tuple(map(subject, called)),
        compared=called,
        staying=called[1:],
        groups=(
            group("whole", ""),
            *(group("layer", str(k)) for k in range(layers)),
            group("kind", "mlp"),
            group("kind", hostile),
        ),
        spectra=tuple(spectra),
        pairs=tuple(pairs),
        harms=(
            Harm(
                method="average",
                scale=None,
                whole=(0.5,) * (models - 1),
                layers={str(k): (0.5,) * (models - 1) for k in range(layers)},
            ),
            Harm(method=hostile, scale=0.3, whole=(0.2,) * (models - 1), layers={"0": (0.2,) * (models - 1)}),
        ),
        best_scale=0.4,
        candidates=None,
        findings=(
            Finding(
                kind="duplicate",
                models=called[:2],
                sentence=f"{called[0]} is {called[-1]}.",
                figures={"cosine": 1.0, hostile: 2.0},
            ),
        ),
        advice=(
            Advice(
                topic="leave out",
                models=called[:1],
                sentence=f"Leave out {called[0]}.",
                evidence=hostile,
                uncertainty=hostile,
                measured=HitRate(hits=7, n=10, low=0.4, high=0.9, what=hostile),
            ),
        ),
        notes=(hostile,),
        tasks=tuple(
            OnTask(
                task=f"{hostile} {number}",
                own=called[0] if number == 0 else "",
                split=hostile,
                n=3,
                metric=hostile,
                unit=1.0,
                base_loss=1.0,
                base_score=0.5,
                loss=tuple(draw.uniform(0, 2) for _ in called),
                score=(0.5,) * models,
                tau_jp=tuple(draw.uniform(0.1, 1) for _ in called),
                direction=(None, *(0.1,) * (models - 1)),
                magnitude=(float("nan"),) * models,
                layers={str(k): (0.1,) * models for k in range(layers)},
            )
            for number in range(2)
        ),
    )


# Files that somebody changed.

JUNK: tuple[Any, ...] = (None, 1, -1, 1.5, "", "x", [], {}, [1], {"a": 1}, True, [[]], [None])


def places(document: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON document."""
    parts = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    return [found for key, value in parts for found in ((*above, key), *places(value, (*above, key)))]


def changed(document: Any, draw: random.Random) -> Any:
    """The same with one thing in it left out, or put in another's place."""
    made = copy.deepcopy(document)
    *above, last = draw.choice(places(made))
    at = made
    for key in above:
        at = at[key]
    if draw.random() < 0.3:
        del at[last]
    else:
        at[last] = draw.choice(JUNK)
    return made
