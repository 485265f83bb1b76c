"""The audit against programs whose collectives are known, and the reader of HLO against its forms.

A failure of a test with a mesh means that a count no longer agrees with the hand-written program
above it; a failure of a test with literal HLO means that one printed form is misread. The literals
are shortened from what XLA printed for CPU, TPU v5e and H100, or follow its printer where no small
program makes it print that form (async-start, several operands of one start, device_ids).
"""

import contextlib

import jax

# Refused once JAX has started; then the suite's conftest has asked for the devices already.
with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", 8)

import functools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpmlp.inspection import hlo
from tpmlp.inspection.audit import UNMATCHED, Audit, Collective, audit

AXES = ("data", "x", "y")
SHAPES = [(2, 2, 2), (1, 4, 2), (1, 8, 1), (2, 3, 1)]
SUBSETS = [("x",), ("y",), ("data",), ("x", "y"), ("data", "y"), ("data", "x", "y")]

# Local blocks are [24, 24] float32: 24 is divisible by every group of the meshes above.
BLOCK = 24
V = BLOCK * BLOCK * 4
BLOCKS = P(AXES)


def mesh_of(shape, names=AXES, devices=None):
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices[: math.prod(shape)]).reshape(shape), names)


def placed(mesh):
    rows = mesh.size * BLOCK
    return jax.device_put(jnp.ones((rows, BLOCK), jnp.float32), NamedSharding(mesh, BLOCKS))


def sharded(body, mesh):
    """Return the jitted program that runs `body` on the blocks of its only argument."""
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=BLOCKS, out_specs=BLOCKS))


def group_size(shape, axes):
    return math.prod(shape[AXES.index(axis)] for axis in axes)


def crossed(shape, axes):
    return tuple(axis for axis in axes if shape[AXES.index(axis)] > 1)


def shift(axes, size):
    return lambda v: lax.ppermute(v, axes, [(i, (i + 1) % size) for i in range(size)])


def only_row(report):
    (row,) = report.collectives
    return row


