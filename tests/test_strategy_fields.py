"""What each field of a strategy is for: less memory, fewer or smaller words, nothing done twice.

That results stay the reference's is tests/test_strategies.py. Here a failure means that a field has
lost its purpose: the compiler merged what must stay apart, widened what must be narrow, kept what
must be freed, or copies what must only be read.
"""

import re
from collections import Counter
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of, relative_error
from tests.strategies import (
    FEW_ROWS,
    NUM_LAYERS,
    QUICKLY,
    Row,
    made,
    outcome,
    program,
    real_task,
    volumes_of,
)
from tests.tolerances import BFLOAT16_ROUNDOFF, FLOAT32_SUM, FLOAT64
from tpmlp import reference
from tpmlp.inspection.trace import Trace
from tpmlp.kernels.backprop import is_kept
from tpmlp.placement import place
from tpmlp.predict import step_collectives

# keep


@cache
def deep(keep: str) -> tpmlp.Audit:
    """Return 8 square layers whose gathered inputs are large beside all else."""
    return tpmlp.audit(program((256,) * 9, (1, 8, 1), 256, layout="column", keep=keep))


def num_gathers(keep: Any) -> int:
    placement = place((256,) * 9, mesh_of((1, 8, 1)), tpmlp.Strategy(layout="column", keep=keep))
    rows = step_collectives(placement, bias=True, batch_size=256)
    return sum(row.kind == "all_gather" for row in rows)


def test_gathered_saves_a_gather_a_layer_and_shard_the_memory():
    shard, gathered = deep("shard"), deep("gathered")
    assert num_gathers("shard") - num_gathers("gathered") == 8
    assert shard.counts["all_gather"] == num_gathers("shard")
    assert gathered.counts["all_gather"] == num_gathers("gathered")
    # Seven gathered inputs h_2 .. h_8 of 256 x 256 float32; that of x is an argument's copy.
    assert gathered.temp_bytes - shard.temp_bytes >= 6 * 256 * 256 * 4


@pytest.mark.parametrize("keep_every", [None, 8])
def test_recompute_saves_memory_and_multiplies_again(keep_every):
    widths, sizes, batch_size = (64,) * 17, (1, 4, 1), 2048
    compile_deep = partial(program, widths, sizes, batch_size, layout="column")
    shard = tpmlp.audit(compile_deep(keep="shard"))
    strategy: dict[str, Any] = {"keep": "recompute", "keep_every": keep_every}
    again = tpmlp.audit(compile_deep(**strategy))
    kept = [is_kept(l, 16, tpmlp.Strategy(**strategy)) for l in range(1, 16)]
    product_flops = 2 * batch_size * 64 * 64 // 4
    assert again.product_flops - shard.product_flops == kept.count(False) * product_flops
    # The arrays z_l that are not held at a time: all but those kept and one segment between two.
    z_bytes, period = batch_size * 64 // 4 * 4, keep_every or 4
    num_held = kept.count(True) + period - 1
    # One array more in flight either way.
    assert shard.temp_bytes - again.temp_bytes >= (15 - num_held - 1) * z_bytes


@pytest.mark.parametrize(
    ("keep_every", "kept"),
    [(None, {2, 4}), (1, {1, 2, 3, 4}), (2, {2, 4}), (3, {3}), (5, set()), (9, set())],
)
def test_every_kth_layer_of_five_is_kept(keep_every, kept):
    strategy = tpmlp.Strategy(keep="recompute", keep_every=keep_every)
    assert {l for l in range(1, 6) if is_kept(l, 5, strategy)} == kept


# Square layers, so that those of a wrong layer would fit: z_1 from x, z_3 and z_4 from z_2, ...
SQUARE = tpmlp.MLP((6,) * 7, activation="sigmoid")


@pytest.mark.parametrize(("keep_every", "overlap"), [(2, "none"), (3, "ring")])
def test_layers_computed_again_start_from_the_last_that_was_kept(keep_every, overlap):
    rng = np.random.default_rng(8)
    arrays = [(rng.normal(size=shape), rng.normal(size=shape[0])) for shape in SQUARE.layer_shapes]
    x, y = rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
    strategy = tpmlp.Strategy(keep="recompute", keep_every=keep_every, overlap=overlap)
    where = {"mesh": mesh_of((1, 2, 1)), "strategy": strategy}
    params = tpmlp.from_numpy(SQUARE, arrays, **where)
    _, grads = tpmlp.value_and_grad(SQUARE, loss="mse", **where)(params, x, y)
    _, wanted = reference.value_and_grad(arrays, x, y, activation="sigmoid", loss="mse")
    for got, want in zip(
        jax.tree.leaves(tpmlp.to_numpy(SQUARE, grads)), jax.tree.leaves(wanted), strict=True
    ):
        assert relative_error(got, want) <= FLOAT64


