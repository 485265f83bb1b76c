"""Broken tables and sizes: one error that names the task, its stage and its tick."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.pipeline.cases import MINE
from tpmlp.pipeline.generators import interleaved, make_schedule, zb_h1
from tpmlp.pipeline.route import Task
from tpmlp.pipeline.schedule import Schedule, plot_schedules
from tpmlp.pipeline.simulate import simulate

SCHEDULE = Schedule.from_text(MINE)
ODD: Any = "odd"
SEVEN: Any = 7
ONE: Any = SCHEDULE


def table(first: str, second: str, **flags: Any) -> Schedule:
    return Schedule.from_text(f"{first}\n{second}", **flags)


def with_rows(*rows: Any) -> Schedule:
    return replace(SCHEDULE, ticks=rows)


# What is wrong: (how to do it, the words that the error must have).
BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "missing F": (
        lambda: table("F0 F1 . . B0 B1 W0 W1", ". F0 . B0 B1 W0 W1 ."),
        ("no F1 of stage 1 in 8 ticks",),
    ),
    "missing B": (
        lambda: table("F0 F1 . . B0 . W0 W1", ". F0 F1 B0 B1 W0 W1 ."),
        ("no B1 of stage 0",),
    ),
    "missing W": (
        lambda: table("F0 F1 . . B0 B1 W0 W1", ". F0 F1 B0 B1 . W1 ."),
        ("no W0 of stage 1",),
    ),
    "missing microbatches, a hundred million": (
        lambda: Schedule.from_text("F0 B0 W0 F99999999"),
        ("no F1 of stage 0 in 4 ticks",),
    ),
    "a flag that is none": (lambda: Schedule.from_text("F0 B0 W0", foo=1), ("foo=1", "'peak'")),
    "no text": (lambda: Schedule.from_text(SEVEN), ("table must be text", "got 7")),
    "a name simulated": (
        lambda: simulate(ODD, 1, 1, 1),
        ("schedule='odd'", "make_schedule('1f1b', 4, 8)"),
    ),
    "one schedule drawn as a list": (
        lambda: plot_schedules(ONE),
        ("schedules must be a list", "make_schedule"),
    ),
    "no schedules drawn": (lambda: plot_schedules([]), ("one or more", "got schedules=[]")),
    "missing chunk": (
        lambda: table("F0 F0.1 B0.1 W0.1 B0 . .", ". . . . . . ."),
        ("no W0 of stage 0 in 7 ticks",),
    ),
    "doubled": (
        lambda: table("F0 F1 . . B0 B1 W0 W1", ". F0 F1 B0 B1 W0 W1 B0"),
        ("B0 of stage 1 at ticks 3 and 7",),
    ),
    "F before its input": (
        lambda: table("F0 F1 . . B0 B1 W0 W1", "F0 . F1 B0 B1 W0 W1 ."),
        ("F0 of stage 1 must run after F0 of stage 0", "tick 0, F0 at tick 0", "tick 1 or later"),
    ),
    "B before its gradient": (
        lambda: table("F0 F1 . B0 . B1 W0 W1", ". F0 F1 B0 B1 W0 W1 ."),
        ("B0 of stage 0 must run after B0 of stage 1", "B0 at tick 3, B0 at tick 3", "tick 4"),
    ),
    "B before its F": (
        lambda: table("F0 F1 . . B0 B1 W0 W1", ". F0 B1 B0 F1 W0 W1 ."),
        ("B1 of stage 1 must run after F1 of stage 1", "B1 at tick 2, F1 at tick 4", "tick 5"),
    ),
    "W before its B": (
        lambda: table("F0 F1 . . B0 W1 W0 B1", ". F0 F1 B0 B1 W0 W1 ."),
        ("W1 of stage 0 must run after B1 of stage 0", "W1 at tick 5, B1 at tick 7", "tick 8"),
    ),
    "a gradient that leaves after W only": (
        lambda: table("F0 . B0 W0", ". F0 B0 W0", splits_backward=False),
        ("B0 of stage 0 must run after W0 of stage 1", "B0 at tick 2, W0 at tick 3", "tick 4"),
    ),
    "W apart from its B": (
        lambda: table("F0 . . . B0 . W0", ". F0 B0 W0 . . .", splits_backward=False),
        ("W0 of stage 0 must directly follow B0", "B0 at tick 4, W0 at tick 6", "to tick 5"),
    ),
    "memory": (
        lambda: replace(SCHEDULE, peak=1),
        ("peak=1", "got 2 on stage 0 at tick 1, with F1"),
    ),
    "rows of two lengths": (
        lambda: with_rows((Task("F", 0), None), (None,)),
        ("num_stages=2", "got 1 at tick 1"),
    ),
    "no rows": (lambda: replace(SCHEDULE, ticks=ODD.__len__), ("ticks must be rows",)),
    "no task": (
        lambda: with_rows((None, "F0")),
        ("got 'F0' of stage 1 at tick 0", "Task('F', 0)"),
    ),
    "microbatch": (
        lambda: with_rows((Task("F", 2), None)),
        ("num_microbatches=2", "F2 of stage 0 at tick 0", "num_microbatches=3"),
    ),
    "chunk": (
        lambda: with_rows((None, Task("F", 0, 1))),
        ("num_chunks=1", "F0.1 of stage 1 at tick 0", "num_chunks=2"),
    ),
    "kind": (lambda: Task(ODD, 0), ("kind='odd'", "('F', 'B', 'W')")),
    "negative microbatch": (lambda: Task("F", -1), ("microbatch=-1", "at least 0")),
    "order": (lambda: replace(SCHEDULE, order=ODD), ("order='odd'", "('loop', 'v')")),
    "splits_backward": (lambda: replace(SCHEDULE, splits_backward=ODD), ("splits_backward='odd'",)),
    "peak": (lambda: replace(SCHEDULE, peak=0), ("peak=0",)),
    "name of two words": (lambda: replace(SCHEDULE, name="my own"), ("name='my own'",)),
    "no words": (lambda: Schedule.from_text("\n"), ("a row a stage",)),
    "word": (lambda: table("F0 X1", ". ."), ("got 'X1' of stage 0 at tick 1",)),
    "word without a number": (lambda: table(". .", "F ."), ("got 'F' of stage 1 at tick 0",)),
    "texts of two lengths": (
        lambda: table("F0 B0 W0", "F0"),
        ("got 1 for stage 1, 3 for stage 0",),
    ),
    "flag": (lambda: Schedule.from_text("name=mine peak=much\nF0 B0 W0"), ("'peak=much'",)),
    "unknown schedule": (lambda: make_schedule("2f2b", 2, 2), ("name='2f2b'", "'1f1b'", "'zb-v'")),
    "no microbatch": (lambda: make_schedule("1f1b", 2, 0), ("num_microbatches=0",)),
    "half a stage": (lambda: make_schedule("gpipe", ODD, 2), ("num_stages='odd'",)),
    "few for interleaved": (
        lambda: make_schedule("interleaved", 4, 6, 2),
        ("num_stages=4", "interleaved", "num_microbatches=6", "Use 8"),
    ),
    "one chunk for interleaved": (
        lambda: make_schedule("interleaved", 4, 4),
        ("num_chunks=1", "interleaved", "num_chunks=2"),
    ),
    "no stage for interleaved": (lambda: interleaved(0, 4, 2), ("num_stages=0",)),
    "few for zero-bubble": (
        lambda: zb_h1(4, 3),
        ("at least num_stages=4 for zb-h1", "num_microbatches=3", "1f1b"),
    ),
    "few for zb-h2": (lambda: make_schedule("zb-h2", 4, 3), ("zb-h2", "num_microbatches=3")),
    "few for zb-v": (lambda: make_schedule("zb-v", 4, 3), ("zb-v", "num_microbatches=3")),
    "chunks for 1f1b": (
        lambda: make_schedule("1f1b", 4, 4, 2),
        ("num_chunks must be 1 for 1f1b", "num_chunks=2", "interleaved"),
    ),
    "chunks for zb-v": (lambda: make_schedule("zb-v", 4, 4, 3), ("must be 2", "num_chunks=3")),
    "times of another number of stages": (
        lambda: simulate(SCHEDULE, [1, 2, 3], 1, 1),
        ("num_stages=2", "F_s=[1, 2, 3]"),
    ),
    "a time that is none": (lambda: simulate(SCHEDULE, 1, ODD, 1), ("B_s='odd'",)),
    "negative time": (lambda: simulate(SCHEDULE, 1, 1, -1), ("W_s=-1", "at least 0")),
    "negative transfer": (lambda: simulate(SCHEDULE, 1, 1, 1, -1), ("transfer_s=-1",)),
    "no transfer": (lambda: simulate(SCHEDULE, 1, 1, 1, ODD), ("transfer_s='odd'",)),
    "no time at all": (lambda: simulate(SCHEDULE, 0, 0, 0), ("some time",)),
}


@pytest.mark.parametrize("wrong", BAD)
def test_a_mistake_is_one_error_that_names_the_task(wrong):
    make, said = BAD[wrong]
    with pytest.raises(ValueError, match="must") as raised:
        make()
    for words in said:
        assert words in str(raised.value)
