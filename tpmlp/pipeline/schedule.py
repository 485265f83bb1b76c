"""A schedule is data: a table of what each stage does in each tick, without JAX.

A tick is one slot of every stage, and a slot holds one task. What a task leaves at the end of
tick t can be used from tick t + 1, on the same stage or, as a message, on a neighbour. Whoever
runs a schedule, counts it or draws it reads this table; generators.py fills the published ones.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from tpmlp.pipeline.draw import draw_tables
from tpmlp.pipeline.route import Order, Place, Route, Task, check_at_least, check_choice
from tpmlp.pipeline.text import check_flags, read_table, write_table
from tpmlp.pipeline.validity import Ticks, as_ticks, check_ticks, count_live, find_ticks


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Schedule:
    r"""A table of tasks, checked on construction; prints as text that from_text reads.

    Attributes:
        name: for titles and tables.
        num_stages: p.
        num_microbatches: m.
        num_chunks: v, pieces of layers on each stage.
        ticks: [tick][stage], a Task, or None for an idle slot.
        splits_backward: whether B and W are two pieces of work, so that a gradient leaves its
            stage after B. Otherwise W is in the slot after its B, and the gradient leaves after
            both: B and W are one task of length B + W.
        order: how chunks lie on the stages, "loop" or "v" (see route.py).
        peak: the number of activations that a stage may hold at once, each of one chunk and
            microbatch, from its F to its W; None promises nothing.

    Raises:
        ValueError: a table that is no schedule; the error names task, stage and tick.

    Examples:
        >>> table = "F0 F1 .  .  B0 W0 B1 W1\n.  F0 B0 F1 B1 W0 W1 ."
        >>> mine = Schedule.from_text(table, name="mine")
        >>> print(mine)
        name=mine order=loop splits_backward=True
        stage 0 | F0 F1 .  .  B0 W0 B1 W1
        stage 1 | .  F0 B0 F1 B1 W0 W1 .
        >>> mine.num_ticks, mine.peaks, Schedule.from_text(str(mine)) == mine
        (8, (2, 2), True)
    """

    name: str
    num_stages: int
    num_microbatches: int
    num_chunks: int = 1
    ticks: Ticks
    splits_backward: bool = True
    order: Order = "loop"
    peak: int | None = None

    def __post_init__(self) -> None:
        counts = ("num_stages", "num_microbatches", "num_chunks")
        check_at_least(1, **{name: getattr(self, name) for name in counts})
        if self.peak is not None:
            check_at_least(1, peak=self.peak)
        check_choice("order", self.order, get_args(Order))
        if not isinstance(self.name, str) or not re.fullmatch(r"\S+", self.name):
            raise ValueError(
                f"name must be text without spaces: got name={self.name!r}. Use name='mine'."
            )
        if not isinstance(self.splits_backward, bool):
            raise ValueError(
                "splits_backward must be True or False: got "
                f"splits_backward={self.splits_backward!r}. Use True where B and W are two tasks."
            )
        object.__setattr__(self, "ticks", as_ticks(self.ticks))
        check_ticks(self.ticks, self.route, self.num_microbatches, self.peak)

    @classmethod
    def from_text(cls, text: str, **flags: Any) -> "Schedule":
        """Return the schedule that a text says.

        A row a stage, a word a tick: "F3" is F of microbatch 3, "F3.1" that of its chunk 1, and
        "." an idle slot. Rows may be labelled, and flags stand in a first line, as str prints
        both.

        Args:
            text: the table.
            flags: name ("table" by default), order, splits_backward and peak, where the first line
                does not say them.

        Raises:
            ValueError: a word that is no task, rows of different lengths, another flag, or no
                schedule.
        """
        check_flags(flags)
        said, ticks = read_table(text)
        tasks = [task for row in ticks for task in row if task is not None]
        return cls(
            num_stages=len(ticks[0]),
            num_microbatches=1 + max((task.microbatch for task in tasks), default=0),
            num_chunks=1 + max((task.chunk for task in tasks), default=0),
            ticks=ticks,
            **{"name": "table", **flags, **said},
        )

    @property
    def route(self) -> Route:
        """Where microbatches go, and what waits for what."""
        return Route(
            num_stages=self.num_stages,
            num_chunks=self.num_chunks,
            order=self.order,
            splits_backward=self.splits_backward,
        )

    @property
    def num_ticks(self) -> int:
        """The length of the table."""
        return len(self.ticks)

    @property
    def ticks_of(self) -> dict[Place, int]:
        """The tick of each (stage, task), in the order of ticks."""
        return find_ticks(self.ticks)

    @property
    def tasks(self) -> tuple[tuple[Task, ...], ...]:
        """What each stage runs, in its order, without the idle slots."""
        columns = zip(*self.ticks, strict=True)
        return tuple(tuple(task for task in column if task is not None) for column in columns)

    @property
    def peaks(self) -> tuple[int, ...]:
        """The number of activations that each stage holds at most, in chunks of a microbatch."""
        return tuple(max(count_live(column)) for column in zip(*self.ticks, strict=True))

    @property
    def idle(self) -> float:
        """The share of slots that are idle."""
        slots = [task for row in self.ticks for task in row]
        return slots.count(None) / len(slots)

    def plot(self) -> Any:
        """Return a matplotlib Figure: a timeline with a row for each stage."""
        return plot_schedules([self])

    def __str__(self) -> str:
        flags = ("name", "order", "splits_backward", "peak")
        return write_table({name: getattr(self, name) for name in flags}, self.ticks)

    __repr__ = __str__


def plot_schedules(schedules: Sequence[Schedule]) -> Any:
    """Return a matplotlib Figure: a timeline for each schedule, under one axis of time.

    Raises:
        ValueError: what is no list of schedules, or is empty.
    """
    listed = schedules if isinstance(schedules, Sequence) else ()
    if not listed or not all(isinstance(schedule, Schedule) for schedule in listed):
        raise ValueError(
            f"schedules must be a list of one or more tpmlp.Schedule: got schedules={schedules!r}. "
            "Use for example [make_schedule('1f1b', 4, 8)]."
        )
    return draw_tables([(_caption(schedule), schedule.ticks) for schedule in schedules])


def _caption(schedule: Schedule) -> str:
    """Return a schedule's name and numbers."""
    peak, v = max(schedule.peaks), schedule.num_chunks
    chunks = f", {v} chunks a stage" if v > 1 else ""
    stages = f" of a chunk ({peak / v:.3g} of a stage)" if v > 1 else ""
    return (
        f"{schedule.name}{chunks}: {schedule.num_ticks} ticks, {schedule.idle:.0%} of slots idle, "
        f"peak activations {peak}{stages}"
    )
