"""The same work on a Ray cluster: tensors are tasks, statistics a tree of folds, and the output's files are written where the work is done.

Every machine must see the inputs and the output's folder under the same paths. A worker that dies is replaced and its tensor done again;
whatever it had written is written over with the same bytes. Results come in the order of the steps and are folded in the tree that the
local executor makes, so the bits are the same.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from thetau._lazy import torch
from thetau.engine.work import Progress, Work, gigabytes
from thetau.errors import ThetauError
from thetau.plan import Step
from thetau.sums import fold_tree

RETRIES = 5  # of a tensor whose worker died
AHEAD = 2  # tasks in flight for each core of the cluster

_WORK: dict[str, Any] = {}  # a worker's copy of what it is working on


def run(
    address: str | None, progress: Progress, steps: Sequence[Step], work: Work, description: str
) -> Iterator[tuple[Step, Any]]:
    """Results in the order of the steps, each fetched when it is due."""
    ray = _ray(address)
    for step, reference in _submit(ray, progress, steps, work, description):
        yield step, ray.get(reference)


def reduce(
    address: str | None,
    progress: Progress,
    steps: Sequence[Step],
    work: Work,
    fold: Callable[[Any, Any], Any],
    description: str,
) -> Any:
    """Results folded on the workers, pairwise; only the last one comes here."""
    ray = _ray(address)
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_fold)
    references = (reference for _, reference in _submit(ray, progress, steps, work, description))
    total = fold_tree(references, lambda a, b: task.remote(fold, a, b))
    return None if total is None else ray.get(total)


def _ray(address: str | None) -> Any:
    """Ray, connected.

    Raises:
        ThetauError: it is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leaves the GPUs' environment alone
    try:
        import ray
    except ImportError as error:
        raise ThetauError("The executor `ray` needs Ray: pip install 'thetau[ray]'.") from error
    if not ray.is_initialized():
        try:
            _knock(address)
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            where = address or os.environ.get("RAY_ADDRESS", "this machine")
            raise ThetauError(
                f"No Ray cluster answers at {where}: {error}. Start one (`ray start --head`), or leave `--address` out."
            ) from error
    return ray


def _knock(address: str | None) -> None:
    """See whether somebody listens at `host:port`: Ray itself would try for minutes."""
    host, colon, port = (address or os.environ.get("RAY_ADDRESS", "")).removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _submit(ray: Any, progress: Progress, steps: Sequence[Step], work: Work, description: str) -> Iterator[tuple[Step, Any]]:
    """Each step and a reference to its result, once that is there."""
    guards = list(work.guards())
    identity, shared = uuid.uuid4().hex, ray.put(ray.cloudpickle.dumps(work))  # by value where a method was written in a notebook
    task = ray.remote(num_cpus=1, num_returns=2, max_retries=RETRIES)(_task)
    _check_memory(ray, steps, description)
    limit = max(1, int(AHEAD * ray.cluster_resources().get("CPU", 1)))
    pending: deque[tuple[Step, Any, Any]] = deque()
    queue = iter(steps)
    progress.begin(description, sum(step.read for step in steps))
    try:
        while True:
            while len(pending) < limit and (step := next(queue, None)) is not None:
                pending.append((step, *task.options(memory=step.memory).remote(identity, [shared], step)))
            if not pending:
                return
            step, said, result = pending.popleft()
            error, seen = _get(ray, said, step)
            if error is not None:
                raise error
            for guard, found in zip(guards, seen, strict=True):
                guard.take(found)
            progress.advance(step.read)
            yield step, result
    finally:
        for _, said, _ in pending:
            ray.cancel(said)
        for _, said, _ in pending:  # nobody may write to the output any more when this returns
            _wait(ray, said)
        progress.end()


def _check_memory(ray: Any, steps: Sequence[Step], description: str) -> None:
    """Refuse a tensor that no machine of the cluster could hold: Ray would wait for such a machine for ever.

    Raises:
        ThetauError: there is one.
    """
    largest = max(steps, key=lambda step: step.memory, default=None)
    room = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if largest is not None and largest.memory > room:
        raise ThetauError(
            f"{description} needs {gigabytes(largest.memory)} for the tensor {largest.name!r}; the largest machine of the cluster offers "
            f"{gigabytes(room)}. Add a larger one (`ray start --memory`), or choose a method that needs less."
        )


def _get(ray: Any, said: Any, step: Step) -> tuple[ThetauError | None, list[Any]]:
    try:
        found: tuple[ThetauError | None, list[Any]] = ray.get(said)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from error
    except ray.exceptions.RayError as error:
        raise ThetauError(
            f"{step.name!r}: its worker died {RETRIES + 1} times, the last time with: {str(error).splitlines()[0]} Is there enough memory on every machine?"
        ) from error
    return found


def _wait(ray: Any, said: Any) -> None:
    try:
        ray.get(said)
    except ray.exceptions.RayError:
        return


def _task(identity: str, shared: list[Any], step: Step) -> tuple[tuple[ThetauError | None, list[Any]], Any]:
    """One step's work, on a worker: what went wrong, what its guards saw, and the result."""
    import ray

    torch.set_num_threads(1)
    try:
        if identity not in _WORK:
            _WORK.clear()
            _WORK[identity] = pickle.loads(ray.get(shared[0]))  # our own work, from our own driver
        work = _WORK[identity]
        result = work(step)
        return (None, [guard.give() for guard in work.guards()]), result
    except ThetauError as error:
        return (error, []), None


def _fold(fold: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    return fold(a, b)