# compute_dtype, reduce_dtype

NARROW = (24, 16, 32, 16)


@cache
def typed(**types: Any) -> tpmlp.Audit:
    return tpmlp.audit(program(NARROW, (2, 2, 2), 24, layout="alternate", **types))


def test_gathers_of_bfloat16_move_half_of_the_bytes():
    whole, half = typed(), typed(compute_dtype="bfloat16")
    assert half.bytes_by("all_gather") * 2 == whole.bytes_by("all_gather")
    # XLA's CPU compiler would move float32: the bits of bfloat16 go as integers.
    assert {row.dtype for row in half.collectives if row.kind == "all_gather"} == {"uint16"}
    assert half.bytes_by("reduce_scatter") == whole.bytes_by("reduce_scatter")


def test_hops_of_bfloat16_move_half_of_the_bytes_and_sums_do_not():
    moved = Counter()
    for row in typed(overlap="ring", compute_dtype="bfloat16").collectives:
        if row.kind == "ppermute":
            moved[row.dtype] += int(row.total_bytes or 0)
    half, whole = typed(compute_dtype="bfloat16"), typed()
    assert moved["uint16"] == half.bytes_by("all_gather")
    assert moved["float32"] == whole.bytes_by("reduce_scatter")
    assert len(moved) == 2


def test_sums_of_bfloat16_are_hops_of_bfloat16():
    half = typed(overlap="ring", compute_dtype="bfloat16", reduce_dtype="bfloat16")
    hops = [row for row in half.collectives if row.kind == "ppermute"]
    assert {row.dtype for row in hops} == {"uint16"}


BFLOAT16 = Row(
    sizes=(2, 1, 4),
    layout="column-row",
    param_dtype="float32",
    compute_dtype="bfloat16",
)


@cache
def bfloat16_run() -> tuple[Trace, Any]:
    """Return the trace and gradients of real data in bfloat16."""
    task, where = real_task(), {"mesh": mesh_of(BFLOAT16.sizes), "strategy": BFLOAT16.strategy}
    arrays = [tuple(a.astype(np.float32) for a in layer) for layer in task.arrays]
    params = tpmlp.from_numpy(task.model, arrays, **where)
    run = tpmlp.trace(task.model, params, task.x, task.y, loss="cross_entropy", **where)
    return run, tpmlp.to_numpy(task.model, run.grads)


@pytest.mark.parametrize("l", range(1, NUM_LAYERS + 1))
@pytest.mark.parametrize("tensor", ["h", "z", "g", "dW", "db"])
def test_each_operation_in_bfloat16_errs_by_its_roundings(tensor, l):
    """Every operation again in float64, from the run's own inputs, so that errors do not add up."""
    run, grads = bfloat16_run()
    W, b = (a.astype(np.float32).astype(np.float64) for a in real_task().arrays[l - 1])

    def held(name: Any, l: int) -> np.ndarray:
        return run.logical(name, l).astype(np.float64)

    sigma, sigma_prime = reference.get_activation("sigmoid")
    h, z, g = (held(name, l) for name in "hzg")
    if tensor == "h" and l == 1:
        h = h.astype(jnp.bfloat16).astype(np.float64)
        np.testing.assert_array_equal(h, real_task().x.astype(np.float32).astype(jnp.bfloat16))
        return
    if l == 1:
        h = h.astype(jnp.bfloat16).astype(np.float64)
    # (what the run has, what it should be, magnitudes of what is rounded, roundings of each)
    if tensor == "h":
        wanted = sigma(held("z", l - 1))
        got, magnitude, roundings = h, np.abs(wanted), 1
    elif tensor == "z":
        wanted = h @ W.T + b
        # W, and z_l where it is kept; the outputs stay float32.
        got, magnitude, roundings = z, np.abs(h) @ np.abs(W).T + np.abs(b), 1 + (l < NUM_LAYERS)
    elif tensor == "dW":
        got, wanted, magnitude, roundings = grads[l - 1][0], g.T @ h, np.abs(g).T @ np.abs(h), 1
    elif tensor == "db":
        got, wanted, magnitude, roundings = grads[l - 1][1], g.sum(0), np.abs(g).sum(0), 0
    elif l == NUM_LAYERS:
        softmax = np.exp(z - z.max(1, keepdims=True))
        softmax /= softmax.sum(1, keepdims=True)
        onehot = np.eye(10)[real_task().y]
        got, wanted, magnitude, roundings = g, (softmax - onehot) / 30, (softmax + onehot) / 30, 0
    else:
        W_above = real_task().arrays[l][0].astype(np.float32).astype(np.float64)
        above, slope = held("g", l + 1), sigma_prime(z)
        got, wanted = g, above @ W_above * slope
        # W_{l+1} and g_{l+1} are rounded, sigma' is float32.
        magnitude, roundings = np.abs(above) @ np.abs(W_above) * slope, 2
    assert (np.abs(got - wanted) <= (roundings * BFLOAT16_ROUNDOFF + FLOAT32_SUM) * magnitude).all()


