"""What makes a table a schedule: each rule, and the error that names the task that breaks it.

Rules are checked one after another, so that each may count on those above it: slots, then that
every task is there once, then the order of dependence, then memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, get_args

from tpmlp.pipeline.route import Kind, Place, Route, Task

Ticks = tuple[tuple[Task | None, ...], ...]


def as_ticks(ticks: Any) -> Ticks:
    """Return rows as tuples, or refuse what has no rows."""
    try:
        return tuple(map(tuple, ticks))
    except TypeError as error:
        raise ValueError(
            f"ticks must be rows of tasks, one a tick: got ticks={ticks!r}. Use for example "
            "Schedule.from_text."
        ) from error


def check_ticks(ticks: Ticks, route: Route, num_microbatches: int, peak: int | None) -> None:
    """Refuse a table that breaks a rule.

    Raises:
        ValueError: a table that is not rectangular; something that is no task, or a task of a
            microbatch or chunk that is not there; a task that is missing, doubled or too early; a
            stage that holds more activations than the schedule promises.
    """
    _check_slots(ticks, route, num_microbatches)
    ticks_of = _check_once(ticks, route, num_microbatches)
    _check_dependence(ticks_of, route)
    if peak is not None:
        _check_peak(ticks, peak)


def find_ticks(ticks: Ticks) -> dict[Place, int]:
    """Return the tick of each task of each stage, in the order of ticks."""
    return {
        (stage, task): tick
        for tick, row in enumerate(ticks)
        for stage, task in enumerate(row)
        if task is not None
    }


def count_live(column: Sequence[Task | None]) -> list[int]:
    """Return how many activations a stage holds in each tick; one lives from its F to its W.

    Examples:
        >>> count_live([Task("F", 0), None, Task("B", 0), Task("W", 0), Task("F", 1)])
        [1, 1, 1, 1, 1]
    """
    live, counts = 0, []
    for task in column:
        live += task is not None and task.kind == "F"
        counts.append(live)
        live -= task is not None and task.kind == "W"
    return counts


def _check_slots(ticks: Ticks, route: Route, num_microbatches: int) -> None:
    """Refuse rows of another length, and entries that are no tasks of this schedule."""
    for tick, row in enumerate(ticks):
        if len(row) != route.num_stages:
            raise ValueError(
                f"ticks must have a slot for each of num_stages={route.num_stages} stages: got "
                f"{len(row)} at tick {tick}. Use None for a stage that is idle."
            )
        for stage, task in enumerate(row):
            if task is not None:
                _check_task(task, f"stage {stage} at tick {tick}", route, num_microbatches)


def _check_task(task: Any, slot: str, route: Route, num_microbatches: int) -> None:
    if not isinstance(task, Task):
        raise ValueError(
            f"ticks must hold tasks or None: got {task!r} of {slot}. Use for example "
            "Task('F', 0), or Schedule.from_text."
        )
    counts = {"num_microbatches": num_microbatches, "num_chunks": route.num_chunks}
    for (name, count), value in zip(counts.items(), (task.microbatch, task.chunk), strict=True):
        if value >= count:
            raise ValueError(
                f"a task must be one of {name}={count}, counted from 0: got {task} of {slot}. "
                f"Leave it out, or use {name}={value + 1}."
            )


def _check_once(ticks: Ticks, route: Route, num_microbatches: int) -> Mapping[Place, int]:
    """Return the tick of each task, or refuse one that is doubled or missing."""
    ticks_of: dict[Place, int] = {}
    for tick, row in enumerate(ticks):
        for place in ((stage, task) for stage, task in enumerate(row) if task is not None):
            if place in ticks_of:
                stage, task = place
                raise ValueError(
                    f"a task must be there once a stage: got {task} of stage {stage} at ticks "
                    f"{ticks_of[place]} and {tick}. Leave one of them out."
                )
            ticks_of[place] = tick
    for stage, task in _wanted(route, num_microbatches):
        if (stage, task) not in ticks_of:
            raise ValueError(
                f"a task must be there once a stage: got no {task} of stage {stage} in "
                f"{len(ticks)} ticks. Give it a slot."
            )
    return ticks_of


def _wanted(route: Route, num_microbatches: int) -> Iterator[Place]:
    """Yield every task of every stage, in turn: a wrong number may say that there are millions."""
    for stage, chunk in product(range(route.num_stages), range(route.num_chunks)):
        for microbatch in range(num_microbatches):
            for kind in get_args(Kind):
                yield stage, Task(kind, microbatch, chunk)


def _check_dependence(ticks_of: Mapping[Place, int], route: Route) -> None:
    """Refuse a task that starts before what it needs has ended, and a W apart from its B."""
    for (stage, task), tick in ticks_of.items():
        for other, needed in route.needs(stage, task):
            if (ended := ticks_of[other, needed]) >= tick:
                raise ValueError(
                    f"{task} of stage {stage} must run after {needed} of stage {other}, which it "
                    f"needs: got {task} at tick {tick}, {needed} at tick {ended}. Move {task} to "
                    f"tick {ended + 1} or later."
                )
        if task.kind == "W" and not route.splits_backward:
            _check_joined(ticks_of, stage, task)


def _check_joined(ticks_of: Mapping[Place, int], stage: int, task: Task) -> None:
    recursion = Task("B", task.microbatch, task.chunk)
    tick, ended = ticks_of[stage, task], ticks_of[stage, recursion]
    if tick != ended + 1:
        raise ValueError(
            f"{task} of stage {stage} must directly follow {recursion} where "
            f"splits_backward=False: got {recursion} at tick {ended}, {task} at tick {tick}. "
            f"Move {task} to tick {ended + 1}, or use splits_backward=True."
        )


def _check_peak(ticks: Ticks, peak: int) -> None:
    """Refuse a stage that holds more than was promised, naming the task that is too many."""
    for stage, column in enumerate(zip(*ticks, strict=True)):
        for tick, live in enumerate(count_live(column)):
            if live > peak:
                raise ValueError(
                    f"a stage must hold at most peak={peak} activations: got {live} on stage "
                    f"{stage} at tick {tick}, with {column[tick]}. Run a W before it, or promise "
                    f"a larger peak."
                )