# kind -> (the collective on a block v over axes of p devices, V as a function of p)
PROGRAMS = {
    "all_gather": (lambda axes, p: lambda v: lax.all_gather(v, axes, tiled=True), lambda p: V * p),
    "reduce_scatter": (
        lambda axes, p: lambda v: lax.psum_scatter(v, axes, tiled=True),
        lambda p: V,
    ),
    "all_reduce": (lambda axes, p: lambda v: lax.psum(v, axes), lambda p: V),
    "all_to_all": (
        lambda axes, p: lambda v: lax.all_to_all(v, axes, 0, 0, tiled=True),
        lambda p: V,
    ),
    "ppermute": (shift, lambda p: V),
}
FACTORS = {
    "all_gather": lambda p: (p - 1) / p,
    "reduce_scatter": lambda p: (p - 1) / p,
    "all_reduce": lambda p: 2 * (p - 1) / p,
    "all_to_all": lambda p: (p - 1) / p,
    "ppermute": lambda p: 1,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", PROGRAMS)
def test_one_collective_is_reported_as_computed_by_hand(kind, shape):
    mesh = mesh_of(shape)
    for axes in SUBSETS:
        p = group_size(shape, axes)
        body, payload = PROGRAMS[kind]
        report = audit(sharded(body(axes, p), mesh), placed(mesh))
        if p == 1:
            assert report.collectives == (), f"nothing moves over {axes}"
            continue
        assert only_row(report) == Collective(
            kind=kind,
            axes=crossed(shape, axes),
            group_size=p,
            payload_bytes=payload(p),
            dtype="float32",
            asynchronous=False,
            count=1,
        )
        assert only_row(report).bytes == FACTORS[kind](p) * payload(p)
        assert report.counts == {kind: 1}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mesh_of_reversed_devices_names_the_same_axes(shape):
    mesh = mesh_of(shape, devices=jax.devices()[::-1])
    report = audit(sharded(lambda v: lax.all_gather(v, "x", tiled=True), mesh), placed(mesh))
    assert only_row(report).axes == ("x",)


def test_a_mesh_given_in_another_order_is_matched_device_by_device():
    mesh = mesh_of((2, 2, 2))
    step = sharded(lambda v: lax.psum(v, "x"), mesh)
    renamed = Mesh(mesh.devices.transpose(1, 2, 0), ("p", "q", "r"))
    assert only_row(audit(step, placed(mesh), mesh=renamed)).axes == ("p",)


def test_an_abstract_mesh_names_the_axes_by_position():
    mesh = mesh_of((2, 4, 1))
    named = AbstractMesh((2, 4), ("outer", "inner"))
    report = audit(sharded(lambda v: lax.psum(v, "x"), mesh), placed(mesh), mesh=named)
    assert only_row(report).axes == ("inner",)


def test_a_scan_of_five_counts_its_collective_five_times():
    mesh = mesh_of((2, 2, 2))

    def body(v):
        return lax.scan(lambda c, _: (2.0 * shift("x", 2)(c), None), v, None, length=5)[0]

    report = audit(sharded(body, mesh), placed(mesh))
    assert (only_row(report).kind, only_row(report).count) == ("ppermute", 5)
    assert report.bytes_by() == only_row(report).total_bytes == 5 * V


def test_nested_loops_multiply():
    mesh = mesh_of((1, 4, 2))

    def inner(_, c):
        return lax.fori_loop(0, 3, lambda _, v: jnp.sin(shift("y", 2)(v)), c)

    report = audit(sharded(lambda v: lax.fori_loop(0, 4, inner, v), mesh), placed(mesh))
    assert report.counts == {"ppermute": 12}


def test_a_loop_that_depends_on_data_has_no_count_and_no_total():
    mesh = mesh_of((2, 2, 2))

    def body(v):
        return lax.while_loop(lambda c: jnp.sum(c) < 3.0, lambda c: 2.0 * shift("x", 2)(c), v)

    report = audit(sharded(body, mesh), placed(mesh))
    row = only_row(report)
    assert (row.count, row.total_bytes) == (None, None)
    assert row.note.startswith("trip count of while")
    assert row.note in str(report)
    for total in (report.bytes_by, lambda: report.counts):
        with pytest.raises(ValueError, match="count=None for ppermute over x"):
            total()


def test_each_branch_of_a_conditional_is_a_row_that_names_it():
    mesh = mesh_of((2, 2, 2))

    def body(v):
        return lax.cond(v[0, 0] > 0.0, shift("x", 2), shift("y", 2), v)

    report = audit(sharded(body, mesh), placed(mesh))
    assert {row.axes: (row.count, row.note) for row in report.collectives} == {
        ("y",): (1, "if branch 0 of 2 is taken"),
        ("x",): (1, "if branch 1 of 2 is taken"),
    }
    assert report.bytes_by() == 2 * V


def test_all_reduces_that_xla_combines_keep_their_bytes():
    mesh = mesh_of((1, 4, 2))

    def body(v):
        return lax.psum(v, "x"), lax.psum(jnp.sum(v)[None], "x"), lax.psum(jnp.sum(v, axis=0), "x")

    report = audit(sharded(body, mesh), placed(mesh))
    payload = V + 4 + BLOCK * 4
    assert only_row(report).payload_bytes == payload
    assert report.bytes_by("all_reduce", "x") == 2 * payload * 3 / 4
    assert report.bytes_by("all_reduce", "y") == report.bytes_by("all_gather") == 0


def test_alike_collectives_share_a_row_and_different_ones_do_not():
    mesh = mesh_of((2, 2, 2))

    def body(v):
        for _ in range(3):
            v = jnp.sin(shift("x", 2)(v))
        return shift("y", 2)(v)

    report = audit(sharded(body, mesh), placed(mesh))
    assert [(row.axes, row.count) for row in report.collectives] == [(("x",), 3), (("y",), 1)]
    assert (report.bytes_by(axis="x"), report.bytes_by(axis="y")) == (3 * V, V)


def test_bytes_that_p_does_not_divide_are_exact_in_the_sum():
    mesh = mesh_of((2, 3, 1))

    def body(v):
        def add(_, s):
            return jnp.sin(lax.pcast(lax.psum(s, "x"), "x", to="varying"))

        return lax.fori_loop(0, 3, add, jnp.sum(v)[None])

    report = audit(sharded(body, mesh), placed(mesh))
    assert only_row(report).bytes == 2 * 4 * 2 / 3
    assert report.bytes_by() == 16


def test_groups_that_are_no_product_of_axes_are_unmatched():
    mesh = mesh_of((1, 8, 1))

    def halves(v):
        # Sums over four of the eight devices on axis x, the work of the automatic partitioner.
        return jnp.sum(v.reshape(2, 4 * BLOCK, BLOCK), axis=1)

    report = audit(jax.jit(halves), placed(mesh))
    (row,) = (row for row in report.collectives if row.kind == "all_reduce")
    assert (row.axes, row.group_size, row.payload_bytes) == ((UNMATCHED,), 4, BLOCK * 4)
    assert report.bytes_by("all_reduce", UNMATCHED) == 2 * BLOCK * 4 * 3 / 4


def test_a_permutation_of_one_slice_alone_is_unmatched():
    mesh = mesh_of((2, 2, 2))
    pairs = [(0, 1), (1, 0)]
    report = audit(sharded(lambda v: lax.ppermute(v, AXES, pairs), mesh), placed(mesh))
    assert only_row(report).axes == (UNMATCHED,)


def test_memory_and_flops_are_those_of_one_device():
    mesh = mesh_of((1, 4, 2))
    step = jax.jit(sharded(lambda v: v.T @ v, mesh))
    report = audit(step, placed(mesh))
    assert report.collectives == ()
    assert (report.argument_bytes, report.output_bytes, report.alias_bytes) == (V, V, 0)
    assert report.peak_bytes >= 2 * V
    assert report.peak_bytes >= report.temp_bytes
    assert report.temp_bytes < V
    assert report.flops == 2 * BLOCK**3


def test_a_donated_argument_is_counted_as_alias():
    step = jax.jit(lambda v: v + 1.0, donate_argnums=0)
    report = audit(step, jax.ShapeDtypeStruct((BLOCK, BLOCK), jnp.float32))
    assert (report.alias_bytes, report.peak_bytes) == (V, V)


def test_every_form_of_a_function_gives_the_same_audit():
    mesh = mesh_of((2, 2, 2))
    v = placed(mesh)
    step = sharded(lambda v: lax.psum(v, "x"), mesh)
    lowered = step.lower(v)
    reports = [
        audit(step, v),
        audit(lowered),
        audit(lowered.compile()),
        audit(lambda v: step(v), v),
        audit(functools.partial(step), v),
    ]
    assert all(report == reports[0] for report in reports)


def test_the_table_and_the_rows_say_what_the_fields_say():
    mesh = mesh_of((2, 2, 2))
    report = audit(sharded(lambda v: lax.all_gather(v, "x", tiled=True), mesh), placed(mesh))
    (row,) = json.loads(json.dumps(report.rows()))
    assert row == {
        "kind": "all_gather",
        "axes": ["x"],
        "group_size": 2,
        "dtype": "float32",
        "payload_bytes": 2 * V,
        "bytes": V,
        "count": 1,
        "total_bytes": V,
        "asynchronous": False,
        "note": "",
    }
    lines = str(report).splitlines()
    assert lines[1:3] == [
        "collective  axes  dtype       bytes  count     total  mode  note",
        "all_gather  x     float32  2.25 KiB      1  2.25 KiB  sync",
    ]
    assert "argument  2.25 KiB" in lines
    assert "no collectives" in str(audit(lambda v: v, jnp.zeros(2, jnp.float32)))


EMPTY = Audit(
    collectives=(),
    mesh_axes=AXES,
    argument_bytes=0,
    output_bytes=0,
    temp_bytes=0,
    alias_bytes=0,
    peak_bytes=0,
    flops=None,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EMPTY.bytes_by("allgather"), "kind must be one of all_gather.*kind='allgather'"),
        (lambda: EMPTY.bytes_by(axis="z"), "axis must be one of data, x, y.*axis='z'"),
        (lambda: audit(3), "function must be callable.*function=3"),
        (lambda: audit(jax.jit(jnp.sin).lower(1.0), 1.0), "args must be empty.*1 args"),
        (lambda: audit(*summed(), mesh=mesh_of((1, 4, 1))), "mesh must have one.*of 4.*8 devices"),
        (
            lambda: audit(*summed_on(6), mesh=mesh_of((1, 6, 1), devices=jax.devices()[2:])),
            "got .*in mesh=.*Pass the mesh of its arguments",
        ),
        (lambda: audit(*nameless()), "mesh must be given.*mesh=None.*8 devices"),
    ],
    ids=[
        "kind",
        "axis",
        "not callable",
        "args of compiled",
        "mesh size",
        "mesh devices",
        "no mesh",
    ],
)
def test_a_mistake_is_refused_with_its_name_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def summed():
    return summed_on(8)


