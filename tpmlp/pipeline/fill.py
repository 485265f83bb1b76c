"""One rule that fills tables of tasks.

In every tick each stage runs the first task that can start, in this order:

    F before B before W; of several F, or B, the one that is farthest along its way.

An F can start only while the stage is within two limits, on the F that wait for their B and on
the activations that live there; where B and W are one task, nothing comes between them.

Why F first, where one might think that a B should go out as soon as it can: the limits already
hold back every F that would be too early, and one that they let pass is what the last stage will
lack later. With B first ZB-H1 and interleaved 1F1B end some ticks later under the same limits.
"""

from collections import deque
from collections.abc import Callable, Container
from typing import get_args

from tpmlp.pipeline.route import Kind, Place, Route, Task
from tpmlp.pipeline.validity import Ticks

# A number for each stage.
PerStage = Callable[[int], int]


def fill(route: Route, num_microbatches: int, ahead: PerStage, live: int) -> Ticks:
    """Return the table that the rule fills, tick by tick.

    Args:
        route: where microbatches go.
        num_microbatches: m.
        ahead: for each stage, how many F may wait for their B.
        live: how many activations may live on a stage, from F to W.
    """
    stages = [
        _Stage(stage, route, num_microbatches, min(ahead(stage), live), live)
        for stage in range(route.num_stages)
    ]
    ended: set[Place] = set()
    ticks = []
    while any(stage.unfinished for stage in stages):
        row = tuple(stage.choose(ended) for stage in stages)
        assert any(row), "every stage waits for another"
        for stage, task in zip(stages, row, strict=True):
            stage.run(task)
        ended |= {(stage, task) for stage, task in enumerate(row) if task is not None}
        ticks.append(row)
    return tuple(ticks)


class _Stage:
    """What one stage still has to do, in lines of tasks of which only the first may start."""

    def __init__(self, stage: int, route: Route, num_microbatches: int, ahead: int, live: int):
        self.stage, self.route, self.ahead, self.live = stage, route, ahead, live
        self.F = _lines("F", route, num_microbatches)
        self.B = _lines("B", route, num_microbatches)
        self.W: deque[Task] = deque()
        self.ended = dict.fromkeys(get_args(Kind), 0)

    @property
    def unfinished(self) -> bool:
        return any(self.B) or bool(self.W)

    def choose(self, ended: Container[Place]) -> Task | None:
        """Return the first task that can start, given what has ended before this tick."""
        if self.W and not self.route.splits_backward:
            return self.W[0]
        lines = [*(self.F if self._may_go_on() else []), *self.B, self.W]
        for task in (line[0] for line in lines if line):
            if all(place in ended for place in self.route.needs(self.stage, task)):
                return task
        return None

    def run(self, task: Task | None) -> None:
        """Take a task out of its line; the W of a B waits from then on."""
        if task is None:
            return
        for line in (*self.F, *self.B, self.W):
            if line and line[0] == task:
                line.popleft()
        self.ended[task.kind] += 1
        if task.kind == "B":
            self.W.append(Task("W", task.microbatch, task.chunk))

    def _may_go_on(self) -> bool:
        started = self.ended["F"]
        waiting, living = started - self.ended["B"], started - self.ended["W"]
        return waiting < self.ahead and living < self.live


def _lines(kind: Kind, route: Route, num_microbatches: int) -> list[deque[Task]]:
    """Return the tasks of a kind in the order in which a stage runs them.

    Chunks of a "v" have a line each, and the one that is farthest along goes first. Those of a
    loop share a line: p microbatches through a chunk, the same p through the next.
    """
    microbatches, chunks = range(num_microbatches), range(route.num_chunks)
    farthest_first = chunks[::-1] if kind == "F" else chunks
    if route.order == "v":
        return [deque(Task(kind, i, chunk) for i in microbatches) for chunk in farthest_first]
    p = route.num_stages
    groups = (microbatches[first : first + p] for first in microbatches[::p])
    along = farthest_first[::-1]
    return [deque(Task(kind, i, chunk) for group in groups for chunk in along for i in group)]
