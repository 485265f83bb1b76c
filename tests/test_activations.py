"""sigma and sigma': each the other's derivative, equal to the reference, finite at any magnitude.

A failure in the first tests is in the formula of that activation. A failure in the network tests
alone is in how the kernel uses it: the mask on padding rows, where sigma(0) is not 0.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import FEW_PLACEMENTS, Problem, error_of, name_of, relative_error
from tests.tolerances import AUTODIFF, ELEMENTWISE, FLOAT64
from tpmlp import reference
from tpmlp.activations import ACTIVATIONS, Activation, activate, get_activation

# No 0: there relu has no derivative.
Z = np.concatenate([np.linspace(-30, 30, 1000), [1e-8, -1e-8]])
HUGE = np.array([-1e4, 1e4])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sigma_prime_is_the_derivative_of_sigma(name):
    activation = ACTIVATIONS[name]
    derivative = jax.vmap(jax.grad(activation.sigma))(Z)
    np.testing.assert_allclose(activation.sigma_prime(jnp.asarray(Z)), derivative, atol=AUTODIFF)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_largest_slope_is_that_of_any_z(name):
    slopes = np.abs(ACTIVATIONS[name].sigma_prime(jnp.linspace(-40.0, 40.0, 100_001)))
    assert ACTIVATIONS[name].largest_slope == pytest.approx(slopes.max(), rel=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("which", ["sigma", "sigma_prime"])
def test_an_activation_equals_the_reference(name, which):
    got = getattr(ACTIVATIONS[name], which)(jnp.asarray(Z))
    wanted = reference.ACTIVATIONS[name][which == "sigma_prime"](Z)
    assert relative_error(got, wanted) <= ELEMENTWISE


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_finite_at_ten_thousand_in_float32(name):
    z = jnp.asarray(HUGE, jnp.float32)
    assert np.isfinite(ACTIVATIONS[name].sigma(z)).all()
    assert np.isfinite(ACTIVATIONS[name].sigma_prime(z)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fixes_zero_says_whether_sigma_of_zero_is_zero(name):
    activation = ACTIVATIONS[name]
    assert activation.fixes_zero == (float(activation.sigma(jnp.zeros(()))) == 0.0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_keeps_the_dtype(name):
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        z = jnp.ones(3, dtype)
        assert ACTIVATIONS[name].sigma(z).dtype == dtype
        assert ACTIVATIONS[name].sigma_prime(z).dtype == dtype


def test_relu_has_derivative_zero_at_zero():
    assert float(ACTIVATIONS["relu"].sigma_prime(jnp.zeros(()))) == 0.0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_tangent_of_sigma_is_sigma_prime_at_a_kink_too(name):
    z = jnp.asarray(np.append(Z, 0.0))
    _, tangent = jax.jvp(partial(activate, ACTIVATIONS[name]), (z,), (jnp.full_like(z, 3.0),))
    assert relative_error(tangent, 3 * ACTIVATIONS[name].sigma_prime(z)) <= ELEMENTWISE


def shifted_sine(z):
    return jnp.sin(z) + 2.0


def logarithm(z):
    return jnp.log(jnp.abs(z))


def reciprocal(z):
    return 1.0 / z


USERS = {
    "shifted-sine": (shifted_sine, jnp.cos),
    # Infinite at 0, and so is its derivative: padding rows of z are 0.
    "logarithm": (logarithm, reciprocal),
}
PROBLEMS = {
    name: Problem(widths=(17, 12, 10), activation=activation, loss="mse", num_samples=32)
    for name, activation in [*((n, n) for n in ACTIVATIONS if n != "sigmoid"), *USERS.items()]
}


@pytest.mark.parametrize("tensor", ["z_2", "g_1", "dW_1", "db_1", "dW_2", "db_2"])
@pytest.mark.parametrize("placement", FEW_PLACEMENTS[::2], ids=name_of)
@pytest.mark.parametrize("name", PROBLEMS)
def test_tensor_of_a_network_with_an_activation_equals_the_reference(name, placement, tensor):
    assert error_of(PROBLEMS[name], placement, tensor) <= FLOAT64


def test_a_pair_of_functions_is_an_activation_named_after_the_first():
    activation = get_activation((shifted_sine, jnp.cos))
    assert (activation.name, activation.fixes_zero) == ("shifted_sine", False)
    assert isinstance(activation, Activation)
    assert get_activation(activation) is activation


@pytest.mark.parametrize("wrong", ["rlu", None, (jnp.sin,), (jnp.sin, "cos"), 3])
def test_what_is_no_activation_is_refused_with_the_names_that_are(wrong):
    with pytest.raises(ValueError, match="activation must be one of") as refusal:
        get_activation(wrong)
    assert f"activation={wrong!r}" in str(refusal.value)
    assert "sigmoid" in str(refusal.value)
