"""Gradients of single samples, sharded, equal those of an unsharded vmap(grad).

The oracle is a plain jax.numpy MLP in float64 that shares no code with the package. A failure of
the norms alone means that they are not those of the gradients (a bias forgotten, a copy counted
twice, a sample weighted); of the sum alone, that the factors reach the wrong place.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests import cases
from tests.cases import (
    FEW_PLACEMENTS,
    ONE_LAYOUT,
    Problem,
    Sizes,
    mesh_of,
    name_of,
    padding,
    relative_error,
    strategy_of,
)
from tests.strategies import FEW_ROWS, QUICKLY, integer_task
from tests.test_invariant import ONE, assert_same_bits, bits
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.losses import Cotangent

Array = np.ndarray
Placement = tuple[Sizes, str]

CLASSES = Problem(widths=(17, 12, 10))
UNBIASED = replace(CLASSES, bias=False)
DEEPER = Problem()
VALUES = replace(CLASSES, activation="relu", loss=Cotangent())
INTEGERS = replace(VALUES, integers=True)

PLAIN_LOSSES = {
    "cross_entropy": lambda z, y: -jax.nn.log_softmax(z)[y],
    Cotangent(): lambda z, v: z @ v,
}


def arrays(problem: Problem) -> Any:
    """Return weights and biases in float64: integers run the same program as real numbers."""
    return jax.tree.map(lambda array: array.astype(np.float64), cases.arrays(problem))


def samples(problem: Problem) -> tuple[Array, Array]:
    x, y, _ = cases.samples(problem)
    return np.asarray(x, np.float64), np.round(y) if problem.integers else y


@cache
def vmapped(problem: Problem) -> tuple[Array, Array]:
    """Return each sample's loss [B] and gradient [B, P], on one device."""
    sigma = getattr(jax.nn, problem.activation)

    def loss(layers: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        z = x
        for l, (W, b) in enumerate(layers):
            h = sigma(z) if l else x
            z = W @ h if b is None else W @ h + b
        return PLAIN_LOSSES[problem.loss](z, y)

    of_samples = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))
    run = jax.jit(of_samples, compiler_options=QUICKLY)
    losses, grads = run(jax.tree.map(jnp.asarray, arrays(problem)), *samples(problem))
    return np.asarray(losses), joined(grads, num_samples=len(losses))


def joined(layers: Any, num_samples: int = 1) -> Array:
    """Return gradients as one row for each sample."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(layers)]
    return np.concatenate([leaf.reshape(num_samples, -1) for leaf in leaves], axis=1)


def norms_of(grads: Array) -> Array:
    return np.sqrt(np.square(grads).sum(axis=1))


@cache
def program(model: tpmlp.MLP, loss: Any, sizes: Sizes, strategy: tpmlp.Strategy) -> Any:
    """Return clipped_gradient_sum in a user's program: (params, x, y, max_norm) -> ClippedSum."""

    def run(params: Any, x: Any, y: Any, max_norm: Any) -> tpmlp.ClippedSum:
        where = {"mesh": mesh_of(sizes), "strategy": strategy}
        return tpmlp.clipped_gradient_sum(
            model, params, x, y, loss=loss, max_norm=max_norm, **where
        )

    return jax.jit(run, compiler_options=QUICKLY)


def placed(problem: Problem, sizes: Sizes, strategy: tpmlp.Strategy) -> Any:
    return tpmlp.from_numpy(problem.model, arrays(problem), mesh_of(sizes), strategy=strategy)


def clipped(
    problem: Problem, max_norm: float, sizes: Sizes, strategy: tpmlp.Strategy
) -> tpmlp.ClippedSum:
    run = program(problem.model, problem.loss, sizes, strategy)
    return run(placed(problem, sizes, strategy), *samples(problem), max_norm)


