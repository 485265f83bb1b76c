"""The hash of parameters: a failure here means that it says where they are, not what they are."""

import hashlib
from functools import cache
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import FEW_PLACEMENTS, ONE_LAYOUT, mesh_of, name_of, strategy_of
from tpmlp.exchange.fingerprint import hash_arrays

MODEL = tpmlp.MLP((17, 12, 10))
RNG = np.random.default_rng(0)
ARRAYS = [
    (RNG.normal(size=shape).astype(np.float32), RNG.normal(size=shape[0]).astype(np.float32))
    for shape in MODEL.layer_shapes
]


def defined(arrays: Any) -> str:
    """Return the hash as its docstring defines it, built another way."""
    text = b""
    for array in (a for layer in arrays for a in layer if a is not None):
        numbers = np.asarray(array).reshape(-1).tolist()
        shape = ", ".join(map(str, np.shape(array)))
        text += f"float32 [{shape}]\n".encode() + np.array(numbers, "<f4").tobytes()
    return hashlib.sha256(text).hexdigest()


@cache
def wanted() -> str:
    return defined(ARRAYS)


@pytest.mark.parametrize("placement", [*ONE_LAYOUT, *FEW_PLACEMENTS], ids=name_of)
def test_the_hash_is_its_definition_on_every_mesh(placement: Any) -> None:
    mesh, strategy = mesh_of(placement[0]), strategy_of(placement[1], 2)
    params = tpmlp.from_numpy(MODEL, ARRAYS, mesh, strategy=strategy)
    assert tpmlp.parameter_hash(MODEL, params) == wanted()


def test_the_hash_is_that_of_weights_split_over_data() -> None:
    split = tpmlp.Strategy(shard_weights=True)
    params = tpmlp.from_numpy(MODEL, ARRAYS, mesh_of((2, 2, 2)), strategy=split)
    assert tpmlp.parameter_hash(MODEL, params) == wanted()


def test_a_model_without_bias_is_hashed_without() -> None:
    weights: Any = [(W, None) for W, _ in ARRAYS]
    assert hash_arrays(weights) == defined(weights)


@pytest.mark.parametrize(("l", "which"), list(product((0, 1), (0, 1))))
def test_the_last_bit_of_any_tensor_changes_the_hash(l: int, which: int) -> None:
    arrays = [[np.array(a) for a in layer] for layer in ARRAYS]
    arrays[l][which].reshape(-1).view(np.uint32)[-1] ^= 1
    assert hash_arrays([(W, b) for W, b in arrays]) != wanted()


def test_zeros_of_either_sign_differ() -> None:
    plus, minus = (np.full((1, 1), zero, np.float32) for zero in (0.0, -0.0))
    assert hash_arrays([(plus, None)]) != hash_arrays([(minus, None)])


def test_equal_bytes_of_another_shape_or_dtype_differ() -> None:
    zeros = [np.zeros((2, 4), np.float32), np.zeros((4, 2), np.float32), np.zeros((2, 2))]
    zeros += [np.zeros((4, 4), jnp.bfloat16), np.zeros((4, 4), np.float16)]
    assert len({hash_arrays([(array, None)]) for array in zeros}) == len(zeros)


def test_memory_order_and_byte_order_do_not_matter() -> None:
    turned: Any = [(np.asfortranarray(W), b[::-1][::-1].astype(">f4")) for W, b in ARRAYS]
    assert hash_arrays(turned) == wanted()


def test_bfloat16_is_hashed_by_its_two_bytes() -> None:
    ones = np.ones((1, 2), jnp.bfloat16)
    text = b"bfloat16 [1, 2]\n" + bytes.fromhex("803f803f")
    assert hash_arrays([(ones, None)]) == hashlib.sha256(text).hexdigest()


def test_parameters_of_another_model_are_refused() -> None:
    params = tpmlp.from_numpy(MODEL, ARRAYS, mesh_of((1, 2, 1)))
    with pytest.raises(ValueError, match="num_layers=1"):
        tpmlp.parameter_hash(tpmlp.MLP((17, 12)), params)
