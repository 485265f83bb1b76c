"""The recursion over layers: loss, z_l, g_l, dW_l, db_l of the kernel against the reference.

Each tensor is a case of its own, so the cases that fail say where the mistake is: z_2 and all
after it, the second layer's forward; g_1 alone, sigma' or dh of layer 2; dW_2 alone, its product
or its sum over data; db alone, the bias. Widths and batch divide by no mesh, so a failure on some
meshes only is about padding, about roles (by layout), or about the data axis.

- Floats are compared at 1e-12 (tests/tolerances.py). Integers bit for bit: all sums are exact, so
  a difference is a wrong term, not rounding.
- "padding is not zero": what does not exist is no longer exactly 0, and would take part in the
  next step (gradients) or the next layer (z, g).
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import (
    FEW_PLACEMENTS,
    ONE_LAYOUT,
    PLACEMENTS,
    Problem,
    error_of,
    expected,
    logical,
    name_of,
    padding,
    sharded,
)
from tests.tolerances import FLOAT64

# The order of parameters keeps the tensors of one program together, on one worker of xdist.
FLOATS = Problem()
INTEGERS = Problem(activation="relu", loss="output", integers=True)
LINEAR = Problem(widths=(17, 10))
NO_BIAS = Problem(widths=(17, 12, 10), bias=False)


def _steep(z):
    return jnp.sign(z) * jnp.sqrt(jnp.abs(z))


def _steep_prime(z):
    return 0.5 / jnp.sqrt(jnp.abs(z))


# sigma'(0) is infinite, and padding rows of z are 0.
STEEP = Problem(widths=(17, 12, 10), activation=(_steep, _steep_prime), num_samples=32)


@pytest.mark.parametrize("tensor", FLOATS.tensors)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=name_of)
def test_float64_tensor_equals_the_reference_and_is_zero_where_padded(placement, tensor):
    got, shape = sharded(FLOATS, placement)[tensor], expected(FLOATS)[tensor].shape
    assert error_of(FLOATS, placement, tensor) <= FLOAT64
    # Padding samples have z = b: their weight is 0, not their z.
    features = got[:, : shape[1]] if tensor.startswith("z") else got
    assert not padding(features, shape).any(), "padding is not zero"


@pytest.mark.parametrize("tensor", INTEGERS.tensors)
@pytest.mark.parametrize("placement", ONE_LAYOUT, ids=name_of)
def test_integer_tensor_equals_the_reference_bit_for_bit(placement, tensor):
    wanted = expected(INTEGERS)[tensor]
    assert np.abs(wanted).max() < 2**24  # Else float32 would round, and prove nothing.
    got = logical(sharded(INTEGERS, placement)[tensor], wanted.shape)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, wanted.astype(np.float32))


@pytest.mark.parametrize("tensor", LINEAR.tensors)
@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
def test_one_layer_is_a_linear_model(placement, tensor):
    assert error_of(LINEAR, placement, tensor) <= FLOAT64


# Where W_l is square, its transpose in the place of itself raises no error.
SQUARE = Problem(widths=(8, 8, 8))


@pytest.mark.parametrize("tensor", SQUARE.tensors)
@pytest.mark.parametrize(
    "placement", [((1, 1, 1), "column"), ((1, 2, 2), "column-row")], ids=name_of
)
def test_square_layers_equal_the_reference(placement, tensor):
    assert error_of(SQUARE, placement, tensor) <= FLOAT64


@pytest.mark.parametrize("tensor", NO_BIAS.tensors)
@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
def test_tensor_of_a_model_without_biases_equals_the_reference(placement, tensor):
    assert error_of(NO_BIAS, placement, tensor) <= FLOAT64


# 30 samples on data=4 leave two to fill up; were they zeros, so would z be in every layer.
STEEP_SAMPLES = Problem(widths=(17, 12, 10), activation=STEEP.activation, bias=False)


@pytest.mark.parametrize("tensor", STEEP_SAMPLES.tensors)
def test_an_infinite_derivative_at_zero_does_not_leak_from_padding_samples(tensor):
    assert error_of(STEEP_SAMPLES, ((4, 2, 1), "column"), tensor) <= FLOAT64


def _logarithm(z):
    return jnp.log(jnp.abs(z))


def _reciprocal(z):
    return 1.0 / z


INFINITE_SAMPLES = Problem(widths=(17, 12, 10), activation=(_logarithm, _reciprocal), bias=False)


@pytest.mark.parametrize("tensor", ["loss", "dW_1", "dW_2"])
def test_an_infinite_activation_at_zero_does_not_leak_from_padding_samples(tensor):
    assert error_of(INFINITE_SAMPLES, ((4, 2, 1), "column"), tensor) <= FLOAT64