def assert_clipped_at_the_median(
    problem: Problem, sizes: Sizes, strategy: tpmlp.Strategy
) -> tpmlp.ClippedSum:
    """Compare with sum_i min(1, max_norm / |grad_i|) grad_i, half of the factors below 1."""
    losses, grads = vmapped(problem)
    norms = norms_of(grads)
    max_norm = float(np.median(norms))
    run = clipped(problem, max_norm, sizes, strategy)
    assert relative_error(run.losses, losses) <= FLOAT64
    assert relative_error(run.norms, norms) <= FLOAT64
    factors = np.minimum(1, max_norm / norms)
    total = joined(tpmlp.to_numpy(problem.model, run.grads))[0]
    assert relative_error(total, factors @ grads) <= FLOAT64
    return run


def assert_equal_bits(got: Any, wanted: Array) -> None:
    assert np.asarray(got).tolist() == wanted.astype(np.asarray(got).dtype).tolist()


@pytest.mark.parametrize("placement", ONE_LAYOUT, ids=name_of)
def test_norms_losses_and_the_clipped_sum_equal_vmap_of_grad(placement):
    run = assert_clipped_at_the_median(VALUES, placement[0], strategy_of(placement[1], 2))
    for layer, shape in zip(run.grads, VALUES.model.layer_shapes, strict=True):
        for array in map(np.asarray, layer):
            assert not padding(array, shape[: array.ndim]).any()


@pytest.mark.parametrize("placement", ONE_LAYOUT, ids=name_of)
def test_norms_losses_and_the_sum_of_integers_equal_vmap_of_grad_bit_for_bit(placement):
    run = clipped(INTEGERS, np.inf, placement[0], strategy_of(placement[1], 2))
    losses, grads = vmapped(INTEGERS)
    assert_equal_bits(run.losses, losses)
    assert_equal_bits(run.norms, norms_of(grads))
    assert_equal_bits(joined(tpmlp.to_numpy(INTEGERS.model, run.grads))[0], grads.sum(axis=0))


@pytest.mark.parametrize(
    ("placement", "problem"),
    list(zip(FEW_PLACEMENTS, (CLASSES, UNBIASED, CLASSES), strict=True)),
    ids=["1x3x1", "4x2x1", "2x2x2"],
)
def test_norms_alone_equal_vmap_of_grad(placement, problem):
    where = {"mesh": mesh_of(placement[0]), "strategy": strategy_of(placement[1], 2)}
    params = tpmlp.from_numpy(problem.model, arrays(problem), **where)
    norms = tpmlp.per_example_gradient_norms(
        problem.model, params, *samples(problem), loss=problem.loss, **where
    )
    assert relative_error(norms, norms_of(vmapped(problem)[1])) <= FLOAT64


@cache
def of_integer_task() -> Array:
    """Return each sample's gradient [B, P] of tests.strategies' integers, by the reference."""
    task = integer_task()
    t = reference.trace(task.arrays, task.x, task.y, activation="relu", loss=reference.cotangent())
    layers = [(np.einsum("bo,bi->boi", t.g[l], t.h[l]), t.g[l]) for l in t.g]
    return joined(layers, num_samples=len(task.x))


@pytest.mark.parametrize("row", FEW_ROWS, ids=str)
def test_every_strategy_gives_the_gradients_of_samples(row):
    if row.is_real:
        assert_clipped_at_the_median(DEEPER, row.sizes, row.strategy)
        return
    task, where = integer_task(), {"mesh": mesh_of(row.sizes), "strategy": row.strategy}
    numbers = [(W.astype(row.param_dtype), b.astype(row.param_dtype)) for W, b in task.arrays]
    params = tpmlp.from_numpy(task.model, numbers, **where)
    run = program(task.model, Cotangent(), row.sizes, row.strategy)(params, task.x, task.y, np.inf)
    assert_equal_bits(run.norms, norms_of(of_integer_task()))
    total = joined(tpmlp.to_numpy(task.model, run.grads))[0]
    assert_equal_bits(total, of_integer_task().sum(axis=0))


