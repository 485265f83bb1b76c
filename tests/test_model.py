"""The model's parameters: drawn, moved and seen the same whatever the mesh.

A failure of init: runs on different meshes start from different models. Of a round trip or of
reshard: a checkpoint or a change of mesh alters the model. Of padding: what does not exist takes
part in the next step.
"""

from functools import cache
from itertools import permutations, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import (
    FEW_PLACEMENTS,
    ONE_LAYOUT,
    PLACEMENTS,
    mesh_of,
    name_of,
    padding,
    strategy_of,
)

# One layer: layers are drawn and moved one by one, and what is compiled is half as much.
MODEL = tpmlp.MLP((17, 10))
NUMBERS = [(np.random.default_rng(0).normal(size=(10, 17)), np.linspace(-1, 1, 10))]
DEEP = tpmlp.MLP((17, 12, 10))


def leaves(layers):
    return [array for layer in layers for array in layer if array is not None]


def assert_padding_is_zero(params):
    for array, shape in zip(leaves(params), [(10, 17), (10,)], strict=True):
        assert not padding(np.asarray(array), shape).any()


@cache
def drawn_on_one_device(mlp, dtype):
    return tpmlp.to_numpy(mlp, mlp.init(jax.random.key(7), mesh_of((1, 1, 1)), dtype=dtype))


def assert_draws_the_same_bits(mlp, placement, dtype):
    mesh, strategy = mesh_of(placement[0]), strategy_of(placement[1], mlp.num_layers)
    params = mlp.init(jax.random.key(7), mesh, strategy=strategy, dtype=dtype)
    drawn = leaves(tpmlp.to_numpy(mlp, params))
    wanted = leaves(drawn_on_one_device(mlp, dtype))
    for whole, got, alone in zip(leaves(params), drawn, wanted, strict=True):
        assert got.dtype == dtype
        assert got.tobytes() == alone.tobytes()
        assert not padding(np.asarray(whole), alone.shape).any()


@pytest.mark.parametrize("placement", ONE_LAYOUT, ids=name_of)
def test_init_draws_the_same_bits_on_every_mesh(placement):
    assert_draws_the_same_bits(MODEL, placement, "float32")


@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
def test_init_of_two_layers_draws_the_same_bits_in_float64(placement):
    assert_draws_the_same_bits(DEEP, placement, "float64")


@pytest.mark.parametrize(
    ("activation", "factors"),
    [
        ("relu", ("he", "glorot")),
        ("gelu", ("he", "glorot")),
        ("silu", ("he", "glorot")),
        ("softplus", ("he", "glorot")),
        ("tanh", ("glorot", "glorot")),
        ("sigmoid", ("glorot", "glorot")),
        ("identity", ("glorot", "glorot")),
    ],
)
def test_init_fills_the_interval_of_he_or_glorot(activation, factors):
    mlp = tpmlp.MLP((300, 200, 100), activation=activation)
    (W_1, b_1), (W_2, b_2) = mlp.init(jax.random.key(0), mesh_of((1, 1, 1)), dtype="float64")
    limits = {"he": (6 / 300, 6 / 200), "glorot": (6 / 500, 6 / 300)}
    for i, W in enumerate((W_1, W_2)):
        limit = limits[factors[i]][i] ** 0.5
        W = np.asarray(W)[: mlp.widths[i + 1], : mlp.widths[i]]
        # 20,000 uniform numbers come within 0.1 % of the ends with probability 1 - 2e-9, and
        # their mean is 0 within 5 / sqrt(3 * 20,000) limits.
        assert 0.999 * limit < np.abs(W).max() <= limit
        assert abs(W.mean()) < 0.021 * limit
    assert not np.asarray(b_1).any()
    assert not np.asarray(b_2).any()


def test_keys_and_layers_draw_different_numbers():
    mlp, mesh = tpmlp.MLP((8, 8, 8)), mesh_of((1, 1, 1))
    draws = [np.asarray(W) for seed in (0, 1) for W, _ in mlp.init(jax.random.key(seed), mesh)]
    assert all((a != b).any() for a, b in permutations(draws, 2))


@pytest.mark.parametrize("placement", PLACEMENTS, ids=name_of)
def test_from_numpy_and_to_numpy_are_inverse(placement):
    mesh, strategy = mesh_of(placement[0]), strategy_of(placement[1], 1)
    params = tpmlp.from_numpy(MODEL, NUMBERS, mesh, strategy=strategy)
    assert_padding_is_zero(params)
    for got, wanted in zip(leaves(tpmlp.to_numpy(MODEL, params)), leaves(NUMBERS), strict=True):
        np.testing.assert_array_equal(got, wanted, strict=True)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=name_of)
