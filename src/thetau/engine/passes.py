"""Statistics passes: what they are (data, for the plan), and how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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


@dataclass(frozen=True)
class StatisticPass:
    """One round of the statistic of one stage: the walk as the plan shows it, and which stage it is for."""

    stage: int
    round: int
    statistic: Statistic
    walk: Pass


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
        for round_ in range(statistic.rounds):
            last = round_ == statistic.rounds - 1
            walk = Pass(
                f"{type(statistic).__name__} for {type(part).__name__.lower()}",
                tuple(
                    statistic_step(aligned, engine, statistic, stage, round_, name, first=not found) for name in aligned.selected
                ),
                held=held + kept,
                flops=solving.flops if last else 0.0,
                memory=solving.memory if last else 0,
            )
            found.append(StatisticPass(stage, round_, statistic, walk))
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
            what = f"{one.walk.what}, pass {one.round + 1} of {one.statistic.rounds}"
            self.engine.check(one.walk.steps, what, one.walk.held)
            self.engine.allow(one.walk.memory + one.walk.held, f"{what}: what is then solved")
        states: list[State] = []
        first = self.aligned.site(self.aligned.selected[0])
        for stage, part in enumerate(self.aligned.chain.stages):
            result = self._measured(stage, part, states)
            states.append(part_call(part, first, part.prepare, result, self.aligned.tasks))
        return states

    def _measured(self, stage: int, part: Part, states: list[State]) -> Any:
        seen: Any = None
        for one in self.passes:
            if one.stage != stage:
                continue
            apply = Apply(self.aligned, self.engine, self.guard, list(states), check=one is self.passes[0])
            work = Measurement(apply, one, seen, tuple(self.guards))
            what = f"{type(one.statistic).__name__}, pass {one.round + 1} of {one.statistic.rounds}"
            if one.statistic.per_tensor:
                seen = {step.name: result for step, result in self.engine.run(one.walk.steps, work, what, held=one.walk.held)}
            else:
                total = self.engine.reduce(one.walk.steps, work, one.statistic.fold, what, held=one.walk.held)
                seen = one.statistic.finish(total, seen)
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
        """One tensor's total; its result where each tensor has its own."""
        statistic, aligned, name = self.walk.statistic, self.apply.aligned, step.name
        mine = self.seen[name] if statistic.per_tensor and isinstance(self.seen, dict) else self.seen
        if step.by == "loop":  # noqa: SIM108
            total = compiled.measure(self.apply, statistic, self.walk.round, self.walk.stage, name, mine)
        else:
            total = self._walk(name, mine)
        if not statistic.per_tensor:
            return total
        return part_call(aligned.chain.stages[self.walk.stage], aligned.site(name), statistic.finish, total, mine)

    def _walk(self, name: str, mine: Any) -> Any:
        aligned, chain, stage = self.apply.aligned, self.apply.aligned.chain, self.walk.stage
        part = chain.stages[stage]
        spec = aligned.alignment.specs[name]
        late = stage > len(chain.transforms)  # a stage after the reduction: it sees the merged tensor and the stack
        at_once = chain.access != "block" and (late or any(p.access == "whole" for p in chain.transforms[:stage]))
        nested = any(source.whole(theirs) for source, theirs in aligned.readers(name))
        reach = spec.elements if at_once or nested else self.apply.engine.reach(len(aligned.sources) + len(aligned.testimony))
        total: Any = None
        for low, high in windows(spec, reach):
            window = Window(name, low, high)
            for start, stop in [(low, high)] if at_once else blocks(spec, low, high):
                site = aligned.site_at(window, start, stop)
                if not late:
                    stack = self.apply.transformed(window, start, stop, site, stage)
                elif chain.access == "block":
                    inner = self.apply.transformed(window, start, stop, site)
                    merged = self.apply.merged(inner, site, stage - len(chain.transforms) - 1)
                    stack = torch.cat([merged[None], inner])
                else:
                    merged, inner = self.apply.tensor(window)
                    stack = torch.cat([merged[None], inner])
                total = part_call(part, site, self.walk.statistic.add, total, stack, site, mine)
        return total