@cache
def invariant_bits(sizes: Sizes) -> dict[str, str]:
    """Return hashes of all that this file is about, in float32 with reduction="invariant"."""
    strategy = tpmlp.Strategy(reduction="invariant", layout="alternate")
    where = {"mesh": mesh_of(sizes), "strategy": strategy}
    model, call = CLASSES.model, {"loss": CLASSES.loss, **where}

    def run(*arrays: Any) -> tuple[tpmlp.ClippedSum, Any, tpmlp.NoiseScale]:
        clipped = tpmlp.clipped_gradient_sum(model, *arrays, max_norm=2.0, **call)
        norms = tpmlp.per_example_gradient_norms(model, *arrays, **call)
        return clipped, norms, tpmlp.gradient_noise_scale(model, *arrays, **call)

    params = model.init(jax.random.key(0), **where)
    clipped, norms, noise_scale = jax.jit(run)(params, *samples(CLASSES))
    # Some are clipped, and some are not.
    assert np.min(norms) < 2 < np.max(norms)
    return {
        "losses": bits(clipped.losses),
        "norms": bits(clipped.norms, norms),
        "grads": bits(tpmlp.to_numpy(model, clipped.grads)),
        "noise scale": bits(noise_scale),
    }


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=name_of)
def test_gradients_of_samples_have_the_same_bits_on_every_mesh(sizes):
    assert_same_bits(invariant_bits(sizes), invariant_bits(ONE))


def test_gradients_of_samples_added_in_trees_equal_vmap_of_grad():
    assert_clipped_at_the_median(CLASSES, (2, 2, 2), tpmlp.Strategy(reduction="invariant"))


@cache
def weighted() -> tuple[Any, dict[str, Any], Array]:
    """Return parameters, keywords, and weights of which every seventh is 0."""
    where = {"mesh": mesh_of((4, 2, 1)), "strategy": tpmlp.Strategy()}
    params = tpmlp.from_numpy(CLASSES.model, arrays(CLASSES), **where)
    weight = np.random.default_rng(2).uniform(0.1, 3, 30)
    weight[::7] = 0
    return params, {"loss": CLASSES.loss, **where}, weight


def test_a_weight_of_zero_leaves_a_sample_out_and_others_play_no_part():
    params, call, weight = weighted()
    x, y = samples(CLASSES)
    norms = norms_of(vmapped(CLASSES)[1])
    got = tpmlp.per_example_gradient_norms(CLASSES.model, params, x, y, weight, **call)
    assert relative_error(got, np.where(weight > 0, norms, 0)) <= FLOAT64


def test_samples_that_pad_a_placed_batch_add_nothing():
    params, call, weight = weighted()
    batch = tpmlp.shard_batch(CLASSES.model, *samples(CLASSES), weight=weight, **call)
    run = tpmlp.clipped_gradient_sum(CLASSES.model, params, *batch, max_norm=np.inf, **call)
    grads = vmapped(CLASSES)[1]
    assert run.norms.shape == (32,)
    assert np.asarray(run.norms)[30:].tolist() == [0, 0]
    total = joined(tpmlp.to_numpy(CLASSES.model, run.grads))[0]
    assert relative_error(total, grads[weight > 0].sum(axis=0)) <= FLOAT64


def test_a_gradient_of_zero_is_not_clipped_to_nan():
    model, mesh = tpmlp.MLP((3, 2), bias=False), mesh_of((2, 2, 1))
    params = tpmlp.from_numpy(model, [(np.ones((2, 3)), None)], mesh)
    x = np.array([[0.0, 0, 0], [3, 0, 4]])
    run = tpmlp.clipped_gradient_sum(model, params, x, loss="output", mesh=mesh, max_norm=5**0.5)
    assert np.asarray(run.norms).tolist() == [0, 50**0.5]
    wanted = np.array([[3, 0, 4], [3, 0, 4]]) / 10**0.5
    assert relative_error(tpmlp.to_numpy(model, run.grads)[0][0], wanted) <= FLOAT64


def test_in_bfloat16_a_clipped_gradient_is_no_longer_than_the_bound_but_for_rounding():
    where = {"mesh": mesh_of((1, 2, 2)), "strategy": tpmlp.Strategy(compute_dtype="bfloat16")}
    numbers = jax.tree.map(np.float32, arrays(CLASSES))
    params = tpmlp.from_numpy(CLASSES.model, numbers, **where)
    x, y = samples(CLASSES)
    for row in range(3):
        run = tpmlp.clipped_gradient_sum(
            CLASSES.model, params, x[[row]], y[[row]], loss=CLASSES.loss, max_norm=0.1, **where
        )
        norm = tpmlp.global_norm(CLASSES.model, run.grads, **where)
        assert relative_error(norm, 0.1) <= 2**-8


