"""What a schedule costs in seconds: of stages that run on their own, and of stages in step.

An *asynchronous* runtime is one process a stage: each runs its tasks in the table's order, and
waits for nothing but what a task needs. In *lockstep*, as one compiled program runs a table, all
stages wait for the slowest at the end of each tick. A tick of such a program may also be longer
than a slot: one F paired with one B and W, which costs less where stages in the middle of a
schedule do both anyway, and more where they could have taken turns.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpmlp.pipeline.route import Kind, Place, Task
from tpmlp.pipeline.schedule import Schedule
from tpmlp.table import text_table

# One number for all stages, or one for each.
Seconds = float | Sequence[float] | np.ndarray
Costs = Mapping[Kind, Sequence[float]]


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Simulated:
    """The times of one step; prints as two tables.

    Attributes:
        schedule: its name.
        makespan_s: of an asynchronous runtime, from the start of the first task to the end of the
            last.
        busy_s: of each stage, what its tasks take.
        span_s: of each stage in the asynchronous runtime, from the start of its first task to the
            end of its last.
        peaks: of each stage, how many activations of a chunk it holds at most; they live from F
            to W, and depend on the order of tasks only, not on how long these take.
        num_ticks: of the table.
        lockstep_s: the slowest task of each tick, transfer_s after each tick, all added up.
        num_paired_ticks: ticks of at most one F, one B and one W a stage, filled in the table's
            order.
        paired_s: lockstep_s of these.
    """

    schedule: str
    makespan_s: float
    busy_s: tuple[float, ...]
    span_s: tuple[float, ...]
    peaks: tuple[int, ...]
    num_ticks: int
    lockstep_s: float
    num_paired_ticks: int
    paired_s: float

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Of each stage, how much of the makespan it does nothing: its bubble."""
        return tuple(self.makespan_s - busy for busy in self.busy_s)

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they do nothing."""
        return sum(self.idle_s) / (len(self.idle_s) * self.makespan_s)

    def __str__(self) -> str:
        rows = enumerate(zip(self.busy_s, self.idle_s, self.span_s, self.peaks, strict=True))
        stages = text_table(
            ["stage", "busy [s]", "idle [s]", "span [s]", "peak activations"],
            [[s, *(f"{seconds:.4g}" for seconds in times), peak] for s, (*times, peak) in rows],
        )
        return f"{compare([self])}\n\n{stages}"

    __repr__ = __str__


def compare(simulated: Iterable[Simulated]) -> str:
    """Return a table with a row for each schedule."""
    return text_table(
        [
            "schedule",
            "makespan [s]",
            "bubble",
            "ticks",
            "lockstep [s]",
            "paired ticks",
            "paired [s]",
        ],
        [
            [
                one.schedule,
                f"{one.makespan_s:.4g}",
                f"{one.bubble:.1%}",
                one.num_ticks,
                f"{one.lockstep_s:.4g}",
                one.num_paired_ticks,
                f"{one.paired_s:.4g}",
            ]
            for one in simulated
        ],
    )


def simulate(
    schedule: Schedule, F_s: Seconds, B_s: Seconds, W_s: Seconds, transfer_s: float = 0.0
) -> Simulated:
    """Return what a step takes, without running it.

    Args:
        schedule: the table.
        F_s: seconds of an F, of one chunk and microbatch; one number, or one for each stage.
        B_s: of a B.
        W_s: of a W.
        transfer_s: seconds of a message between stages.

    Raises:
        ValueError: what is no schedule; a time that is negative or not finite, or times for another
            number of stages.

    Examples:
        >>> from tpmlp.pipeline.generators import make_schedule
        >>> one, zero = (make_schedule(name, 4, 8) for name in ("1f1b", "zb-h1"))
        >>> print(compare(simulate(table, F_s=1, B_s=1, W_s=1) for table in (one, zero)))
        schedule  makespan [s]  bubble  ticks  lockstep [s]  paired ticks  paired [s]
        1f1b                33   27.3%     33            33            17          42
        zb-h1               27   11.1%     27            27            17          39
        >>> simulate(one, F_s=1, B_s=[1, 1, 1, 2], W_s=1).makespan_s
        41.0
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule must be a tpmlp.Schedule: got schedule={schedule!r}. Use for example "
            "make_schedule('1f1b', 4, 8)."
        )
    by_name = _check_costs(schedule.num_stages, F_s=F_s, B_s=B_s, W_s=W_s)
    costs: Costs = {"F": by_name["F_s"], "B": by_name["B_s"], "W": by_name["W_s"]}
    _check_transfer(transfer_s)
    starts, ends = _run(schedule, costs, transfer_s)
    slots = [[[] if task is None else [task] for task in row] for row in schedule.ticks]
    paired = _pair(schedule)
    return Simulated(
        schedule=schedule.name,
        makespan_s=max(ends),
        busy_s=tuple(_cost(stage, tasks, costs) for stage, tasks in enumerate(schedule.tasks)),
        span_s=tuple(end - start for start, end in zip(starts, ends, strict=True)),
        peaks=schedule.peaks,
        num_ticks=schedule.num_ticks,
        lockstep_s=_in_step(slots, costs, transfer_s),
        num_paired_ticks=len(paired),
        paired_s=_in_step(paired, costs, transfer_s),
    )


