"""What the command line says: at first, as JSON, while it works, and where something is wrong that is nobody's bug."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import thetau.facade
from commands import folder as folder
from commands import run
from thetau.cli.app import app
from thetau.cli.methods import _PARTS
from thetau.cli.progress import bar as engine_bar
from thetau.cli.tables import show, table
from thetau.evaluate import Evaluator
from thetau.evaluate.grids import search
from thetau.finetune.progress import bar
from thetau.models import load_encoder
from thetau.pace import Plain, counted, doing, each, steps, watched
from thetau.tasks import load_task
from thetau.tasks.encoding import features
from tiny import make_model, make_task

PARADIGMS = Path(__file__).parents[2] / "experiments" / "paradigms" / "results.json"


def test_alone_it_says_what_to_do_first(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys)
    assert code == 0
    assert all(f"thetau {verb}" in text for verb in ("doctor", "merge", "report", "methods", "--help"))
    assert max(map(len, text.splitlines())) <= 80


def test_methods_stand_by_need_and_cost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, text = run(capsys, "methods")
    places = [text.index(f"{part}:") for part in _PARTS if f"{part}:" in text]
    assert places == sorted(places) and len(places) == 5
    order = [
        text.index(f"\n{name} ")
        for name in ("average", "ties", "wudi", "doge_ta", "slerp", "karcher", "fisher", "regmean", "awd")
    ]
    assert order == sorted(order), "rows before streams before whole tensors, few passes before many"


def test_what_is_printed_can_be_had_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written(*arguments: str) -> Any:
        code, text = run(capsys, *arguments, "--json", "told.json")
        assert code == 0, text
        return json.loads((folder / "told.json").read_text())

    assert written("suite", "list")["demo"]["tasks"][0] == "clinc_domain"
    models = ("-b", "base", "-m", "a", "-m", "b", "--method", "ties")
    planned = written("merge", *models, "--dry-run")
    assert (
        planned["tensors"] == 17
        and len(planned["passes"]) == 3
        and planned["read"] == sum(one["read"] for one in planned["passes"])
    )
    assert run(capsys, "merge", *models, "-o", "merged", "-q")[0] == 0
    assert written("verify", "merged")["good"] is True
    path = folder / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    code, text = run(capsys, "verify", "merged", "--json", "told.json")
    told = json.loads((folder / "told.json").read_text())
    assert code == 1 and told["good"] is False and told["problems"][0] in text
    assert run(capsys, "vector", "extract", "-b", "base", "-m", "a", "-o", "a.safetensors", "-q")[0] == 0
    told = written("vector", "info", "a.safetensors")
    assert told["form"] == "dense" and told["norm"] == pytest.approx(
        (thetau.facade.open("a") - thetau.facade.open("base")).norm()
    )
    code, text = run(capsys, "merge", *models, "-o", "x", "--json", "told.json")
    assert code == 1 and "`--json` writes the plan of `--dry-run`" in text


def test_a_caption_is_one_line_below_a_narrow_table(capsys: pytest.CaptureFixture[str]) -> None:
    made = table(
        "a caption that is far longer than [the] table is wide, and stays in one line where it is read by a program", "x"
    )
    made.add_row("1")
    show(made)
    assert capsys.readouterr().out.splitlines()[-1] == made.caption


def verbs(command: Any, name: str = "thetau") -> dict[str, Any]:
    """Every verb by its whole name."""
    if not hasattr(command, "commands"):
        return {name: command}
    parts = ((part, command.get_command(None, part)) for part in command.commands)
    return {word: verb for part, inner in parts for word, verb in verbs(inner, f"{name} {part}").items()}


def test_every_verb_that_prints_a_table_has_json() -> None:
    known = verbs(typer.main.get_command(app))
    printing = {
        name
        for name, verb in known.items()
        if re.search(r"\b(show|show_rows|print_table)\(", inspect.getsource(inspect.getmodule(inspect.unwrap(verb.callback))))
    }
    assert {"thetau suite run", "thetau search", "thetau diagnose layers", "thetau compare", "thetau basis show"} <= printing
    without = {name for name in printing if "--json" not in [word for option in known[name].params for word in option.opts]}
    assert not without, "the table of these can be had in no other form"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        ("nope", "it is no JSON"),
        ('{"suite": "x", "rows": []}', "it lacks backbone, base_hash, tasks"),
        ('{"suite": 1}', "it lacks backbone"),
    ],
)
def test_a_file_of_another_kind_is_named_with_the_remedy(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    code, text = run(capsys, "diagnose", "alpha", str(path), "-o", str(tmp_path / "out"))
    assert code == 1 and str(path) in text and said in text and "thetau suite run --paradigm" in text
    assert "pydantic" not in text and len(text.strip().splitlines()) == 1


def test_a_misspelt_method_is_refused_before_a_model_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, models in (("layers", ["no/model"]), ("landscape", ["x=no/model", "y=no/other"])):
        code, text = run(capsys, "diagnose", verb, *models, "--method", "wudy", "-o", str(tmp_path / "out"))
        assert code == 1 and "wudy" in text and "no/model" not in text


@pytest.mark.parametrize("verb", ["alpha", "single", "cost"])
def test_a_diagnosis_is_written_where_it_is_asked_for(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "diagnose", verb, str(PARADIGMS), "-o", str(tmp_path / "out"), "--json", str(tmp_path / "x.json"))
    assert code == 0, text
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "out" / f"{verb}.json").read_bytes()
    code, text = run(capsys, "diagnose", verb, str(PARADIGMS), "-o", str(tmp_path / "two"), "--json", str(tmp_path))
    assert code == 1 and str(tmp_path) in text and not (tmp_path / "two").exists(), "refused before the work"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (PermissionError(13, "Permission denied", "/models/x"), "error: /models/x: Permission denied."),
        (OSError(28, "No space left on device"), "error: No space left on device."),
        (MemoryError(), "error: out of memory. Give `--max-memory`"),
    ],
)
def test_what_the_machine_refuses_is_said_in_words(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    said: str,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(thetau.facade, "open_base", refuse)
    code, text = run(capsys, "inspect", "base", "a")
    assert code == 1 and said in text and "Traceback" not in text


def test_a_reader_may_leave_early() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for reader in ("head -1", "true"):
        command = f"{sys.executable} -m thetau methods | {reader}"
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.stderr == ""


def test_what_looks_like_markup_in_a_table_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    made = table("of [/b] :smile:", "[red]a", "n")
    made.add_row("[/red]", "1")
    show(made)
    told = capsys.readouterr().out
    assert "of [/b]" in told and ":smile:" in told and "[red]a" in told and "[/red]" in told


# Progress.


def ticking(*times: float) -> Any:
    return iter(times).__next__


def test_plain_lines_come_now_and_then() -> None:
    said: list[str] = []
    plain = Plain(said.append, clock=ticking(0, 0, 5, 12, 20, 75, 80, 90))
    plain.begin("merging", 4e9, "B")
    for _ in range(3):  # at 5, 12 and 20 seconds
        plain.advance(1e9)
    assert said == ["merging: 50 % (167 MB/s, 12 s left)"]
    plain.advance(5e8)  # at 75
    assert said[1:] == ["merging: 88 % (46.7 MB/s, 11 s left)"]
    plain.end()
    plain.begin("verifying", 0, "")
    plain.advance(1)
    assert len(said) == 2, "a new work of the same command does not begin to count anew"


class Recorder:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.steps: list[Any] = []

    def begin(self, text: str, total: float, unit: str) -> None:
        self.told.append((text, total, unit, 0.0))

    def advance(self, done: float) -> None:
        self.told[-1] = (*self.told[-1][:3], self.told[-1][3] + done)

    def end(self) -> None:
        self.told[-1] = (*self.told[-1], "ended")

    def enter(self, what: str, total: int) -> None:
        self.steps.append((what, total))

    def step(self, text: str) -> None:
        self.steps.append(text)

    def leave(self) -> None:
        self.steps.append("left")


def test_nobody_watches_a_library() -> None:
    with counted(3) as advance:
        advance(1)
    seen = Recorder()
    with watched(seen), doing("outer"), counted(2, "x") as advance:
        with doing("inner"), counted(5) as within:
            within(5)
        advance(2)
    assert seen.told == [("outer", 2, "x", 2.0, "ended")]


def test_a_work_of_steps_says_which_of_how_many() -> None:
    said: list[str] = []
    plain = Plain(said.append, clock=ticking(0, 0, 10, 20, 21, 80, 90, 91, 200))
    with watched(plain), steps("row", 4) as step:  # entered at 0
        step("a")  # at 10: due
        with steps("trial", 9) as inner, doing("evaluate"), counted(10, "x") as advance:  # begins at 20
            inner("not told apart")
            advance(5)  # at 21
        step("b")  # at 80
        with doing("evaluate"), counted(10, "x") as advance:  # begins at 90
            advance(5)  # at 91
            advance(5)  # at 200
    assert said == [
        "row 1 of 4, a",
        "row 2 of 4, b; about 4 min left in all",
        "row 2 of 4, b: evaluate: 100 % (0.0909 x/s); about 10 min left in all",
    ]


def test_steps_end_where_the_work_fails_and_grow_where_there_are_more() -> None:
    seen = Recorder()

    def work() -> None:
        for one in each("task", ["a", "b"]):
            if one == "b":
                raise ValueError("no")

    with watched(seen), pytest.raises(ValueError, match="no"):
        work()
    assert seen.steps == [("task", 2), "a", "b", "left"]
    said: list[str] = []
    plain = Plain(said.append, clock=ticking(0, 0, 1, 100))
    plain.enter("trial", 1)
    plain.step("0.2")
    plain.step("0.3")
    assert said == ["trial 2 of 2, 0.3; about 2 min left in all"]


def test_a_sweep_and_a_search_for_a_coefficient_are_told_by_their_steps(tmp_path: Path) -> None:
    seen = Recorder()
    with watched(seen):
        search([0.2, 0.4, 0.6], lambda value: -abs(value - 0.4))
    assert seen.steps == [("trial", 3), "0.2", "0.4", "0.6", "left"]


def test_two_bars_on_a_terminal_and_none_for_what_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from thetau.cli import progress

    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(progress, "console", lambda: screen)
    shown = progress._Bar()
    with watched(shown), steps("row", 2) as step:
        step("a")
        with doing("evaluate"), counted(2, "x") as advance:
            advance(1)
    assert screen.file.getvalue() == ""  # type: ignore[attr-defined]
    monkeypatch.setattr(progress, "SHORT", -1.0)
    with watched(shown), steps("row", 2) as step:
        step("density=[0.1]")
        with doing("evaluate"), counted(2, "x") as advance:
            advance(1)
            assert shown._live is not None
        step("b")
    told = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "row 1: density=[0.1]" in told and "evaluate" in told and "0/2" in told
    assert shown._live is None and shown._outer is None and shown._inner is None


def test_a_tick_takes_the_place_of_whoever_watches(tmp_path: Path) -> None:
    make_task(tmp_path / "data", "animals")
    encoder, task = load_encoder(make_model(tmp_path / "base")), load_task("animals", tmp_path / "data")
    evaluator = Evaluator(encoder, [task])
    seen, ticked = Recorder(), []
    with watched(seen):
        inputs = evaluator.inputs(task.name, "test")
        features(encoder, inputs, ticked.append)
    assert seen.told == [] and sum(ticked) == sum(inputs.lengths), "no bar is begun beside one's own"


def test_heads_and_evaluations_are_told(tmp_path: Path) -> None:
    make_task(tmp_path / "data", "animals")
    encoder, task = load_encoder(make_model(tmp_path / "base")), load_task("animals", tmp_path / "data")
    seen = Recorder()
    with watched(seen):
        evaluator = Evaluator(encoder, [task])
        heads = len(seen.told)
        evaluator.evaluate(encoder.weights(), "test", origin="average, λ = 0.5")
    assert heads >= 1 and all(text == f"head of {task.name} (1 of 1)" for text, *_ in seen.told[:heads])
    assert seen.told[heads][0] == f"evaluate average, λ = 0.5 on {task.name}, test"
    assert all(done == total > 0 and ended == "ended" for _, total, _, done, ended in seen.told)
    with watched(seen), bar("own", 3, "tokens"):
        evaluator.features(encoder.weights(), task.name, "test")
    assert len(seen.told) == heads + 1, "a bar of one's own is enough"


def test_bars_are_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thetau.pace.FIRST", -1.0)
    with bar("fine-tune sst2", 4, "steps") as progress:
        progress.advance(1, "fine-tune sst2, loss 0.30")
    working = engine_bar()
    working.begin("Merging", 8)
    working.advance(2)
    working.end()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["fine-tune sst2, loss 0.30: 25 %", "Merging: 25 %"]