# overlap

HOP = re.compile(r"collective-permute(?:-start)?\(.*source_target_pairs=\{(.*?)\}\}")


def directions(layout: str, overlap: Any) -> Counter[int]:
    """Return how many hops of one layer's forward pass go how many places round x=4."""
    model, mesh = tpmlp.MLP((16, 16), bias=False), mesh_of((1, 4, 1))
    strategy = tpmlp.Strategy(layout=layout, overlap=overlap)
    params = tpmlp.from_numpy(model, [(np.zeros((16, 16)), None)], mesh, strategy=strategy)
    forward = jax.jit(lambda x: tpmlp.apply(model, params, x, mesh=mesh, strategy=strategy))
    text = forward.lower(jnp.zeros((8, 16))).compile(QUICKLY).as_text() or ""
    places = Counter()
    for pairs in HOP.findall(text):
        hops = {(int(t) - int(s)) % 4 for s, t in re.findall(r"\{?(\d+),(\d+)", pairs)}
        assert len(hops) == 1, "a hop takes all devices equally far"
        places[hops.pop()] += 1
    return places


@pytest.mark.parametrize(
    ("layout", "overlap", "hops"),
    [
        # The gather brings blocks from ahead, so they travel back: 3 places are 1 back.
        ("column", "ring", {3: 3}),
        ("column", "bidirectional_ring", {3: 2, 1: 1}),
        # Partial sums travel to the device they belong to.
        ("row", "ring", {1: 3}),
        ("row", "bidirectional_ring", {1: 2, 3: 1}),
    ],
)
def test_hops_go_one_place_round_the_ring_and_half_of_them_back_if_they_may(layout, overlap, hops):
    assert directions(layout, overlap) == hops


@pytest.mark.parametrize("layout", ["column", "row"])
def test_rings_of_bfloat16_multiply_what_the_reference_does(layout):
    """XLA's CPU compiler folds a transpose into a product that it then has no code for."""
    row = Row(
        sizes=(1, 3, 1),
        layout=layout,
        overlap="ring",
        param_dtype="float32",
        compute_dtype="bfloat16",
    )
    run = outcome(row)
    for name, wanted in run.task.expected.items():
        np.testing.assert_array_equal(run.tensors[name], wanted, err_msg=name)


# shard_weights

SPLIT = tpmlp.Strategy(shard_weights=True)
MODEL = tpmlp.MLP((17, 12, 10), activation="sigmoid")


@cache
def drawn(sizes: tuple[int, int, int]) -> tuple[Any, Any]:
    """Return the same parameters whole, and split over data."""
    mesh, key = mesh_of(sizes), jax.random.key(3)
    return MODEL.init(key, mesh), MODEL.init(key, mesh, strategy=SPLIT)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, 1)], ids=str)
