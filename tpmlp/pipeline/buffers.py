"""What a program that runs a schedule in lockstep needs to know, as arrays [tick, stage].

A stage keeps four kinds of arrays, each in numbered slots of one buffer:

    activations  what F keeps for B and W                     from F's tick to W's
    inbox_h      h that has come from the stage before        from the tick after it left, to F's
    inbox_g      g that has come from the stage after,        from the tick after it left, to B's
                 or from the loss, with the last F
    deferred     g of a chunk, which W needs too              from B's tick to W's

Both ends count. A slot is free again in the tick after its last, so buffers hold no more than the
schedule's peak; and what arrives at the end of a tick may go where that tick was the last to read.

In every tick each stage runs its task, then messages move, one step round the ring of stages each
way, then what has come is put into the inbox. Gradients leave at the end of B, or of W where B and
W are one task (splits_backward=False): there B's result waits one tick, on its own stage.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from tpmlp.pipeline.route import Place, Task
from tpmlp.pipeline.schedule import Schedule

# In an array of kinds; NOTHING, in an array of slots, is none.
IDLE, F, B, W = range(4)
KINDS = {"F": F, "B": B, "W": W}
NOTHING = -1

# What a message is, by the kind of the task that reads it.
Content = Literal["h", "g"]
CONTENTS: dict[str, Content] = {"F": "h", "B": "g"}
# The kinds of tasks that use a buffer, and what a task leaves for its W in one.
USERS = {"activations": "FBW", "inbox_h": "F", "inbox_g": "B", "deferred": "BW"}
KEPT = {"F": "activations", "B": "deferred"}

# An array in a buffer, by its stage, microbatch and chunk; the first and the last tick of each.
Array = tuple[int, int, int]
Lives = dict[Array, tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What moves at the end of a tick.

    Attributes:
        content: "h", or "g" for a gradient.
        sender: the stage it leaves.
        receiver: the stage it comes to; the sender itself at the turn of a "v".
        ring: which way round: 1 to the stage after, -1 to the one before, 0 for nowhere.
        task: the receiver's task that reads it.
        slot: where in the receiver's inbox.
    """

    content: Content
    sender: int
    receiver: int
    ring: int
    task: Task
    slot: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Arrivals:
    """Where a stage puts what one ring has brought it at the end of a tick.

    Attributes:
        h: [tick, stage], a slot of inbox_h, or -1 where no h has come.
        g: likewise of inbox_g.
    """

    h: np.ndarray
    g: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Buffers:
    """A schedule as constants of a program; arrays are int32 [tick, stage], -1 for none.

    Attributes:
        kind: 0 for an idle slot, 1 for F, 2 for B, 3 for W.
        microbatch: of the task.
        chunk: of the task.
        activations: the slot that F fills, and B and W read.
        inbox_h: the slot that F reads; -1 for the first virtual stage, which reads the data.
        inbox_g: the slot that B reads.
        deferred: the slot that B fills and W reads.
        num_activations: slots on every stage; the schedule's peak.
        num_inbox_h: likewise; 0 if there are no messages.
        num_inbox_g: likewise.
        num_deferred: likewise.
        from_before: what has come from the stage before, one step forward round the ring.
        from_after: what has come from the stage after, one step back.
        from_self: what a stage keeps for its own next chunk, and the last one of the loss for its
            own B.
        messages: those of each tick.
    """

    kind: np.ndarray
    microbatch: np.ndarray
    chunk: np.ndarray
    activations: np.ndarray
    inbox_h: np.ndarray
    inbox_g: np.ndarray
    deferred: np.ndarray
    num_activations: int
    num_inbox_h: int
    num_inbox_g: int
    num_deferred: int
    from_before: Arrivals
    from_after: Arrivals
    from_self: Arrivals
    messages: tuple[tuple[Message, ...], ...]

    @property
    def rings(self) -> tuple[tuple[int, Arrivals], ...]:
        """By how many places round the ring what arrives has come: -1 is from the stage before."""
        return (-1, self.from_before), (1, self.from_after), (0, self.from_self)

    def moves(self, content: Content) -> dict[int, np.ndarray]:
        """Return by how many places, from 0 to p-1, a content moves, and the ticks that do it.

        In a step of which all stages are a part, one moves what another has for it or not. Round a
        ring of two, both ways are one.
        """
        ticks: dict[int, np.ndarray] = {}
        for by, arrivals in self.rings:
            due = (getattr(arrivals, content) != NOTHING).any(axis=1)
            if due.any():
                places = by % self.kind.shape[1]
                ticks[places] = ticks[places] | due if places in ticks else due
        return ticks


