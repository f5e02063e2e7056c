"""Evidence that several processes collect together: the values of one, cut off and gone on with, and what is said where one of them fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import run
from thetau.errors import DataError
from thetau.evidence import FisherConfig, MomentConfig, collect_fisher, collect_second_moments
from thetau.evidence import jobs as room
from thetau.evidence.jobs import Jobs, Opened, Share
from thetau.evidence.moments import Run
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder, read_weights, weights_hash
from thetau.tasks import encode, load_task
from tiny import make_model, make_task
from tiny import one_thread as one_thread

F32 = torch.finfo(torch.float32).eps
EXAMPLES = 22


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a task, and a model fine-tuned on it."""
    folder = tmp_path_factory.mktemp("jobs")
    torch.set_num_threads(1)
    base = make_model(folder / "base")
    task = load_task(make_task(folder / "data", "animals"))
    finetune(load_encoder(base), task, folder / "tuned", FinetuneConfig(steps=10, lr=5e-3, batch_size=16), base=str(base))
    return folder


@dataclass(frozen=True)
class Opening:
    """Opens the model; at the first time in another process it does what `first` says, which leaves a mark."""

    place: Path
    mark: Path | None = None
    first: str = ""

    def __call__(self) -> Opened:
        if self.mark is not None and not self.mark.exists():
            self.mark.touch()
            if self.first == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError(f"{self.place}: holds no model. Give its folder.")
        return Opened(
            encoder=load_encoder(self.place / "base"),
            task=load_task(self.place / "data" / "animals"),
            weights=read_weights(self.place / "tuned"),
        )


class OnTheSpot:
    """Does another process's work when it is started, since a new process takes seconds to begin."""

    exitcode = 0

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> None:
        self.target, self.args = target, args

    def start(self) -> None:
        self.target(*self.args)

    def join(self) -> None:
        pass

    terminate = join


@pytest.fixture
def spot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "Process", OnTheSpot)


def collect(kind: str, opening: Opening, out: Path, jobs: int | None, **more: Any) -> Mapping[str, torch.Tensor]:
    """The file that so many processes collect; the encoder is left as it was."""
    opened, given = Opening(opening.place)(), None if jobs is None else Jobs(count=jobs, open=opening)
    subject = (opened.encoder, opened.task, opened.weights, out)
    tick = more.pop("tick", None)
    if kind == "fisher":
        collect_fisher(*subject, FisherConfig(examples=EXAMPLES, batch=4, save_every=4, **more), jobs=given, tick=tick)
    else:
        config = MomentConfig(examples=EXAMPLES, batch=4, save_every=4, **more)
        moment: Any = kind
        collect_second_moments(*subject, moment, config, jobs=given, tick=tick)
    assert weights_hash(opened.encoder.weights()) == opened.encoder.base_hash
    return load_file(out)


def away(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> float:
    """The largest distance of two tensors, over the norm."""
    assert sorted(got) == sorted(want)
    return max(float((got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-30)) for name in want)


@pytest.mark.usefixtures("spot")
@pytest.mark.parametrize("kind", ["fisher", "gram", "gradients"])
@pytest.mark.parametrize("jobs", [2, 3, 9])
def test_the_values_are_those_of_one_process(place: Path, tmp_path: Path, kind: str, jobs: int) -> None:
    """Nine have more processes than there are batches: some of them have nothing to do."""
    alone = collect(kind, Opening(place), tmp_path / "alone.safetensors", None)
    done: list[int] = []
    together = collect(kind, Opening(place), tmp_path / "together.safetensors", jobs, tick=done.append)
    # Sums of up to 22 float32 terms, taken in another order.
    assert away(together, alone) <= EXAMPLES * F32
    assert sum(done) == EXAMPLES
    again = collect(kind, Opening(place), tmp_path / "again.safetensors", jobs)
    assert all(torch.equal(again[name], together[name]) for name in together), "as many processes give the same bits"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "alone.safetensors", "together.safetensors"]


def test_a_share_takes_every_so_many_th_batch() -> None:
    batches = [[index] for index in range(7)]
    shares = [Share(number=number, count=3).of(batches) for number in range(3)]
    assert shares[0] == [[0], [3], [6]]
    assert sorted(batch for share in shares for batch in share) == batches
    with pytest.raises(DataError, match=r"jobs must be at least 1\. Got 0"):
        Jobs(count=0, open=Opening(Path()))