def test_each_device_holds_its_share_of_split_parameters(sizes):
    num_devices = int(np.prod(sizes))
    for array, width in zip(jax.tree.leaves(drawn(sizes)[1]), (12, 12, 10, 10), strict=True):
        assert array.shape[0] == -(-width // num_devices) * num_devices
        blocks = [shard.data.nbytes for shard in array.addressable_shards]
        assert blocks == [array.nbytes // num_devices] * num_devices
        assert len({str(shard.index) for shard in array.addressable_shards}) == num_devices


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, 1)], ids=str)
def test_split_parameters_are_the_same_numbers_and_move_unchanged(sizes):
    mesh, (whole, split) = mesh_of(sizes), drawn(sizes)
    wanted = tpmlp.to_numpy(MODEL, whole)
    forms = {
        "init": split,
        "from_numpy": tpmlp.from_numpy(MODEL, wanted, mesh, strategy=SPLIT),
        "reshard to split": tpmlp.reshard(MODEL, whole, mesh, strategy=SPLIT),
        "reshard to whole": tpmlp.reshard(MODEL, split, mesh),
    }
    for name, params in forms.items():
        placed = whole if "whole" in name else split
        numbers = jax.tree.leaves(tpmlp.to_numpy(MODEL, params))
        for got, want in zip(numbers, jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=name)
        for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
            assert got.shape == want.shape, name
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim), name


# microbatches


def distance(z, y):
    return jnp.sum((z - y) ** 2)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", distance], ids=["mse", "labels", "user"])
def test_microbatches_give_the_gradient_of_the_whole_batch(loss):
    rng, mesh = np.random.default_rng(5), mesh_of((2, 2, 1))
    # 22 rows in 3 parts on 2 devices: 2 rows of padding, both in the last part.
    x, weight = rng.normal(size=(22, 17)), rng.uniform(0, 2, 22)
    y = rng.integers(0, 10, 22) if loss == "cross_entropy" else rng.normal(size=(22, 10))
    arrays = [
        (rng.normal(size=shape) / 4, rng.normal(size=shape[0])) for shape in MODEL.layer_shapes
    ]
    found = []
    for strategy in (tpmlp.Strategy(), tpmlp.Strategy(microbatches=3, shard_weights=True)):
        where = {"mesh": mesh, "strategy": strategy}
        params = tpmlp.from_numpy(MODEL, arrays, **where)
        step = tpmlp.value_and_grad(MODEL, loss=loss, **where)
        value, grads = step(params, x, y, weight)
        found.append((value, tpmlp.to_numpy(MODEL, grads)))
    for got, wanted in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0]), strict=True):
        assert relative_error(got, wanted) <= FLOAT64


def test_many_microbatches_in_bfloat16_err_no_more_than_one():
    """Added up in bfloat16, a sum of 256 would lose what is below 2^-8 of it at every step."""
    rng = np.random.default_rng(0)
    model, mesh = tpmlp.MLP((8, 16, 4)), mesh_of((1, 2, 1))
    x, y = rng.normal(size=(512, 8)).astype(jnp.bfloat16), rng.integers(0, 4, 512)
    arrays: list[Any] = [
        ((rng.normal(size=s) / s[1] ** 0.5).astype(jnp.bfloat16), np.zeros(s[0], jnp.bfloat16))
        for s in model.layer_shapes
    ]
    exact = [(W.astype(np.float64), b.astype(np.float64)) for W, b in arrays]
    _, wanted = reference.value_and_grad(
        exact, x.astype(np.float64), y, activation="relu", loss="cross_entropy"
    )
    errors = []
    for parts in (1, 256):
        strategy = tpmlp.Strategy(microbatches=parts)
        step = tpmlp.value_and_grad(model, loss="cross_entropy", mesh=mesh, strategy=strategy)
        params = tpmlp.from_numpy(model, arrays, mesh, strategy=strategy)
        grads = tpmlp.to_numpy(model, step(params, x, y)[1])
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True)
        errors.append(max(relative_error(got, right) for got, right in pairs))
    one, many = errors
    assert many <= 2 * one <= 2 * 2**-5


