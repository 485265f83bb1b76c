"""Published schedules: a failure means that a table is longer or holds more than its formula."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given

from tests.pipeline.cases import MINE, SIZES, schedules
from tpmlp.pipeline.generators import SCHEDULES, make_schedule
from tpmlp.pipeline.route import Route, Task
from tpmlp.pipeline.schedule import Schedule

# The number of ticks, and the largest number of live activations, of p, m and v.
FORMULAS = {
    "gpipe": (lambda p, m, v: 3 * (m + p - 1), lambda p, m, v: m),
    "1f1b": (lambda p, m, v: 3 * (m + p - 1), lambda p, m, v: p),
    "interleaved": (lambda p, m, v: 3 * m * v + 3 * (p - 1), lambda p, m, v: p * v + p - 1),
    "zb-h1": (lambda p, m, v: 3 * m + p - 1, lambda p, m, v: p),
    "zb-h2": (lambda p, m, v: 3 * m + p - 1, lambda p, m, v: 2 * p - 1),
    "zb-v": (lambda p, m, v: 6 * m + p - 1, lambda p, m, v: 2 * p),
}
CHUNKS = {"interleaved": (2, 3)}
CASES = [(name, v) for name in SCHEDULES for v in CHUNKS.get(name, (1,))]


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize(("name", "v"), CASES)
def test_a_published_schedule_has_the_ticks_of_its_formula(name, v, p, m):
    ticks, _ = FORMULAS[name]
    assert make_schedule(name, p, m, v).num_ticks == ticks(p, m, v)


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize(("name", "v"), CASES)
def test_a_published_schedule_holds_as_many_activations_as_its_formula(name, v, p, m):
    schedule = make_schedule(name, p, m, v)
    # No stage can hold more than there is: with m = p that is less than ZB-H2's 2p - 1.
    peak = min(FORMULAS[name][1](p, m, v), m * schedule.num_chunks)
    assert max(schedule.peaks) == schedule.peak == peak


@pytest.mark.parametrize("p", [2, 4, 8])
def test_peaks_fall_along_the_stages_only_where_backward_is_not_split(p):
    peaks = {name: make_schedule(name, p, 2 * p).peaks for name in SCHEDULES[:-1]}
    assert peaks == {
        "gpipe": (2 * p,) * p,
        "1f1b": tuple(range(p, 0, -1)),
        "zb-h1": (p,) * p,
        "zb-h2": (2 * p - 1,) * p,
        "zb-v": (2 * p,) * p,
    }
    assert make_schedule("interleaved", p, 2 * p, 2).peaks == tuple(range(3 * p - 1, p, -2))


def test_interleaved_runs_in_the_order_of_megatron():
    schedule = make_schedule("interleaved", num_stages=2, num_microbatches=4, num_chunks=2)
    # Stage 0 warms up with 2(p - 1) + (v - 1)p = 4 tasks, p microbatches a chunk, then 1F1B.
    order = "F0 F1 F0.1 F1.1 F2 B0.1 W0.1 F3 B1.1 W1.1 F2.1 B0 W0 F3.1 B1 W1"
    assert " ".join(map(str, schedule.tasks[0])).startswith(order)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_one_microbatch_goes_there_and_back(name):
    table = "F0 . . . . . . B0 W0\n. F0 . . . B0 W0 . .\n. . F0 B0 W0 . . . ."
    one = make_schedule(name, num_stages=3, num_microbatches=1)
    assert one.ticks == Schedule.from_text(table, splits_backward=False).ticks


@pytest.mark.parametrize(("name", "v"), CASES)
def test_one_stage_is_never_idle(name, v):
    assert make_schedule(name, 1, 3, v).idle == 0


@given(schedules())
def test_a_schedule_of_any_size_is_valid_and_reads_back_from_its_text(schedule):
    # Schedule checks itself: that it exists says that it is valid.
    assert Schedule.from_text(str(schedule)) == schedule


@given(schedules())
def test_virtual_stages_are_numbered_once_and_neighbours_are_one_ring_step_apart(schedule):
    route = schedule.route
    places = [route.place(virtual) for virtual in range(route.num_virtual_stages)]
    assert [route.virtual_stage(*place) for place in places] == list(range(len(places)))
    for (sender, _), (receiver, _) in pairwise(places):
        step = route.ring(sender, receiver, "F")
        assert (sender + step) % route.num_stages == receiver
        assert step == -route.ring(receiver, sender, "B")


def test_a_loop_goes_round_and_a_v_turns():
    loop, v = (Route(num_stages=3, num_chunks=2, order=order) for order in ("loop", "v"))
    assert [loop.place(virtual) for virtual in range(6)] == [
        (0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)
    ]  # fmt: skip
    assert [v.place(virtual)[0] for virtual in range(6)] == [0, 1, 2, 2, 1, 0]
    assert (loop.ring(2, 0, "F"), v.ring(2, 2, "F"), v.ring(2, 1, "F")) == (1, 0, -1)


def test_a_gradient_leaves_after_B_or_after_W():
    one, two = (Route(num_stages=2, splits_backward=splits) for splits in (False, True))
    assert one.awaits(0, Task("B", 5)) == (1, Task("W", 5))
    assert two.awaits(0, Task("B", 5)) == (1, Task("B", 5))


def test_a_table_of_ones_own_needs_no_flags_and_no_labels():
    mine = Schedule.from_text(MINE, name="mine")
    assert (mine.num_stages, mine.num_microbatches, mine.num_chunks) == (2, 2, 1)
    assert mine.peaks == (2, 2)
    assert mine.ticks[3] == (None, Task("B", 0))
    assert Schedule.from_text(f"name=mine\n{MINE}") == mine
    assert replace(mine, ticks=[list(row) for row in mine.ticks]) == mine


def test_stages_are_aligned_where_they_have_two_digits():
    rows = str(make_schedule("gpipe", 11, 1)).splitlines()[1:]
    assert len({row.index("|") for row in rows}) == 1
