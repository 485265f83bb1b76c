"""Batches: checked, padded with rows of weight 0, and placed where the step reads them.

A failure of shapes or shardings: a step would place every batch again, or the kernel would read
other features than it thinks. A failure of what is taken without a check: a copy at every step.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import (
    FEW_PLACEMENTS,
    Problem,
    arrays,
    mesh_of,
    name_of,
    relative_error,
    strategy_of,
)
from tests.tolerances import FLOAT64
from tpmlp.batch import fill
from tpmlp.layout import padded

PROBLEM = Problem(widths=(17, 12, 10))
MODEL = PROBLEM.model
RNG = np.random.default_rng(0)
X, LABELS, VALUES = RNG.normal(size=(30, 17)), RNG.integers(0, 10, 30), RNG.normal(size=(30, 10))


def test_a_batch_is_padded_with_rows_of_weight_zero(mesh):
    batch = tpmlp.shard_batch(MODEL, X, LABELS, mesh=mesh)
    M = mesh.shape["x"] * mesh.shape["y"]
    rows = padded(30, mesh.shape["data"])
    assert batch.x.shape == (rows, padded(17, M))
    assert batch.y.shape == batch.weight.shape == (rows,)
    np.testing.assert_array_equal(np.asarray(batch.x)[:30, :17], X)
    np.testing.assert_array_equal(np.asarray(batch.y)[:30], LABELS)
    np.testing.assert_array_equal(batch.weight, np.arange(rows) < 30)
    assert not np.asarray(batch.x)[:, 17:].any()


def test_values_are_padded_like_the_outputs(mesh):
    batch = tpmlp.shard_batch(MODEL, X, VALUES, mesh=mesh)
    whole = padded(10, mesh.shape["x"] * mesh.shape["y"])
    assert batch.y.shape == (padded(30, mesh.shape["data"]), whole)
    np.testing.assert_array_equal(np.asarray(batch.y)[:30, :10], VALUES)
    assert not np.asarray(batch.y)[:, 10:].any()


def test_each_device_holds_its_share_of_the_samples(mesh):
    batch = tpmlp.shard_batch(MODEL, X, VALUES, mesh=mesh)
    for array in (batch.x, batch.y):
        assert {s.data.size for s in array.addressable_shards} == {array.size // mesh.size}


def test_given_weights_stay_and_padding_weighs_nothing():
    batch = tpmlp.shard_batch(MODEL, X, LABELS, mesh=mesh_of((4, 2, 1)), weight=np.arange(30))
    np.testing.assert_array_equal(batch.weight, [*range(30), 0, 0])


@cache
def step_on(placement):
    mesh, strategy = mesh_of(placement[0]), strategy_of(placement[1], 2)
    params = tpmlp.from_numpy(MODEL, arrays(PROBLEM), mesh, strategy=strategy)
    step = tpmlp.value_and_grad(MODEL, loss="cross_entropy", mesh=mesh, strategy=strategy)
    return step, params, {"mesh": mesh, "strategy": strategy}


@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
def test_a_step_takes_a_placed_batch_without_a_transfer(placement):
    step, params, where = step_on(placement)
    batch = tpmlp.shard_batch(MODEL, X, LABELS, **where)
    step(params, *batch)
    with jax.transfer_guard("disallow_explicit"):
        loss, _ = step(params, *batch)
        with pytest.raises(jax.errors.JaxRuntimeError, match="transfer"):  # The guard works.
            step(params, X, LABELS)
    assert np.isfinite(float(loss))


@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
@pytest.mark.parametrize("given", ["numpy", "lists", "jax", "float32", "integer y"])
def test_raw_samples_and_a_placed_batch_give_the_same(placement, given):
    step, params, where = step_on(placement)
    x = np.round(X, 1).astype(np.float32).astype(np.float64)
    forms = {
        "numpy": (x, LABELS),
        "lists": (x.tolist(), LABELS.tolist()),
        "jax": (jax.numpy.asarray(x), jax.numpy.asarray(LABELS)),
        "float32": (x.astype(np.float32), LABELS),
        "integer y": (x, LABELS.astype(np.uint8)),
    }
    loss, grads = step(params, *forms[given])
    placed_loss, placed = step(params, *tpmlp.shard_batch(MODEL, x, LABELS, **where))
    assert relative_error(loss, placed_loss) <= FLOAT64
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(placed), strict=True):
        assert relative_error(a, b) <= FLOAT64


def test_integer_samples_mean_the_same_as_floats():
    step, params, _ = step_on(FEW_PLACEMENTS[0])
    x = RNG.integers(0, 16, (30, 17))
    assert float(step(params, x, LABELS)[0]) == float(step(params, x.astype(float), LABELS)[0])


def test_one_sample_fills_a_mesh_of_eight_data_shards():
    step, params, _ = step_on(((8, 1, 1), "column"))
    alone, params_alone, _ = step_on(((1, 1, 1), "column"))
    got, wanted = step(params, X[:1], LABELS[:1]), alone(params_alone, X[:1], LABELS[:1])
    assert relative_error(got[0], wanted[0]) <= FLOAT64


@pytest.mark.parametrize(
    ("y", "loss", "shape"),
    [
        (LABELS, None, (30,)),
        (VALUES, None, (30, 10)),
        (None, None, None),
        (VALUES[:, :3], lambda z, y: z[0] * y[0], (30, 3)),
    ],
)
def test_the_kind_of_targets_follows_from_y_or_the_loss(y, loss, shape):
    batch = tpmlp.shard_batch(MODEL, X, y, mesh=mesh_of((2, 1, 1)), loss=loss)
    assert (batch.y if batch.y is None else batch.y.shape) == shape


def test_one_output_takes_targets_without_a_second_dim():
    mlp = tpmlp.MLP((17, 1))
    batch = tpmlp.shard_batch(mlp, X, np.arange(30), mesh=mesh_of((1, 2, 1)))
    assert batch.y.shape == (30, 2)


@pytest.mark.parametrize("library", [np, jnp])
def test_fill_copies_the_last_row_and_adds_features_of_zero(library):
    filled = fill(library.asarray([[1.0, 2.0], [3.0, 4.0]]), (4, 3), library)
    assert filled.tolist() == [[1, 2, 0], [3, 4, 0], [3, 4, 0], [3, 4, 0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, jnp.bfloat16])
def test_targets_and_weights_keep_their_precision_whatever_x_has(dtype):
    mesh, model = tpmlp.make_mesh(x=2), tpmlp.MLP((3, 1))
    params = tpmlp.from_numpy(model, [(np.zeros((1, 3)), np.zeros(1))], mesh)
    step = tpmlp.value_and_grad(model, loss="mse", mesh=mesh)
    x, weight = np.ones((4, 3)).astype(dtype), np.array([1.0, 1e-8, 1e-8, 1e-8])
    loss, _ = step(params, x, np.array([[0.1], [1e5], [1e5], [1e5]]), weight)
    wanted = (0.01 + 3e2) / (1 + 3e-8)
    assert abs(float(loss) - wanted) <= FLOAT64 * wanted