def test_microbatches_take_less_memory_and_sum_gradients_once():
    whole, parts = (
        tpmlp.audit(program((64,) * 5, (2, 2, 1), 2048, microbatches=n)) for n in (1, 4)
    )
    # Activations are a quarter; gradients, which are added up, are the rest.
    grads = 4 * (64 * 64 // 2 + 64) * 4
    assert parts.temp_bytes <= whole.temp_bytes / 4 + grads
    over_data = ("all_reduce", frozenset({"data"}))
    assert volumes_of(parts)[over_data] == volumes_of(whole)[over_data]
    assert parts.counts["all_reduce"] == whole.counts["all_reduce"]
    assert parts.product_flops == whole.product_flops


# The boundary of the step

OPCODE = re.compile(r" = \w+\[([\d,]+)\]\S* (copy|convert|transpose)\(")
BOUNDARY = (64, 96, 160, 32)


@pytest.mark.parametrize("fields", [{}, {"overlap": "ring"}, {"keep": "recompute"}], ids=str)
def test_whole_weights_are_only_copied_to_be_transposed(fields):
    compiled = program(BOUNDARY, (1, 8, 1), 48, layout="alternate", **fields)
    found = Counter()
    weights = {64 * 96 // 8, 96 * 160 // 8, 160 * 32 // 8}
    for dims, opcode in OPCODE.findall(compiled.as_text() or ""):
        if np.prod([int(n) for n in dims.split(",")]) in weights:
            found[opcode] += 1
    # W^T of layers 2 and 3, which the CPU multiplies faster when it is written out.
    assert found["copy"] <= 2
    assert found["transpose"] <= 2
    assert found["convert"] == 0


def test_a_step_with_placed_arrays_moves_nothing_to_or_from_the_host():
    _, step, params, batch = made(Row(sizes=(2, 1, 1), layout="column", shard_weights=True))
    loss, _ = step(params, **batch)
    with jax.transfer_guard("disallow"):  # Raises where anything is moved.
        again, _ = jax.block_until_ready(step(params, **batch))
    assert again == loss


def num_products(function: Any, *args: Any) -> int:
    products = tpmlp.audit(jax.jit(function).lower(*args).compile(QUICKLY)).products
    return sum(row.count or 0 for row in products)


def test_dx_of_the_first_layer_is_computed_only_when_it_is_asked_for():
    model, mesh = tpmlp.MLP((16, 32, 64, 8)), mesh_of((1, 2, 1))
    zeros = [(np.zeros(shape), np.zeros(shape[0])) for shape in model.layer_shapes]
    params, x, y = tpmlp.from_numpy(model, zeros, mesh), jnp.ones((8, 16)), jnp.ones((8, 8))

    def loss(params, x):
        return jnp.sum(tpmlp.apply(model, params, x, mesh=mesh) ** 2)

    # z_l and dW_l of three layers, dh of two or, with dx, of three.
    step = tpmlp.value_and_grad(model, loss="mse", mesh=mesh)
    assert num_products(lambda p, x: step(p, x, y), params, x) == 3 + 3 + 2
    assert num_products(jax.grad(loss), params, x) == 3 + 3 + 2
    assert num_products(jax.grad(loss, argnums=(0, 1)), params, x) == 3 + 3 + 3


# apply and trace


@pytest.mark.parametrize("row", FEW_ROWS[::2], ids=str)
def test_apply_and_its_derivative_are_the_reference(row):
    task, _, params, _ = made(row)
    x = np.asarray(task.x, row.param_dtype)
    where = {"mesh": mesh_of(row.sizes), "strategy": row.strategy}
    v = (task.y if not row.is_real else np.ones((30, 10))).astype(row.param_dtype)

    def f(params, x):
        outputs = tpmlp.apply(task.model, params, x, **where)
        return jnp.sum(outputs * v), outputs

    run = jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True), compiler_options=QUICKLY)
    (grads, dx), outputs = run(params, x)
    t = reference.trace(
        task.arrays, task.x, activation=task.model.activation, cotangent=np.asarray(v, np.float64)
    )
    got = [outputs, dx, *jax.tree.leaves(tpmlp.to_numpy(task.model, grads))]
    wanted = [t.z[NUM_LAYERS], t.g[1] @ task.arrays[0][0]]
    wanted += [a for l in t.dW for a in (t.dW[l], t.db[l])]
    for a, b in zip(got, wanted, strict=True):
        if row.is_real:
            assert relative_error(a, b) <= FLOAT64
        else:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("row", [row for row in FEW_ROWS if row.is_real], ids=str)
def test_a_trace_is_the_reference(row):
    task, _, params, _ = made(row)
    where = {"mesh": mesh_of(row.sizes), "strategy": row.strategy}
    x, y, weight = task.samples
    run = tpmlp.trace(task.model, params, x, y, weight=weight, loss=task.loss, **where)
    wanted = reference.trace(
        task.arrays, x, y, weight=weight, activation="sigmoid", loss="cross_entropy"
    )
    assert relative_error(run.loss, wanted.loss) <= FLOAT64
    for name in ("h", "z", "sigma_prime", "g"):
        for l, array in getattr(wanted, name).items():
            assert relative_error(run.logical(name, l), array) <= FLOAT64, f"{name}_{l}"
