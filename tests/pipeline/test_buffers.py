"""Buffers: a failure means that a program which trusts the arrays would read another's data.

The oracle is such a program, with words in place of arrays: it knows the table and nothing of
schedules, and checks that every task finds what it needs.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.pipeline.cases import MINE, SIZES, schedules
from tpmlp.pipeline.buffers import NOTHING, B, Buffers, F, W, plan_buffers
from tpmlp.pipeline.generators import make_schedule
from tpmlp.pipeline.schedule import Schedule


class Stage:
    """One device: its buffers, of as many slots as the plan says, and what it sends next."""

    def __init__(self, plan: Buffers):
        self.plan = plan
        self.activations: list[Any] = [None] * plan.num_activations
        self.inbox_h: list[Any] = [None] * plan.num_inbox_h
        self.inbox_g: list[Any] = [None] * plan.num_inbox_g
        self.deferred: list[Any] = [None] * plan.num_deferred
        self.finished: list[tuple[int, int]] = []
        # The gradient of a B that leaves only after its W.
        self.waiting: Any = None

    def run(self, schedule: Schedule, tick: int, stage: int) -> Any:
        """Run the task of a tick, and return what leaves the stage."""
        plan, at = self.plan, (tick, stage)
        kind, microbatch, chunk = plan.kind[at], plan.microbatch[at], plan.chunk[at]
        virtual = schedule.route.virtual_stage(stage, chunk)
        last = schedule.route.num_virtual_stages - 1
        if kind == F:
            if virtual > 0:
                assert self.inbox_h[plan.inbox_h[at]] == ("h", microbatch, virtual)
            else:
                assert plan.inbox_h[at] == NOTHING
            self.activations[plan.activations[at]] = ("kept", microbatch, virtual)
            # The last F goes on to the loss and leaves its gradient for the stage's own B.
            here = ("g", microbatch, virtual)
            return ("h", microbatch, virtual + 1) if virtual < last else here
        if kind == B:
            assert self.activations[plan.activations[at]] == ("kept", microbatch, virtual)
            assert self.inbox_g[plan.inbox_g[at]] == ("g", microbatch, virtual)
            self.deferred[plan.deferred[at]] = ("g", microbatch, virtual)
            self.waiting = ("g", microbatch, virtual - 1) if virtual > 0 else None
            return self.waiting if schedule.splits_backward else None
        if kind == W:
            assert self.activations[plan.activations[at]] == ("kept", microbatch, virtual)
            assert self.deferred[plan.deferred[at]] == ("g", microbatch, virtual)
            self.finished.append((microbatch, chunk))
            return None if schedule.splits_backward else self.waiting
        return None

    def receive(self, words: dict[str, Any], tick: int, stage: int) -> None:
        """Put what has come by each way where the plan says."""
        for way, word in words.items():
            arrivals = getattr(self.plan, f"from_{way}")
            for content, inbox in (("h", self.inbox_h), ("g", self.inbox_g)):
                if (slot := getattr(arrivals, content)[tick, stage]) != NOTHING:
                    assert word[0] == content
                    inbox[slot] = word


def run_in_lockstep(schedule: Schedule) -> list[Stage]:
    plan, p = plan_buffers(schedule), schedule.num_stages
    stages = [Stage(plan) for _ in range(p)]
    for tick in range(schedule.num_ticks):
        sent = [stage.run(schedule, tick, s) for s, stage in enumerate(stages)]
        for s, stage in enumerate(stages):
            words = {"before": sent[s - 1], "after": sent[(s + 1) % p], "self": sent[s]}
            stage.receive(words, tick, s)
    return stages


@given(schedules())
def test_every_task_finds_what_it_needs_where_the_plan_says(schedule):
    for stage in run_in_lockstep(schedule):
        chunks, microbatches = range(schedule.num_chunks), range(schedule.num_microbatches)
        assert sorted(stage.finished) == [(i, chunk) for i in microbatches for chunk in chunks]


def test_a_table_of_ones_own_runs_too():
    run_in_lockstep(Schedule.from_text(MINE))


@given(schedules())
def test_no_buffer_has_more_slots_than_are_in_use_at_once(schedule):
    plan, ticks_of = plan_buffers(schedule), schedule.ticks_of
    assert plan.num_activations == max(schedule.peaks)
    used = {"inbox_h": ("F", True), "inbox_g": ("B", True), "deferred": ("W", False)}
    for name, (kind, moves) in used.items():
        alive = np.zeros((schedule.num_ticks, schedule.num_stages), int)
        for (stage, task), tick in ticks_of.items():
            awaited = schedule.route.awaits(stage, task)
            if task.kind != kind or (kind == "F" and awaited is None):
                continue
            # A message lives from the tick after the one it left in; g from B's own tick, and that
            # of the loss from the tick after its F.
            needed = awaited or schedule.route.needs(stage, task)[0]
            alive[ticks_of[needed] + moves : tick + 1, stage] += 1
        assert getattr(plan, f"num_{name}") == alive.max()


@given(schedules())
def test_messages_and_arrivals_say_the_same(schedule):
    plan = plan_buffers(schedule)
    ways = {1: plan.from_before, -1: plan.from_after, 0: plan.from_self}
    said = {
        (tick, message.receiver, message.ring, message.content): message.slot
        for tick, messages in enumerate(plan.messages)
        for message in messages
    }
    arrived = {
        (int(tick), int(stage), ring, content): int(slots[tick, stage])
        for ring, arrivals in ways.items()
        for content, slots in (("h", arrivals.h), ("g", arrivals.g))
        for tick, stage in np.argwhere(slots != NOTHING)
    }
    assert said == arrived
    # Every virtual stage but the last sends h on, and every one but the first sends g back; the
    # last one has g of the loss.
    boundaries = schedule.route.num_virtual_stages - 1
    assert sum(map(len, plan.messages)) == (2 * boundaries + 1) * schedule.num_microbatches


@given(schedules())
def test_a_ring_brings_a_stage_one_message_a_tick_at_most(schedule):
    for messages in plan_buffers(schedule).messages:
        ways = [(message.receiver, message.ring) for message in messages]
        assert len(ways) == len(set(ways))
        for message in messages:
            assert (message.sender + message.ring) % schedule.num_stages == message.receiver


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_a_stage_keeps_one_or_two_messages_and_as_many_g_as_W_are_put_off(p, m):
    most = min(m, 2 * p - 1)
    slots = {"gpipe": (m, 1, m, 1), "1f1b": (p, 1, 1, 1)}
    slots |= {"zb-h1": (p, 1, 1, p), "zb-h2": (most, 1 if m == p == 2 else 2, 1, most)}
    for name, expected in slots.items():
        plan = plan_buffers(make_schedule(name, p, m))
        sizes = plan.num_activations, plan.num_inbox_h, plan.num_inbox_g, plan.num_deferred
        assert sizes == expected


def test_arrays_are_constants_of_a_program():
    plan = plan_buffers(make_schedule("zb-v", 3, 6))
    arrays = [plan.kind, plan.microbatch, plan.chunk, plan.activations, plan.inbox_h]
    arrays += [plan.inbox_g, plan.deferred, plan.from_before.h, plan.from_self.g]
    for array in arrays:
        assert array.shape == (6 * 6 + 3 - 1, 3)
        assert array.dtype == np.int32


def test_a_loop_moves_h_forward_and_g_back_only():
    plan = plan_buffers(make_schedule("interleaved", 2, 4, 2))
    for slots in (plan.from_before.g, plan.from_after.h, plan.from_self.h):
        assert (slots == NOTHING).all()
    of_the_loss = plan.from_self.g != NOTHING
    assert not of_the_loss[:, 0].any()
    assert of_the_loss[:, 1].sum() == 4
