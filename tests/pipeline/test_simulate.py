"""Times of a step: a failure means that seconds are not those of the longest way, or of theory."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pipeline.cases import MINE, SIZES, schedules
from tpmlp.pipeline.generators import SCHEDULES, make_schedule
from tpmlp.pipeline.route import Task
from tpmlp.pipeline.schedule import Schedule
from tpmlp.pipeline.simulate import Simulated, compare, simulate

# Whole seconds, so that sums are exact in any order.
SECONDS = st.integers(1, 9)


def longest_way(schedule: Schedule, costs: dict[str, list[float]], transfer_s: float) -> float:
    """Return when the last task ends, by recursion over all that it waits for."""

    @cache
    def end(stage: int, task: Task) -> float:
        tasks = schedule.tasks[stage]
        before = tasks[: tasks.index(task)][-1:]
        starts = [end(stage, earlier) for earlier in before]
        for other, needed in schedule.route.needs(stage, task):
            starts.append(end(other, needed) + (transfer_s if other != stage else 0))
        return max(starts, default=0) + costs[task.kind][stage]

    return max(end(stage, tasks[-1]) for stage, tasks in enumerate(schedule.tasks))


@given(schedules(), st.data())
def test_the_makespan_is_the_longest_way_through_what_waits_for_what(schedule, data):
    stages = st.lists(SECONDS, min_size=schedule.num_stages, max_size=schedule.num_stages)
    F_s, B_s, W_s = data.draw(stages), data.draw(stages), data.draw(stages)
    transfer_s = data.draw(st.integers(0, 3))
    simulated = simulate(schedule, F_s, B_s, W_s, transfer_s)
    costs = {"F": F_s, "B": B_s, "W": W_s}
    assert simulated.makespan_s == longest_way(schedule, costs, transfer_s)


@given(schedules(), SECONDS, SECONDS, SECONDS, st.integers(0, 3))
def test_stages_in_step_never_beat_stages_on_their_own(schedule, F_s, B_s, W_s, transfer_s):
    simulated = simulate(schedule, F_s, B_s, W_s, transfer_s)
    assert simulated.makespan_s <= min(simulated.lockstep_s, simulated.paired_s)
    assert max(simulated.span_s) <= simulated.makespan_s
    work = schedule.num_microbatches * schedule.num_chunks * (F_s + B_s + W_s)
    assert simulated.busy_s == (work,) * schedule.num_stages


@given(schedules())
def test_with_equal_tasks_seconds_are_ticks(schedule):
    simulated = simulate(schedule, 1, 1, 1)
    assert simulated.makespan_s == simulated.lockstep_s == simulated.num_ticks
    assert simulated.bubble == pytest.approx(schedule.idle)
    assert simulated.peaks == schedule.peaks


@pytest.mark.parametrize(("p", "m"), [size for size in SIZES if size[1] >= 2 * size[0]])
def test_no_stage_of_zb_h2_waits_between_its_first_task_and_its_last(p, m):
    assert simulate(make_schedule("zb-h2", p, m), 1, 1, 1).span_s == (3 * m,) * p


# F, B and W in seconds: as the products of an MLP, W the cheapest, F the dearest, B the dearest.
COSTS = ((1, 1, 1), (2, 2, 1), (3, 2, 1), (2, 3, 2))


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize(("F", "B", "W"), COSTS)
def test_bubbles_are_those_of_theory_where_tasks_are_not_equal(p, m, F, B, W):
    bubbles = {
        name: simulate(make_schedule(name, p, m), F, B, W).idle_s
        for name in ("gpipe", "1f1b", "zb-h1")
    }
    assert bubbles == {
        "gpipe": ((p - 1) * (F + B + W),) * p,
        "1f1b": ((p - 1) * (F + B + W),) * p,
        "zb-h1": ((p - 1) * (F + B - W),) * p,
    }
    chunked = simulate(make_schedule("interleaved", p, m, 2), F / 2, B / 2, W / 2)
    assert chunked.idle_s == ((p - 1) * (F + B + W) / 2,) * p


def test_a_message_takes_its_time_on_every_way_but_not_at_the_turn_of_a_v():
    assert simulate(make_schedule("1f1b", 3, 1), 1, 2, 3, 10).makespan_s == 3 * 6 + 4 * 10
    alone, turned = make_schedule("interleaved", 1, 1, 2), make_schedule("zb-v", 1, 1)
    assert simulate(alone, 1, 2, 3, 10).makespan_s == 12
    assert simulate(turned, 1, 2, 3, 10).makespan_s == 12


def test_lockstep_pays_for_the_slowest_task_and_a_transfer_in_every_tick():
    # F F F . B B B . : stage 0 or 1 has an F in three ticks, and so on.
    simulated = simulate(Schedule.from_text(MINE), 1, 2, 4, 10)
    slowest = [1, 1, 1, 2, 2, 4, 4, 4]
    assert (simulated.num_ticks, simulated.lockstep_s) == (8, sum(slowest) + 8 * 10)


def test_a_longer_tick_pairs_one_F_with_one_B_and_one_W():
    simulated = simulate(make_schedule("1f1b", 2, 3), 1, 2, 4)
    # F0 | F1, F0 B0 W0 | B0 W0 F2, F1 B1 W1 | B1 W1, F2 B2 W2 | B2 W2
    assert (simulated.num_paired_ticks, simulated.paired_s) == (5, 1 + 7 + 7 + 7 + 6)
    # Split, W0 of stage 0 may share a tick with B1.
    simulated = simulate(Schedule.from_text(MINE), 1, 2, 4)
    # F0 | F1, F0 | F1 B0 | B0, B1 W0 | B1 W0, W1 | W1
    assert (simulated.num_paired_ticks, simulated.paired_s) == (6, 1 + 1 + 3 + 6 + 6 + 4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_printed_is_what_was_counted(name):
    simulated = simulate(make_schedule(name, 2, 4, 2 if name == "interleaved" else 1), 1, 1, 1)
    first, row, _, header, *stages = str(simulated).splitlines()
    assert compare([simulated]) == f"{first}\n{row}"
    assert row.split()[0] == name
    assert float(row.split()[1]) == simulated.makespan_s
    assert header.split()[0] == "stage"
    assert [int(line.split()[-1]) for line in stages] == list(simulated.peaks)


def test_schedules_rank_as_published():
    # 1F1B < interleaved, ZB-H1 < ZB-H2 in throughput where W is cheaper than F and B (Qi et al.).
    def makespan_s(name: str, v: int = 1) -> float:
        simulated: Simulated = simulate(make_schedule(name, 8, 24, v), 2 / v, 2 / v, 1 / v)
        return simulated.makespan_s

    one, zero, zero_more = map(makespan_s, ("1f1b", "zb-h1", "zb-h2"))
    assert zero_more < zero < one
    assert makespan_s("interleaved", 2) < one


# The table in the docstring of tpmlp.pipeline.executor: alone and in step.
IN_STEP = {
    "gpipe": (33, 33, 33),
    "1f1b": (33, 33, 37.6),
    "interleaved": (28.5, 28.5, 32.1),
    "zb-h1": (27, 28.2, 31.2),
    "zb-h2": (27, 27, 30),
    "zb-v": (25.5, 29.6, 29.6),
}


@pytest.mark.parametrize("name", IN_STEP)
def test_lockstep_costs_what_the_executor_says(name):
    schedule = make_schedule(name, 4, 8, 2 if name == "interleaved" else 1)
    v = schedule.num_chunks
    equal = simulate(schedule, 1 / v, 1 / v, 1 / v)
    other = simulate(schedule, 1 / v, 1.2 / v, 0.8 / v)
    assert equal.makespan_s == pytest.approx(equal.lockstep_s)
    got = equal.makespan_s, other.makespan_s, other.lockstep_s
    assert got == pytest.approx(IN_STEP[name], abs=0.05)