def _run(schedule: Schedule, costs: Costs, transfer_s: float) -> tuple[list[float], list[float]]:
    """Return when each stage starts its first task and ends its last, waiting only for inputs."""
    ended: dict[Place, float] = {}
    starts: dict[int, float] = {}
    ends = dict.fromkeys(range(schedule.num_stages), 0.0)
    # In the order of ticks, whatever a task needs comes before it.
    for stage, task in schedule.ticks_of:
        arrivals = [
            ended[other, needed] + transfer_s * (other != stage)
            for other, needed in schedule.route.needs(stage, task)
        ]
        start = max([ends[stage], *arrivals])
        starts.setdefault(stage, start)
        ended[stage, task] = ends[stage] = start + costs[task.kind][stage]
    return [starts[stage] for stage in ends], list(ends.values())


def _pair(schedule: Schedule) -> list[list[list[Task]]]:
    """Return ticks that are longer: for each stage its next tasks, at most one of a kind.

    Messages still move between ticks only; what a stage has made itself it can use at once.
    """
    left = [list(tasks) for tasks in schedule.tasks]
    arrived: set[Place] = set()
    paired = []
    while any(left):
        row = [_take(schedule, stage, tasks, arrived) for stage, tasks in enumerate(left)]
        arrived |= {(stage, task) for stage, tasks in enumerate(row) for task in tasks}
        paired.append(row)
    return paired


def _take(
    schedule: Schedule, stage: int, left: list[Task], arrived: Container[Place]
) -> list[Task]:
    """Take from a stage's tasks what it can do in one longer tick."""
    taken: list[Task] = []
    while left and left[0].kind not in {task.kind for task in taken}:
        message = schedule.route.awaits(stage, left[0])
        if message is not None and message not in arrived:
            break
        taken.append(left.pop(0))
    return taken


def _in_step(rows: Iterable[Sequence[Iterable[Task]]], costs: Costs, transfer_s: float) -> float:
    """Return the sum over ticks of what the slowest stage takes, and a transfer after each."""
    return sum(
        transfer_s + max(_cost(stage, tasks, costs) for stage, tasks in enumerate(row))
        for row in rows
    )


def _cost(stage: int, tasks: Iterable[Task], costs: Costs) -> float:
    return sum(costs[task.kind][stage] for task in tasks)


def _check_transfer(transfer_s: float) -> None:
    number = np.ndim(transfer_s) == 0 and np.asarray(transfer_s).dtype.kind in "iuf"
    if not number or not 0 <= transfer_s < math.inf:
        raise ValueError(
            "transfer_s must be one number, finite and at least 0: got "
            f"transfer_s={transfer_s!r}. Use transfer_s=0.0 for messages that cost nothing."
        )


def _check_costs(num_stages: int, **times: Seconds) -> dict[str, list[float]]:
    """Return the seconds of each name on each stage, or refuse them."""
    costs = {}
    for name, value in times.items():
        seconds = np.asarray(value)
        if seconds.shape not in ((), (num_stages,)) or seconds.dtype.kind not in "iuf":
            raise ValueError(
                f"{name} must be one number, or one for each of num_stages={num_stages} stages: "
                f"got {name}={value!r}. Use for example {name}=1.0."
            )
        if not (np.isfinite(seconds) & (seconds >= 0)).all():
            raise ValueError(
                f"{name} must be finite and at least 0: got {name}={value!r}. Use seconds, for "
                f"example {name}=1e-3."
            )
        costs[name] = np.broadcast_to(seconds.astype(float), num_stages).tolist()
    if not any(map(any, costs.values())):
        raise ValueError(f"a task must take some time: got {times}. Use more than 0 for F_s.")
    return costs