def test_another_bound_compiles_nothing():
    params, call, _ = weighted()
    x, y = samples(CLASSES)
    compiled = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        compiled.append(event)

    def clip(max_norm: float) -> float:
        run = tpmlp.clipped_gradient_sum(CLASSES.model, params, x, y, max_norm=max_norm, **call)
        return float(np.abs(run.grads[0][0]).max())

    first = clip(0.5)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        second = clip(1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert second > first
    assert not [event for event in compiled if "compile" in event]


def noise_scale(x: Array, y: Array) -> tpmlp.NoiseScale:
    mesh = mesh_of((2, 1, 3))
    params = tpmlp.from_numpy(CLASSES.model, arrays(CLASSES), mesh)
    return tpmlp.gradient_noise_scale(CLASSES.model, params, x, y, loss=CLASSES.loss, mesh=mesh)


def test_trace_and_norm_of_the_noise_scale_are_unbiased():
    """Over all pairs that can be drawn from three samples their means are those of the three."""
    x, y = samples(CLASSES)
    pairs = [[i, j] for i in range(3) for j in range(3)]
    estimates = [noise_scale(x[pair], y[pair]) for pair in pairs]
    grads = vmapped(CLASSES)[1][:3]
    traces = [float(estimate.covariance_trace) for estimate in estimates]
    squares = [float(estimate.squared_norm) for estimate in estimates]
    assert relative_error(np.mean(traces), grads.var(axis=0).sum()) <= FLOAT64
    assert relative_error(np.mean(squares), np.square(grads.mean(axis=0)).sum()) <= FLOAT64


def test_the_noise_scale_is_the_ratio_with_padding_left_out():
    x, y = samples(CLASSES)
    grads = vmapped(CLASSES)[1][:29]
    run = noise_scale(x[:29], y[:29])
    trace = grads.var(axis=0, ddof=1).sum()
    square = np.square(grads.mean(axis=0)).sum() - trace / 29
    assert relative_error(np.array(run), np.array([trace / square, trace, square])) <= FLOAT64


# 16 samples and widths of 8, on meshes that divide both.
EIGHTS = tpmlp.MLP((8, 8, 8, 8))


def audited(function: Any, sizes: Sizes, **more: Any) -> tpmlp.Audit:
    """Return the audit of a public function of (model, params, x, y)."""
    call = {"loss": "mse", "mesh": mesh_of(sizes), **more}
    params = EIGHTS.init(jax.random.key(0), call["mesh"], strategy=call.get("strategy"))

    def run(params: Any, x: Any, y: Any) -> Any:
        return function(EIGHTS, params, x, y, **call)

    lowered = jax.jit(run).lower(params, *np.ones((2, 16, 8), np.float32))
    return tpmlp.audit(lowered.compile(QUICKLY))


def test_norms_alone_leave_out_the_products_of_gradients():
    audit = audited(tpmlp.per_example_gradient_norms, (1, 1, 1))
    assert audit.product_flops == (3 + 2) * 2 * 16 * 8 * 8


def test_a_clipped_sum_multiplies_as_often_as_a_step():
    audit = audited(tpmlp.clipped_gradient_sum, (1, 1, 1), max_norm=1.0)
    assert audit.product_flops == (3 + 2 + 3) * 2 * 16 * 8 * 8


def test_the_sums_of_all_layers_cross_the_tensor_axes_in_one_all_reduce():
    strategy = tpmlp.Strategy(layout="alternate")
    audit = audited(tpmlp.per_example_gradient_norms, (1, 2, 2), strategy=strategy)
    (row,) = [row for row in audit.collectives if row.kind == "all_reduce"]
    words = 2 * 3 * 16
    assert (set(row.axes), row.count) == ({"x", "y"}, 1)
    assert row.bytes == 2 * words * 4 * 3 / 4
    assert audit.counts["all_gather"] == audit.counts["reduce_scatter"] == 3 + 2