def summed_on(num_devices):
    mesh = mesh_of((1, num_devices, 1))
    return sharded(lambda v: lax.psum(v, "x"), mesh), placed(mesh)


def nameless():
    """Return a program with a collective whose inputs and outputs carry no mesh."""
    mesh = mesh_of((1, 8, 1))

    def program():
        v = lax.with_sharding_constraint(jnp.arange(16.0), NamedSharding(mesh, P("x")))
        jax.debug.callback(lambda s: None, jnp.sum(jnp.sin(v)))

    return (program,)


# --- The reader of HLO ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("{{0,2},{2,0}}", ((0, 2), (2, 0))),
        ("{}, to_apply=%add", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8], dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[4,2]T(1,0), to_apply=%add", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("[4,2]<=[2,2,2]T(0,2,1), x={}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['data'=2,'x'=2,'y'=2] {'x'}, d={0}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['data'=2,'x'=2,'y'=2] {'data','y'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['data'=1,'x'=4,'y'=2] {'y'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['x'=8,'y'=1] {'x':(2)4}, d={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['x'=8,'y'=1] {'x':(1)2}, d={0}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}, d={0}", ((3, 1), (0, 2))),
    ],
)
def test_replica_groups_are_expanded_from_every_form(text, groups):
    assert hlo.parse_groups(text, num_devices=8) == groups