@pytest.mark.usefixtures("spot")
def test_processes_share_the_memory(place: Path, tmp_path: Path) -> None:
    opened = Opening(place)()
    inputs = encode(opened.encoder, opened.task, "train", limit=EXAMPLES, max_length=32)
    whole = MomentConfig(memory=1_000_000)
    sizes = [8 * Run(opened.encoder, inputs, whole).side(name) ** 2 for name in Run(opened.encoder, inputs, whole).groups[0]]
    config = MomentConfig(memory=sum(sizes))
    assert len(Run(opened.encoder, inputs, config).groups) == 1
    shared = Run(opened.encoder, inputs, config, share=Share(number=1, count=2))
    assert len(shared.groups) >= 2
    alone = collect("gram", Opening(place), tmp_path / "alone.safetensors", None)
    together = collect("gram", Opening(place), tmp_path / "together.safetensors", 2, memory=sum(sizes))
    assert away(together, alone) <= EXAMPLES * F32


def test_processes_that_are_killed_and_started_again(place: Path, tmp_path: Path) -> None:
    """In processes that are really others: the first time one dies before it has done anything."""
    want = collect("fisher", Opening(place), tmp_path / "alone.safetensors", 1)
    out, opening = tmp_path / "f.safetensors", Opening(place, tmp_path / "mark", "killed")
    with pytest.raises(DataError, match=r"task 'animals': process 2 of 2 was ended from outside \(exit code -9\).*fewer --jobs"):
        collect("fisher", opening, out, 2)
    assert not out.exists()
    (state,) = tmp_path.glob(".f.safetensors.*.training")
    got = collect("fisher", opening, out, 2)
    assert away(got, want) <= EXAMPLES * F32
    assert not state.exists()


@pytest.mark.usefixtures("spot")
@pytest.mark.parametrize("kind", ["fisher", "gradients"])
def test_what_was_summed_is_not_summed_again(place: Path, tmp_path: Path, kind: str) -> None:
    whole = collect(kind, Opening(place), tmp_path / "whole.safetensors", 2)
    out = tmp_path / "cut.safetensors"

    class Stop(Exception):
        pass

    def stop(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 16:  # the first process is in its last batch, the second one has ended
            raise Stop

    seen = 0
    with pytest.raises(Stop):
        collect(kind, Opening(place), out, 2, tick=stop)
    again: list[int] = []
    got = collect(kind, Opening(place), out, 2, tick=again.append)
    assert again[0] >= 4, "from the state of the first process"
    assert all(torch.equal(got[name], whole[name]) for name in whole)


@pytest.mark.parametrize("memories", [(8_000, 1_000_000), (1_000_000, 8_000)], ids=["more", "less"])
@pytest.mark.parametrize("jobs", [None, 2])
@pytest.mark.usefixtures("spot")
def test_it_goes_on_in_another_memory(place: Path, tmp_path: Path, memories: tuple[int, int], jobs: int | None) -> None:
    """What lies there of other layers together is not taken for what is asked now."""
    want = collect("gram", Opening(place), tmp_path / "whole.safetensors", jobs)
    out = tmp_path / "cut.safetensors"

    class Stop(Exception):
        pass

    def stop(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 16:
            raise Stop

    seen = 0
    with pytest.raises(Stop):
        collect("gram", Opening(place), out, jobs, memory=memories[0], tick=stop)
    got = collect("gram", Opening(place), out, jobs, memory=memories[1])
    assert away(got, want) <= EXAMPLES * F32


@pytest.mark.usefixtures("spot")
def test_what_goes_wrong_in_another_process_is_said(place: Path, tmp_path: Path) -> None:
    opening = Opening(place, tmp_path / "mark", "error")
    with pytest.raises(DataError, match=r"task 'animals': process 2 of 2: .*: holds no model\. Give its folder\."):
        collect("gram", opening, tmp_path / "g.safetensors", 2)
    assert not (tmp_path / "g.safetensors").exists()


@pytest.mark.usefixtures("spot")
def test_the_command(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = ["--model", str(place / "tuned"), "--data", str(place / "data"), "--examples", "12", "--set", "batch=4"]
    for kind in ("fisher", "gram", "gradients"):
        files = [tmp_path / f"{kind}-{jobs}.safetensors" for jobs in (1, 2)]
        for jobs, file in zip(("1", "2"), files, strict=True):
            words = [*data, "--device", "cpu", "--jobs", jobs, "-o", str(file)]
            code, text = run(capsys, "evidence", kind, *words)
            assert code == 0, text
        assert away(*map(load_file, files)) <= 12 * F32
    words = [*data, "-o", str(tmp_path / "x.safetensors")]
    code, text = run(capsys, "evidence", "gram", *words, "--device", "nowhere")
    assert code == 1
    assert "device 'nowhere' cannot be used" in text
    code, text = run(capsys, "evidence", "gram", *words, "--jobs", "0")
    assert code == 2
    assert not (tmp_path / "x.safetensors").exists()
