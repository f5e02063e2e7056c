"""The trials of a search, in memory or in a file that several processes share and that a later run goes on with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final
from uuid import uuid4

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from thetau.checkpoint.disk import Held, Lock, busy, check_place
from thetau.checkpoint.disk.lines import WAIT
from thetau.errors import OutputError, ThetauError
from thetau.studies.searching.journal import Journal
from thetau.studies.searching.objectives import Objective
from thetau.studies.searching.samplers import FAULT, GENERATION, CmaSampler, Sampler, distribution, sampler_of
from thetau.studies.searching.space import Scalar, SearchSpace

DATABASES = (".db", ".sqlite", ".sqlite3")
NAME = "thetau search"
FACTS, WORKER = "facts", "worker"
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@final
class Trials:
    """A study of Optuna's, shared by processes, one trial of each at a time.

    - `path`: a file; with the end of a database's name SQLite, else a journal. None for memory.
    - `facts`: what the trials depend on; those of a file must be the same.

    Use it in a `with`: inside, others know that this process is alive.

    Raises:
        OutputError: the file cannot be read or written, or holds the trials of another search.
    """

    def __init__(
        self,
        path: Path | None,
        space: SearchSpace,
        objectives: Sequence[Objective],
        facts: Mapping[str, Any],
        *,
        sampler: Sampler,
        seed: int,
    ) -> None:
        self._path, self._space, self._sampler, self._seed = path, space, sampler, seed
        self._me = uuid4().hex
        self._alive: Lock | None = None
        self._start = space.start()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if path is not None:
            check_place(path)
            path.parent.mkdir(parents=True, exist_ok=True)
        directions: list[StudyDirection] = [
            StudyDirection.MINIMIZE if one.smaller else StudyDirection.MAXIMIZE for one in objectives
        ]
        with self._turn(), self._wrapped():
            self._study = optuna.create_study(storage=_storage(path), study_name=NAME, directions=directions, load_if_exists=True)
            kept = self._study.user_attrs.get(FACTS)
            if kept is None:
                if self._start is not None:
                    self._study.enqueue_trial(dict(self._start))
                self._study.set_user_attr(FACTS, json.loads(json.dumps(facts)))
        other = [name for name, value in json.loads(json.dumps(facts)).items() if kept is not None and kept.get(name) != value]
        if other:
            raise OutputError(
                f"{path}: holds the trials of another search: {', '.join(other)} {'are' if len(other) > 1 else 'is'} not the same. "
                "Give another name, or remove it."
            )

    def __enter__(self) -> Trials:
        if self._path is not None:
            self._alive = Lock(self._sign(self._me))
        return self

    def __exit__(self, *_: object) -> None:
        if self._alive is not None:
            self._alive.release()

    def ask(self, total: int) -> optuna.Trial | None:
        """The next trial; None where as many as `total` have ended or are at work. One whose process died does not count."""
        with self._turn(), self._wrapped():
            trials = self._study.get_trials(deepcopy=False)
            for one in trials:
                if one.state == TrialState.RUNNING and self._lost(one):
                    self._study.tell(one.number, state=TrialState.FAIL)
                    if self._start is not None and one.params == self._start:
                        self._study.enqueue_trial(dict(self._start))
            counted = [one for one in self._study.get_trials(deepcopy=False) if counts(one) or one.state == TrialState.RUNNING]
            if len(counted) >= total:
                return None
            self._study.sampler = sampler_of(
                self._sampler, self._space.dimensions, self._start, seed=self._seed, number=len(trials)
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Optuna's own arguments, which nobody gave here
                trial = self._study.ask({one.name: distribution(one) for one in self._space.dimensions})
            trial.set_user_attr(WORKER, self._me)
            match self._study.sampler:
                case CmaSampler() if trial.params != self._start:  # the recipe's own values were not drawn
                    trial.set_user_attr(GENERATION, self._study.sampler.generation)
            return trial

    def report(self, trial: optuna.Trial, rung: int, losses: Sequence[float], value: float | None) -> list[list[float]]:
        """Note what a trial gave at a rung; the losses of the others that came there. `value`: of the only objective."""
        with self._wrapped():
            others = [
                one.user_attrs[_rung(rung)] for one in self._study.get_trials(deepcopy=False) if _rung(rung) in one.user_attrs
            ]
            trial.set_user_attr(_rung(rung), list(losses))
            if value is not None:
                trial.report(value, rung)
            return others

    def note(self, trial: optuna.Trial, facts: Mapping[str, Any]) -> None:
        """Keep plain values of a trial."""
        with self._wrapped():
            for name, value in facts.items():
                trial.set_user_attr(name, value)

    def tell(self, trial: optuna.Trial, state: TrialState, values: Sequence[float] | None = None) -> None:
        """End a trial."""
        with self._wrapped():
            self._study.tell(trial, values, state=state)

    def ended(self) -> list[FrozenTrial]:
        """Those that ended by themselves, in the order in which they began."""
        with self._wrapped():
            return [one for one in self._study.get_trials(deepcopy=False) if counts(one)]

    def _lost(self, trial: FrozenTrial) -> bool:
        """Whether the process of a running trial is gone. Call it in turn."""
        worker = trial.user_attrs.get(WORKER)
        if worker == self._me:
            return False
        if worker is None or self._path is None or not self._sign(worker).exists():  # None: it died while it asked
            return True
        try:
            Lock(self._sign(worker)).release()
        except Held:
            return False
        return True

    def _sign(self, worker: str) -> Path:
        assert self._path is not None
        return self._path.with_name(f".{self._path.name}.{worker}")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """No other process asks meanwhile."""
        if self._path is None:
            yield
            return
        try:
            lock = Lock(self._path.with_name(f".{self._path.name}.turn"), wait=WAIT)
        except Held as error:
            raise busy(self._path, error.holder) from error
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error.strerror or error}.") from error
        with lock:
            yield

    @contextmanager
    def _wrapped(self) -> Iterator[None]:
        """Errors of the storage as ours."""
        try:
            yield
        except ThetauError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise OutputError(
                f"{self._path or 'the trials'}: cannot be read or written as a search's trials ({reason}). Give another name."
            ) from error


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial ended by itself: one that was cut off has no error of its own."""
    return trial.state in _ENDED and (trial.state != TrialState.FAIL or FAULT in trial.user_attrs)


def values_of(trial: FrozenTrial | optuna.Trial) -> dict[str, Scalar]:
    """The values of its dimensions."""
    return dict(trial.params)


def _rung(number: int) -> str:
    return f"rung {number}"


def _storage(path: Path | None) -> Any:
    if path is None:
        return None
    if path.suffix.lower() in DATABASES:
        return optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}", engine_kwargs={"connect_args": {"timeout": WAIT}})
    return optuna.storages.JournalStorage(Journal(path))