def test_replica_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match=r"replica_groups must be .*got 'ring"):
        hlo.parse_groups("ring(8)", num_devices=8)


@pytest.mark.parametrize(
    ("text", "dtype", "num_bytes"),
    [
        ("f32[2,8]{1,0}", "float32", 64),
        ("f64[]", "float64", 8),
        ("bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}", "bfloat16", 2**20),
        ("pred[3]{0}", "bool", 3),
        ("s4[5]{0:E(4)}", "int4", 3),
        ("u32[]{:S(2)}", "uint32", 4),
        ("c64[2]", "complex64", 16),
        ("f8e4m3fn[16]{0}", "float8_e4m3fn", 16),
        ("f32[0,8]{1,0}", "float32", 0),
        ("token[]", "token", 0),
    ],
)
def test_an_array_shape_has_its_type_and_bytes(text, dtype, num_bytes):
    assert hlo.parse_shape(text) == hlo.Array(dtype=dtype, num_bytes=num_bytes)


def test_a_tuple_shape_nests():
    word, block = hlo.Array(dtype="uint32", num_bytes=4), hlo.Array(dtype="float32", num_bytes=64)
    text = "((f32[2,8]{1,0:T(8,128)}), f32[2,8]{1,0}, u32[]{:S(2)}, ())"
    assert hlo.parse_shape(text) == ((block,), block, word, ())


def program(*lines, before=""):
    """Return the reader's collectives of an entry computation on 8 partitions."""
    entry = "\n".join(f"  {line}" for line in lines)
    head = "HloModule jit_step, is_scheduled=true, num_partitions=8"
    text = f"{head}\n\n{before}\nENTRY %main (p: f32[2,8]) -> f32[2,8] {{\n{entry}\n}}\n"
    return hlo.collectives(hlo.parse_module(text))


PAIRS = "{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}"
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
    (found,) = program("%p = f32[2,8]{1,0} parameter(0)", *lines)
    assert (found.kind, found.payload_bytes) == (kind, payload_bytes)
    assert (found.asynchronous, found.count, found.dtype) == (True, 1, "float32")


def test_a_start_that_was_made_synchronous_is_reported_so():
    (found,) = program(
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
    (found,) = program(
        "%s = ((f32[2,8]{1,0}), f32[1,8]{1,0}, u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[2,8]{1,0}), f32[1,8]{1,0}, u32[]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[1,8]{1,0} async-done(%u), calls=%wrapped",
        before=wrapped,
    )
    assert (found.kind, found.payload_bytes, found.asynchronous) == ("reduce_scatter", 64, True)


def test_operands_printed_with_their_shapes_are_read_too():
    (found,) = program(
        "ROOT %a = (f32[1,8]{1,0}, f32[1,8]{1,0}) all-to-all(f32[1,8]{1,0} %p, f32[1,8]{1,0} %q), "
        f"channel_id=1, {GROUPS}"
    )
    assert (found.kind, found.payload_bytes, found.groups[0]) == ("all_to_all", 64, (0, 1))


def test_a_combined_collective_of_several_types_names_them_all():
    (found,) = program(
        f"ROOT %a = (f32[8]{{0}}, bf16[8]{{0}}) all-reduce(%p, %q), channel_id=1, {GROUPS}"
    )
    assert (found.dtype, found.payload_bytes) == ("float32+bfloat16", 48)


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
    (found,) = program(f"ROOT %r = f32[2,8]{{1,0}} {call}", before=inner)
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
    (found,) = program(*LOOP, before=counted(**changes))
    assert found.count == count
    assert found.note == ("trip count of w unknown" if count is None else "")


def test_a_known_trip_count_is_taken_from_the_loop():
    loop = f'{LOOP[-1]}, backend_config={{"known_trip_count":{{"n":"7"}},"dynamic_variables":[]}}'
    (found,) = program(loop, before=counted(update="multiply"))
    assert (found.count, found.note) == (7, "")


def test_a_collective_without_a_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="got ragged-all-to-all in r"):
        program("ROOT %r = f32[2,8]{1,0} ragged-all-to-all(%p, %q)")


def test_transfers_to_the_host_are_no_collectives():
    assert program("%s = (f32[8]{0}, u32[], token[]) send(%p, %t), is_host_transfer=true") == ()