def test_each_device_holds_one_share_of_every_parameter(placement):
    (_, x, y), layout = placement
    mesh, strategy = mesh_of(placement[0]), strategy_of(layout, 1)
    for array in leaves(tpmlp.from_numpy(MODEL, NUMBERS, mesh, strategy=strategy)):
        assert {s.data.size for s in array.addressable_shards} == {array.size // (x * y)}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_from_numpy_keeps_the_dtype(dtype):
    numbers = [(W.astype(dtype), b.astype(dtype)) for W, b in NUMBERS]
    params = tpmlp.from_numpy(MODEL, numbers, mesh_of((1, 3, 1)))
    assert {array.dtype for array in leaves(params)} == {np.dtype(dtype)}


RESHARD = [
    ((1, 1, 1), "column"),
    ((1, 5, 1), "row"),
    ((1, 8, 1), "column"),
    ((1, 1, 7), "row-column"),
    ((1, 2, 1), "row"),
    ((2, 2, 2), "row-column"),
    ((1, 3, 2), "column-row"),
    ((4, 2, 1), "column"),
]


def assert_same_numbers(params):
    assert_padding_is_zero(params)
    for got, wanted in zip(leaves(tpmlp.to_numpy(MODEL, params)), leaves(NUMBERS), strict=True):
        assert got.tobytes() == wanted.tobytes()


def assert_placed_as(params, placement):
    mesh, strategy = mesh_of(placement[0]), strategy_of(placement[1], 1)
    placed = tpmlp.from_numpy(MODEL, NUMBERS, mesh, strategy=strategy)
    for got, wanted in zip(leaves(params), leaves(placed), strict=True):
        assert got.shape == wanted.shape
        assert got.sharding == wanted.sharding


@pytest.mark.parametrize(
    ("start", "end"), [p for p in product(RESHARD, RESHARD) if p[0] != p[1]], ids=name_of
)
def test_reshard_moves_every_bit_between_any_two_meshes(start, end):
    mesh, strategy = mesh_of(start[0]), strategy_of(start[1], 1)
    params = tpmlp.from_numpy(MODEL, NUMBERS, mesh, strategy=strategy)
    moved = tpmlp.reshard(MODEL, params, mesh_of(end[0]), strategy=strategy_of(end[1], 1))
    assert_same_numbers(moved)
    assert_placed_as(moved, end)


def test_reshard_from_5_to_8_to_7_to_1_devices_changes_no_bit():
    params = tpmlp.from_numpy(MODEL, NUMBERS, mesh_of((1, 5, 1)))
    for sizes in ((1, 8, 1), (1, 1, 7), (1, 1, 1)):
        params = tpmlp.reshard(MODEL, params, mesh_of(sizes))
    assert_same_numbers(params)


def test_reshard_without_padding_changes_no_bit():
    mlp = tpmlp.MLP((16, 8, 24), bias=False)
    params = mlp.init(jax.random.key(0), mesh_of((1, 8, 1)))
    moved = tpmlp.reshard(mlp, params, mesh_of((1, 2, 2)))
    for a, b in zip(leaves(params), leaves(moved), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert a.sharding != b.sharding


@pytest.mark.parametrize(
    ("widths", "bias", "num_parameters"),
    [((3, 2), True, 8), ((3, 2), False, 6), ((64, 256, 10), True, 19210)],
)
def test_parameters_are_counted_without_padding(widths, bias, num_parameters):
    mlp = tpmlp.MLP(widths, bias=bias)
    assert (mlp.num_layers, mlp.num_parameters) == (len(widths) - 1, num_parameters)


def test_models_of_the_same_description_are_equal_and_hash_alike():
    as_list: Any = [3, np.int64(2)]
    assert tpmlp.MLP((3, 2), "tanh") == tpmlp.MLP(as_list, activation="tanh")
    assert hash(tpmlp.MLP((3, 2))) == hash(tpmlp.MLP(as_list))


def test_reshard_on_the_same_devices_goes_through_no_host():
    model, mesh = tpmlp.MLP((16, 16)), tpmlp.make_mesh(x=8)
    params = model.init(jax.random.key(0), mesh, strategy=tpmlp.Strategy(layout="column"))
    row = tpmlp.Strategy(layout="row")
    compiled = tpmlp.reshard(model, params, mesh, strategy=row)
    with jax.transfer_guard("disallow_explicit"):
        moved = tpmlp.reshard(model, params, mesh, strategy=row)
    assert jax.tree.map(lambda a: a.sharding, moved) == jax.tree.map(lambda a: a.sharding, compiled)
    np.testing.assert_array_equal(moved[0][0], params[0][0])
