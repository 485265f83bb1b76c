"""Pictures: a failure means that a timeline shows other tasks, or other times, than the table."""

import pytest

from tpmlp.pipeline.generators import SCHEDULES, make_schedule
from tpmlp.pipeline.schedule import plot_schedules

pytest.importorskip("matplotlib")
ALL = [make_schedule(name, 2, 4, 2 if name == "interleaved" else 1) for name in SCHEDULES]


@pytest.mark.parametrize("schedule", ALL, ids=SCHEDULES)
def test_a_timeline_has_a_box_and_a_number_for_each_task(schedule):
    (panel,) = schedule.plot().axes
    boxes = sum(len(collection.get_paths()) for collection in panel.collections)
    numbers = sorted(int(text.get_text()) for text in panel.texts)
    tasks = [task for row in schedule.tasks for task in row]
    assert boxes == len(tasks)
    assert numbers == sorted(task.microbatch for task in tasks)


def test_a_box_is_where_its_task_is_in_the_table():
    (panel,) = make_schedule("1f1b", 2, 1).plot().axes
    spans = sorted(
        tuple(path.get_extents().intervalx) + tuple(path.get_extents().intervaly)
        for collection in panel.collections
        for path in collection.get_paths()
    )
    # F0 of stage 0, then F0 B0 W0 of stage 1, then B0 W0 of stage 0; rows are 1 high.
    places = [(0, 0), (1, 1), (2, 1), (3, 1), (4, 0), (5, 0)]
    assert spans == [(tick, tick + 1, stage - 0.5, stage + 0.5) for tick, stage in places]


def test_captions_say_ticks_idle_slots_and_peaks():
    panels = plot_schedules(ALL).axes
    captions = [panel.get_title(loc="left") for panel in panels]
    assert captions[0] == "gpipe: 15 ticks, 20% of slots idle, peak activations 4"
    assert captions[-1] == (
        "interleaved, 2 chunks a stage: 27 ticks, 11% of slots idle, "
        "peak activations 5 of a chunk (2.5 of a stage)"
    )


def test_schedules_share_one_axis_of_time_in_which_a_chunk_is_a_part_of_a_stage():
    panels = plot_schedules(ALL).axes
    assert {panel.get_xlim() for panel in panels} == {(0, 15)}
    ends = [
        max(path.get_extents().x1 for boxes in panel.collections for path in boxes.get_paths())
        for panel in panels
    ]
    assert ends == [schedule.num_ticks / schedule.num_chunks for schedule in ALL]


def test_numbers_are_left_out_where_boxes_are_too_narrow_for_them():
    (panel,) = make_schedule("1f1b", 2, 200).plot().axes
    assert not panel.texts
