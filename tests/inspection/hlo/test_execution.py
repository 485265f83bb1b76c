"""What a call runs, and how often, seen by a collective inside.

A failure means that a call is not followed or that a loop is miscounted.
"""

import pytest

from tests.inspection.hlo.cases import PAIRS, communicating


@pytest.mark.parametrize(
    "call",
    [
        "fusion(%p), kind=kLoop, calls=%inner",
        'call(%p), to_apply=%inner, frontend_attributes={xla_cpu_small_call="true"}',
        'custom-call(%p), custom_call_target="f", called_computations={%inner}',
        "conditional(%flag, %p, %p), true_computation=%inner, false_computation=%empty",
        "conditional(%index, %p, %p), branch_computations={%inner, %empty}",
    ],
)
def test_collectives_are_found_in_every_kind_of_called_computation(call):
    inner = (
        "%inner (q: f32[2,8]) -> f32[2,8] {\n"
        f"  ROOT %g = f32[2,8]{{1,0}} collective-permute(%q), source_target_pairs={PAIRS}\n}}\n"
        "\n%empty (q: f32[2,8]) -> f32[2,8] {\n  ROOT %q = f32[2,8]{1,0} parameter(0)\n}\n"
    )
    (found,) = communicating(f"ROOT %r = f32[2,8]{{1,0}} {call}", before=inner)
    assert (found.kind, found.count) == ("ppermute", 1)
    assert found.note == ("if branch 0 of 2 is taken" if "conditional" in call else "")


# A loop as TPU programs print it: without a trip count, its counter copied between memories.
COUNTED = """
%body (s: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {{
  %s = (s32[]{{:T(128)}}, f32[2,8]{{1,0:T(8,128)}}) parameter(0)
  %one = s32[]{{:T(128)}} constant({step})
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %copy.5 = s32[]{{:T(128)S(6)}} copy(%i)
  %next = s32[]{{:T(128)}} {update}(%copy.5, %one)
  %v = f32[2,8]{{1,0:T(8,128)}} get-tuple-element(%s), index=1
  %g = f32[2,8]{{1,0:T(8,128)}} collective-permute(%v), source_target_pairs={pairs}
  ROOT %t = (s32[]{{:T(128)}}, f32[2,8]{{1,0:T(8,128)}}) tuple(%next, %g)
}}

%condition (s: (s32[], f32[2,8])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant({limit})
  %s.1 = (s32[]{{:T(128)}}, f32[2,8]{{1,0:T(8,128)}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i.1, %limit), direction={direction}
}}
"""
LOOP = (
    "%zero = s32[]{:T(128)} constant(0)",
    "%copy.12 = s32[]{:T(128)} copy(%zero)",
    "%t.1 = (s32[]{:T(128)}, f32[2,8]{1,0:T(8,128)}) tuple(%copy.12, %p)",
    "%w = (s32[]{:T(128)}, f32[2,8]{1,0:T(8,128)}) while(%t.1), condition=%condition, body=%body",
)


def counted(**changes):
    values = {"step": 1, "update": "add", "limit": 5, "direction": "LT", "pairs": PAIRS}
    return COUNTED.format(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 5),
        ({"step": 2}, 3),
        ({"limit": 0}, 0),
        ({"step": 0}, None),
        ({"update": "multiply"}, None),
        ({"direction": "GT"}, None),
    ],
    ids=str,
)
def test_a_loop_without_a_trip_count_is_counted_from_its_counter_or_not_at_all(changes, count):
    (found,) = communicating(*LOOP, before=counted(**changes))
    assert found.count == count
    assert found.note == ("trip count of w unknown" if count is None else "")


def test_a_known_trip_count_is_taken_from_the_loop():
    loop = f'{LOOP[-1]}, backend_config={{"known_trip_count":{{"n":"7"}},"dynamic_variables":[]}}'
    (found,) = communicating(loop, before=counted(update="multiply"))
    assert (found.count, found.note) == (7, "")
