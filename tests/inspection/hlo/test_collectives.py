"""Collectives as XLA prints them, and what the schedule puts between a start and its done.

A failure means that one printed form is misread. The literals are shortened from what XLA printed
for CPU, TPU v5e and H100, or follow its printer where no small program makes it print that form
(async-start, several operands of one start).
"""

import pytest

from tests.inspection.hlo.cases import PAIRS, communicating
from tpmlp.inspection.hlo.products import Product

GROUPS = "replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true"
ASYNC = 'backend_config={"collective_backend_config":{"is_sync":false,"is_pipelined":false}}'
SYNC = ASYNC.replace('"is_sync":false', '"is_sync":true')


@pytest.mark.parametrize(
    ("lines", "kind", "payload_bytes"),
    [
        (
            (
                f"%s = (f32[2,8]{{1,0}}, f32[4,8]{{1,0}}) all-gather-start(%p), channel_id=1, "
                f"{GROUPS}, dimensions={{0}}, {ASYNC}",
                "ROOT %d = f32[4,8]{1,0} all-gather-done(%s)",
            ),
            "all_gather",
            128,
        ),
        (
            (
                f"%s = ((f32[2,8]{{1,0}}, f32[8]{{0}}), (f32[4,8]{{1,0}}, f32[16]{{0}})) "
                f"all-gather-start(%p, %q), channel_id=1, {GROUPS}, dimensions={{0}}",
                "ROOT %d = (f32[4,8]{1,0}, f32[16]{0}) all-gather-done(%s)",
            ),
            "all_gather",
            192,
        ),
        (
            (
                f"%s = f32[2,8]{{1,0}} all-reduce-start(%p), channel_id=1, {GROUPS}, "
                f"to_apply=%add, {ASYNC}",
                "ROOT %d = f32[2,8]{1,0} all-reduce-done(%s)",
            ),
            "all_reduce",
            64,
        ),
        (
            (
                f"%s = (f32[2,8]{{1,0}}, f32[8]{{0}}) all-reduce-start(%p, %q), channel_id=1, "
                f"{GROUPS}, to_apply=%add",
                "ROOT %d = (f32[2,8]{1,0}, f32[8]{0}) all-reduce-done(%s)",
            ),
            "all_reduce",
            96,
        ),
        (
            (
                f"%s = ((f32[2,8]{{1,0}}), f32[1,8]{{1,0}}) reduce-scatter-start(%p), "
                f"channel_id=1, {GROUPS}, dimensions={{0}}, to_apply=%add, {ASYNC}",
                "ROOT %d = f32[1,8]{1,0} reduce-scatter-done(%s)",
            ),
            "reduce_scatter",
            64,
        ),
        (
            (
                f"%s = ((f32[2,8]{{0,1}}), f32[2,8]{{0,1}}) all-to-all-start(%p), channel_id=1, "
                f"{GROUPS}, dimensions={{1}}",
                "ROOT %d = f32[2,8]{0,1} all-to-all-done(%s)",
            ),
            "all_to_all",
            64,
        ),
        (
            (
                "%s = (f32[2,8]{1,0:T(8,128)S(1)}, f32[2,8]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, "
                f"/*index=3*/u32[]{{:S(2)}}) collective-permute-start(%p), channel_id=1, "
                f"source_target_pairs={PAIRS}",
                "ROOT %d = f32[2,8]{1,0:T(8,128)S(1)} collective-permute-done(%s)",
            ),
            "ppermute",
            64,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_start_and_its_done_are_one_asynchronous_collective(lines, kind, payload_bytes):
    (found,) = communicating("%p = f32[2,8]{1,0} parameter(0)", *lines)
    assert (found.kind, found.payload_bytes) == (kind, payload_bytes)
    assert (found.asynchronous, found.count, found.dtype) == (True, 1, "float32")


def test_a_start_that_was_made_synchronous_is_reported_so():
    (found,) = communicating(
        f"%s = f32[2,8]{{1,0}} all-reduce-start(%p), channel_id=1, {GROUPS}, to_apply=%add, {SYNC}"
    )
    assert not found.asynchronous


def test_a_wrapped_asynchronous_collective_is_found_once():
    wrapped = (
        "%wrapped (q: f32[2,8]) -> f32[1,8] {\n"
        "  %q = f32[2,8]{1,0} parameter(0)\n"
        f"  ROOT %rs = f32[1,8]{{1,0}} reduce-scatter(%q), channel_id=1, {GROUPS}, "
        "dimensions={0}, to_apply=%add\n}\n"
        "\n%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %sum = f32[] add(%a, %b)\n}\n"
    )
    (found,) = communicating(
        "%s = ((f32[2,8]{1,0}), f32[1,8]{1,0}, u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[2,8]{1,0}), f32[1,8]{1,0}, u32[]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[1,8]{1,0} async-done(%u), calls=%wrapped",
        before=wrapped,
    )
    assert (found.kind, found.payload_bytes, found.asynchronous) == ("reduce_scatter", 64, True)


def test_operands_printed_with_their_shapes_are_read_too():
    (found,) = communicating(
        "ROOT %a = (f32[1,8]{1,0}, f32[1,8]{1,0}) all-to-all(f32[1,8]{1,0} %p, f32[1,8]{1,0} %q), "
        f"channel_id=1, {GROUPS}"
    )
    assert (found.kind, found.payload_bytes, found.groups[0]) == ("all_to_all", 64, (0, 1))


def test_a_combined_collective_of_several_types_names_them_all():
    (found,) = communicating(
        f"ROOT %a = (f32[8]{{0}}, bf16[8]{{0}}) all-reduce(%p, %q), channel_id=1, {GROUPS}"
    )
    assert (found.dtype, found.payload_bytes) == ("float32+bfloat16", 48)


def test_a_collective_without_a_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="got ragged-all-to-all in r"):
        communicating("ROOT %r = f32[2,8]{1,0} ragged-all-to-all(%p, %q)")


def test_transfers_to_the_host_are_no_collectives():
    assert (
        communicating("%s = (f32[8]{0}, u32[], token[]) send(%p, %t), is_host_transfer=true") == ()
    )


# --- What runs meanwhile --------------------------------------------------------------------------

BLOCK = "bf16[8,8]{1,0}"
DOT = f"{BLOCK} dot(%h, %h), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
H = f"%h = {BLOCK} parameter(0)"
START = (
    f"%s = ({BLOCK}, {BLOCK}) collective-permute-start(%h), channel_id=1, "
    f"source_target_pairs={PAIRS}"
)
DONE = f"%d = {BLOCK} collective-permute-done(%s)"
ONE = (Product(m=8, k=8, n=8, dtype="bfloat16"),)
TWO = (Product(m=8, k=8, n=8, dtype="bfloat16", count=2),)


def dots(*names):
    return tuple(f"%{name} = {DOT}" for name in names)


@pytest.mark.parametrize(
    ("lines", "overlaps"),
    [
        ((H, *dots("a"), START, DONE, *dots("b")), ()),
        ((H, *dots("a"), START, *dots("b"), DONE, *dots("c")), ONE),
        ((H, START, *dots("a", "b"), DONE), TWO),
        ((H, START, f"%a = {BLOCK} add(%h, %h)", DONE), ()),
        ((H, f"{START}, {SYNC}", *dots("a"), DONE), ()),
    ],
    ids=["none between", "one between", "two alike", "no product", "made synchronous"],
)
def test_products_between_start_and_done_are_those_that_run_meanwhile(lines, overlaps):
    (found,) = communicating(*lines)
    assert found.overlaps == overlaps


def test_collectives_in_flight_together_each_have_the_products_of_their_own_time():
    first, second = communicating(
        H,
        START,
        *dots("a"),
        START.replace("%s", "%t"),
        *dots("b"),
        DONE,
        *dots("c"),
        DONE.replace("%d", "%e").replace("%s", "%t"),
    )
    assert (first.overlaps, second.overlaps) == (TWO, TWO)


def test_a_wrapped_collective_is_in_flight_until_the_done_of_its_last_update():
    wrapped = (
        f"%wrapped (q: bf16[8,8]) -> bf16[8,8] {{\n  %q = {BLOCK} parameter(0)\n"
        f"  ROOT %r = {BLOCK} all-reduce(%q), channel_id=1, {GROUPS}, to_apply=%add\n}}\n"
    )
    state = f"(({BLOCK}), {BLOCK}, u32[])"
    (found,) = communicating(
        H,
        f"%s = {state} async-start(%h), calls=%wrapped",
        *dots("a"),
        f"%u = {state} async-update(%s), calls=%wrapped",
        *dots("b"),
        f"%d = {BLOCK} async-done(%u), calls=%wrapped",
        *dots("c"),
        before=wrapped,
    )
    assert (found.count, found.overlaps) == (1, TWO)


def test_products_in_a_loop_that_runs_meanwhile_are_multiplied():
    body = (
        f"%body (h: bf16[8,8]) -> bf16[8,8] {{\n  {H}\n  ROOT %a = {DOT}\n}}\n"
        "\n%condition (h: bf16[8,8]) -> pred[] {\n  ROOT %p = pred[] parameter(0)\n}\n"
    )
    (found,) = communicating(
        H,
        START,
        f"%w = {BLOCK} while(%h), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"2"}}',
        DONE,
        before=body,
    )
    assert found.overlaps == TWO


def test_a_collective_of_a_loop_counts_what_overlaps_one_execution():
    body = (
        f"%body (h: bf16[8,8]) -> bf16[8,8] {{\n  {H}\n  {START}\n  %a = {DOT}\n  ROOT {DONE}\n}}\n"
        "\n%condition (h: bf16[8,8]) -> pred[] {\n  ROOT %p = pred[] parameter(0)\n}\n"
    )
    (found,) = communicating(
        H,
        f"%w = {BLOCK} while(%h), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"5"}}',
        before=body,
    )
    assert (found.count, found.overlaps) == (5, ONE)