def plan_buffers(schedule: Schedule) -> Buffers:
    """Return which slot of which buffer every task of a schedule uses, and what moves when.

    Slots are given out in the order of first ticks, the lowest that is free, which takes as many as
    are alive at once on the stage that needs most: no plan takes fewer.

    Examples:
        >>> from tpmlp.pipeline.generators import make_schedule
        >>> plan = plan_buffers(make_schedule("1f1b", num_stages=2, num_microbatches=3))
        >>> plan.kind.T
        array([[1, 1, 0, 0, 2, 3, 1, 2, 3, 0, 2, 3],
               [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 0, 0]], dtype=int32)
        >>> plan.activations.T
        array([[ 0,  1, -1, -1,  0,  0,  0,  1,  1, -1,  0,  0],
               [-1,  0,  0,  0,  0,  0,  0,  0,  0,  0, -1, -1]], dtype=int32)
        >>> plan.messages[0]
        (Message(content='h', sender=0, receiver=1, ring=1, task=Task(kind='F', microbatch=0,
        chunk=0), slot=0),)
    """
    slots, sizes = {}, {}
    for name, lives in _lives(schedule).items():
        slots[name], sizes[name] = _color(lives)
    messages = _messages(schedule, slots)
    table = partial(_table, schedule)
    return Buffers(
        kind=table(lambda _, task: KINDS[task.kind], none=IDLE),
        microbatch=table(lambda _, task: task.microbatch),
        chunk=table(lambda _, task: task.chunk),
        **{name: table(partial(_slot, slots[name], USERS[name])) for name in slots},
        **{f"num_{name}": size for name, size in sizes.items()},
        from_before=_arrivals(schedule, messages, ring=1),
        from_after=_arrivals(schedule, messages, ring=-1),
        from_self=_arrivals(schedule, messages, ring=0),
        messages=tuple(map(tuple, messages)),
    )


def _lives(schedule: Schedule) -> dict[str, Lives]:
    """Return the first and the last tick of every array in every buffer."""
    ticks_of = schedule.ticks_of
    lives: dict[str, Lives] = {name: {} for name in USERS}
    for (stage, task), tick in ticks_of.items():
        array = stage, task.microbatch, task.chunk
        used = ticks_of[stage, Task("W", task.microbatch, task.chunk)]
        if task.kind in KEPT:
            lives[KEPT[task.kind]][array] = tick, used
        if (source := _source(schedule, stage, task)) is not None:
            lives[f"inbox_{CONTENTS[task.kind]}"][array] = ticks_of[source] + 1, tick
    return lives


def _source(schedule: Schedule, stage: int, task: Task) -> Place | None:
    """Return the task whose result a task finds in an inbox; of the last B the last F's loss."""
    message = schedule.route.awaits(stage, task)
    if message is None and task.kind == "B":
        return stage, Task("F", task.microbatch, task.chunk)
    return message


def _color(lives: Lives) -> tuple[dict[Array, int], int]:
    """Return a slot for each array, and how many a stage needs: as many as live there at once."""
    slots: dict[Array, int] = {}
    taken_until: dict[int, list[int]] = defaultdict(list)
    for array, (first, last) in sorted(lives.items(), key=lambda item: item[1]):
        ends = taken_until[array[0]]
        slot = next((slot for slot, end in enumerate(ends) if end < first), len(ends))
        ends[slot : slot + 1] = [last]
        slots[array] = slot
    return slots, max(map(len, taken_until.values()), default=0)


def _messages(schedule: Schedule, slots: Mapping[str, Mapping[Array, int]]) -> list[list[Message]]:
    """Return what moves at the end of each tick."""
    route, ticks_of = schedule.route, schedule.ticks_of
    messages: list[list[Message]] = [[] for _ in schedule.ticks]
    for stage, task in ticks_of:
        if (source := _source(schedule, stage, task)) is None:
            continue
        content = CONTENTS[task.kind]
        messages[ticks_of[source]].append(
            Message(
                content=content,
                sender=source[0],
                receiver=stage,
                ring=route.ring(source[0], stage, task.kind),
                task=task,
                slot=slots[f"inbox_{content}"][stage, task.microbatch, task.chunk],
            )
        )
    return messages


def _arrivals(schedule: Schedule, messages: Sequence[Iterable[Message]], ring: int) -> Arrivals:
    """Return where stages put what comes along a ring."""
    slots = {content: _table(schedule, lambda *_: NOTHING) for content in CONTENTS.values()}
    for tick, moving in enumerate(messages):
        for message in moving:
            if message.ring == ring:
                slots[message.content][tick, message.receiver] = message.slot
    return Arrivals(**slots)


def _table(
    schedule: Schedule, entry: Callable[[int, Task], int], none: int = NOTHING
) -> np.ndarray:
    """Return an entry for each stage's task, in its slot."""
    table = np.full((schedule.num_ticks, schedule.num_stages), none, np.int32)
    for (stage, task), tick in schedule.ticks_of.items():
        table[tick, stage] = entry(stage, task)
    return table


def _slot(slots: Mapping[Array, int], users: str, stage: int, task: Task) -> int:
    array = stage, task.microbatch, task.chunk
    return slots.get(array, NOTHING) if task.kind in users else NOTHING
