"""Statistics passes: what they are (data, for the plan), and how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from thetau._lazy import torch
from thetau.checkpoint.window import Window
from thetau.engine import compiled
from thetau.engine.aligned import Aligned
from thetau.engine.apply import Apply, part_call
from thetau.engine.demand import statistic_step
from thetau.engine.executor import Engine
from thetau.engine.guard import Guard
from thetau.engine.window import blocks, windows
from thetau.engine.work import Work
from thetau.parts import Part, State, Statistic
from thetau.plan import Pass, Step

SHARE = 32  # a look is at one entry in so many, or at more where that would be fewer than `LOOK` entries of whole task vectors
LOOK = 1 << 22
TENSOR_LOOK, TENSOR_SHARE = 1 << 20, 8  # the smallest tensor that is looked at where each has a result of its own, and the share


@dataclass(frozen=True)
class StatisticPass:
    """A walk for the statistic of one stage: as the plan shows it, for which stage, and which of its rounds it makes.

    - `rounds`: those that are made of a tensor before the next one; several where each tensor has a result of its own, none for the
      round that has a guess.
    - `spare`: made only where the guess was wrong; the plan does not count it.
    """

    stage: int
    rounds: range
    statistic: Statistic
    walk: Pass
    spare: bool = False

    def told(self) -> str:
        """What it is, for progress and errors."""
        if self.walk.share > 1:
            return f"{self.walk.what}, a look at one entry in {self.walk.share}"
        if len(self.rounds) != 1:
            return self.walk.what
        return f"{self.walk.what}, pass {self.rounds[0] + 1} of {self.statistic.rounds}"


def statistic_passes(aligned: Aligned, engine: Engine) -> list[StatisticPass]:
    """The walks before the last one, in order; reads headers only."""
    found: list[StatisticPass] = []
    held = 0
    elements = [aligned.alignment.specs[name].elements for name in aligned.selected]
    tasks = len(aligned.tasks)
    for stage, part in enumerate(aligned.chain.stages):
        statistic = part.requires()
        if statistic is None:
            continue
        solving = part.solving(tasks, elements)
        kept = statistic.held(tasks, elements)
        what = f"{type(statistic).__name__} for {type(part).__name__.lower()}"
        first = not any(one.walk.share == 1 for one in found)
        every = range(statistic.rounds)
        turns = [every] if statistic.per_tensor else [every[round_ : round_ + 1] for round_ in every]
        walks = [
            tuple(
                statistic_step(aligned, engine, statistic, stage, turn[0], name, first=first and turn[0] == 0, rounds=len(turn))
                for name in aligned.selected
            )
            for turn in turns
        ]
        share = min(SHARE, sum(elements) // LOOK)
        guided = bool(statistic.guided) and len(turns) > 1 and share >= 4 and all(step.by == "loop" for step in walks[0])
        if guided:
            look = tuple(replace(step, read=step.read // share) for step in walks[0])
            found.append(StatisticPass(stage, every[:1], statistic, Pass(what, look, held=held, share=share)))
            made = Pass(what, walks[0], held=held + kept, flops=solving.flops, memory=solving.memory)
            found.append(StatisticPass(stage, every[:0], statistic, made))
        for turn, walk in zip(turns, walks, strict=True):
            last = turn[-1] == every[-1]
            made = Pass(what, walk, held=held + kept, flops=solving.flops if last else 0.0, memory=solving.memory if last else 0)
            found.append(StatisticPass(stage, turn, statistic, made, spare=guided))
        held += kept
    return found


@dataclass(frozen=True)
class Preparation:
    """Makes the passes of a merge, stage by stage."""

    aligned: Aligned
    engine: Engine
    guard: Guard
    passes: Sequence[StatisticPass]
    guards: Sequence[Guard]

    def states(self) -> list[State]:
        """The state of every stage."""
        for one in self.passes:  # all of it before the first byte
            self.engine.check(one.walk.steps, one.told(), one.walk.held)
            self.engine.allow(one.walk.memory + one.walk.held, f"{one.told()}: what is then solved")
        states: list[State] = []
        first = self.aligned.site(self.aligned.selected[0])
        for stage, part in enumerate(self.aligned.chain.stages):
            result = self._measured(stage, part, states)
            states.append(part_call(part, first, part.prepare, result, self.aligned.tasks))
        return states

    def _measured(self, stage: int, part: Part, states: list[State]) -> Any:
        seen: Any = None
        full = next((one for one in self.passes if one.walk.share == 1), None)
        for one in self.passes:
            if one.stage != stage or (one.spare and one.statistic.done(seen)):
                continue
            apply = Apply(self.aligned, self.engine, self.guard, list(states), check=one is full)
            work = Measurement(apply, one, seen, tuple(self.guards))
            if one.statistic.per_tensor:
                made = self.engine.run(one.walk.steps, work, one.told(), held=one.walk.held)
                seen = {step.name: result for step, result in made}
                continue
            total = self.engine.reduce(one.walk.steps, work, one.statistic.fold, one.told(), held=one.walk.held)
            seen = one.statistic.guess(total) if one.walk.share > 1 else one.statistic.finish(total, seen)
        return seen


@dataclass(frozen=True)
class Measurement(Work):
    """The work of one statistics pass, which may run in another process: a tensor's part of it."""

    apply: Apply
    walk: StatisticPass
    seen: Any
    watching: tuple[Guard, ...]

    def guards(self) -> Sequence[Guard]:
        """Those of the merge and of the merges below it."""
        return self.watching

    def __call__(self, step: Step) -> Any:
        """One tensor's total; its result, after all rounds, where each tensor has its own."""
        statistic, aligned, name = self.walk.statistic, self.apply.aligned, step.name
        if not statistic.per_tensor:
            round_ = self.walk.rounds[0] if self.walk.rounds else None
            return self._total(step, round_, self.seen, self.apply, self.walk.walk.share)
        turns: list[int | None] = [*self.walk.rounds]
        seen: Any = None
        if step.by == "loop" and statistic.guided and aligned.alignment.specs[name].elements >= TENSOR_LOOK:
            seen = statistic.guess(self._total(step, 0, None, self.apply.trusting(), TENSOR_SHARE))
            turns = [None, *turns]
        for number, round_ in enumerate(turns):
            if statistic.done(seen):
                break
            total = self._total(step, round_, seen, self.apply if number == 0 else self.apply.trusting())
            seen = part_call(aligned.chain.stages[self.walk.stage], aligned.site(name), statistic.finish, total, seen)
        return seen

    def _total(self, step: Step, round_: int | None, seen: Any, apply: Apply, share: int = 1) -> Any:
        """Of a round, or of that with the guess; a round that has no compiled form may follow one that has."""
        statistic = self.walk.statistic
        kind = statistic.guided if round_ is None else statistic.compiled[round_]
        if step.by != "loop" or not kind:
            return self._walk(step.name, seen, apply)
        return compiled.measure(apply, statistic, kind, self.walk.stage, step.name, seen, share)

    def _walk(self, name: str, mine: Any, apply: Apply) -> Any:
        aligned, chain, stage = apply.aligned, apply.aligned.chain, self.walk.stage
        part = chain.stages[stage]
        spec = aligned.alignment.specs[name]
        late = stage > len(chain.transforms)  # a stage after the reduction: it sees the merged tensor and the stack
        at_once = chain.access != "block" and (late or any(p.access == "whole" for p in chain.transforms[:stage]))
        nested = any(source.whole(theirs) for source, theirs in aligned.readers(name))
        reach = spec.elements if at_once or nested else apply.engine.reach(len(aligned.sources) + len(aligned.testimony))
        total: Any = None
        for low, high in windows(spec, reach):
            window = Window(name, low, high)
            for start, stop in [(low, high)] if at_once else blocks(spec, low, high):
                site = aligned.site_at(window, start, stop)
                if not late:
                    stack = apply.transformed(window, start, stop, site, stage)
                elif chain.access == "block":
                    inner = apply.transformed(window, start, stop, site)
                    merged = apply.merged(inner, site, stage - len(chain.transforms) - 1)
                    stack = torch.cat([merged[None], inner])
                else:
                    merged, inner = apply.tensor(window)
                    stack = torch.cat([merged[None], inner])
                total = part_call(part, site, self.walk.statistic.add, total, stack, site, mine)
        return total
