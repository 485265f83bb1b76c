"""The audit against programs whose collectives, products and memory are known.

A failure means that a count no longer agrees with the hand-written program above it. Where the
tests of the reader of HLO text (tests/inspection/hlo) fail too, look there first.
"""

import contextlib

import jax

# Refused once JAX has started; then the suite's conftest has asked for the devices already.
with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", 8)

import functools
import json
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpmlp.inspection.audit import Audit, audit
from tpmlp.inspection.collective import Collective
from tpmlp.inspection.hlo.products import Product
from tpmlp.inspection.mesh_axes import UNMATCHED

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
    assert report.flops == report.product_flops == 2 * BLOCK**3
    assert (report.host_argument_bytes, report.host_output_bytes, report.host_temp_bytes) == (
        0,
    ) * 3


def ring(W, h):
    """Multiply four blocks of W by the h of four devices, which travel around x meanwhile."""
    z = jnp.zeros_like(h)
    for t in range(4):
        z = z + W[:, t * BLOCK : (t + 1) * BLOCK] @ h
        h = shift("x", 4)(h)
    return z


def ring_on(mesh, times=1):
    """Return the program that goes around the ring `times` times, and its arguments."""

    def body(W, h):
        return lax.scan(lambda h, _: (ring(W, h), None), h, None, length=times)[0]

    step = jax.shard_map(body, mesh=mesh, in_specs=(BLOCKS, BLOCKS), out_specs=BLOCKS)
    W = jnp.ones((mesh.size * BLOCK, 4 * BLOCK), jnp.float32)
    return step, jax.device_put(W, NamedSharding(mesh, BLOCKS)), placed(mesh)


def test_a_program_that_waits_for_its_collectives_overlaps_nothing():
    report = audit(*ring_on(mesh_of((1, 4, 2))))
    row = only_row(report)
    assert (row.kind, row.asynchronous, row.count) == ("ppermute", False, 3)
    assert (row.overlaps, row.overlapped_flops) == ((), 0)
    assert report.products == (Product(m=BLOCK, k=BLOCK, n=BLOCK, dtype="float32", count=4),)


def test_products_of_a_loop_are_multiplied_where_xla_counts_its_body_once():
    mesh = mesh_of((1, 4, 2))
    once, often = audit(*ring_on(mesh)), audit(*ring_on(mesh, times=5))
    assert once.product_flops == 4 * 2 * BLOCK**3
    assert often.product_flops == 5 * once.product_flops
    assert once.product_flops <= (often.flops or 0.0) < 2 * once.product_flops
    assert f"flops of products: {often.product_flops:,}, loops" in str(often)


def test_products_of_a_loop_that_depends_on_data_have_no_sum():
    def body(v):
        return lax.while_loop(lambda c: jnp.sum(c) < 3.0, lambda c: c @ c, v)

    report = audit(body, jnp.ones((BLOCK, BLOCK), jnp.float32))
    (row,) = report.products
    assert (row.count, row.total_flops) == (None, None)
    assert "flops of products: ?" in str(report)
    with pytest.raises(ValueError, match=r"count=None for 24 x 24 x 24 \(trip count of while"):
        _ = report.product_flops


def test_rows_that_overlap_different_products_are_apart_in_table_and_data():
    product = Product(m=1024, k=512, n=2048, dtype="bfloat16", count=2)
    alike = {
        "kind": "ppermute",
        "axes": ("x",),
        "group_size": 4,
        "payload_bytes": 2**20,
        "dtype": "float32",
        "asynchronous": True,
    }
    report = replace(
        EMPTY,
        collectives=(
            Collective(**alike, count=1),
            Collective(**alike, count=1200, overlaps=(product,)),
            Collective(**alike, count=1, overlaps=(replace(product, count=1),)),
        ),
        products=(replace(product, count=2401, batch=3),),
        host_temp_bytes=2**30,
    )
    assert str(report).splitlines() == [
        "per device and call",
        "collective  axes  dtype       bytes  count     total  mode   meanwhile               note",
        "ppermute    x     float32  1.00 MiB      1  1.00 MiB  async  no product",
        "ppermute    x     float32  1.00 MiB  1,200  1.17 GiB  async  2 products, 4.29 GFLOP",
        "ppermute    x     float32  1.00 MiB      1  1.00 MiB  async  1 product, 2.15 GFLOP",
        "",
        "               product  dtype          flops  count        total  note",
        "3 of 1024 x 512 x 2048  bfloat16  6.44 GFLOP  2,401  15.47 TFLOP",
        "",
        "memory        bytes",
        "argument        0 B",
        "output          0 B",
        "temp            0 B",
        "alias           0 B",
        "peak            0 B",
        "host temp  1.00 GiB",
        "",
        f"flops of products: {report.product_flops:,}, loops multiplied in",
        "flops as XLA counts them: ?, the body of a loop once",
    ]
    row = json.loads(json.dumps(report.rows()))[1]
    assert row["overlaps"] == [
        {
            "m": 1024,
            "k": 512,
            "n": 2048,
            "batch": 1,
            "dtype": "bfloat16",
            "count": 2,
            "note": "",
            "flops": 2**31,
            "total_flops": 2**32,
        }
    ]
    assert row["overlapped_flops"] == 2**32
    assert report.product_rows()[0]["total_flops"] == report.product_flops


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
        "overlaps": [],
        "overlapped_flops": 0,
        "note": "",
    }
    lines = str(report).splitlines()
    assert lines[1:3] == [
        "collective  axes  dtype       bytes  count     total  mode  meanwhile  note",
        "all_gather  x     float32  2.25 KiB      1  2.25 KiB  sync",
    ]
    assert "argument  2.25 KiB" in lines
    assert "no products" in lines
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
