"""Activations: sigma and sigma', side by side, each stable at any magnitude.

The kernel keeps z_l alone and rebuilds h_{l+1} = sigma(z_l) and sigma'(z_l) from it, so both are
functions of z. `fixes_zero` says whether sigma(0) = 0: padding rows of z are 0, and where sigma
moves them (sigmoid gives 1/2) the kernel must put them back, or they would leak into dW.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Elementwise = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """An elementwise function and its derivative.

    Attributes:
        name: what summaries and errors call it.
        sigma: z -> sigma(z), elementwise.
        sigma_prime: z -> sigma'(z), elementwise.
        fixes_zero: whether sigma(0) = 0.
    """

    name: str
    sigma: Elementwise
    sigma_prime: Elementwise
    fixes_zero: bool


def relu(z: jax.Array) -> jax.Array:
    """Return max(z, 0)."""
    return jnp.maximum(z, 0)


def relu_prime(z: jax.Array) -> jax.Array:
    """Return 1 where z > 0, else 0; the derivative at 0 is taken as 0."""
    return (z > 0).astype(z.dtype)


def gelu(z: jax.Array) -> jax.Array:
    """Return z Phi(z), Phi the normal distribution function (exact, by erfc)."""
    return z * _normal_cdf(z)


def gelu_prime(z: jax.Array) -> jax.Array:
    """Return Phi(z) + z phi(z)."""
    density = jnp.exp(-0.5 * z * z) * (2 * jnp.pi) ** -0.5
    return _normal_cdf(z) + z * density


def silu(z: jax.Array) -> jax.Array:
    """Return z s(z), s the sigmoid."""
    return z * jax.nn.sigmoid(z)


def silu_prime(z: jax.Array) -> jax.Array:
    """Return s(z) (1 + z (1 - s(z)))."""
    s = jax.nn.sigmoid(z)
    return s * (1 + z * jax.nn.sigmoid(-z))


def tanh_prime(z: jax.Array) -> jax.Array:
    """Return 1 - tanh(z)^2."""
    return 1 - jnp.tanh(z) ** 2


def sigmoid_prime(z: jax.Array) -> jax.Array:
    """Return s(z) s(-z), which loses no digits where s(z) is close to 1."""
    return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


def softplus(z: jax.Array) -> jax.Array:
    """Return log(1 + exp(z))."""
    return jnp.logaddexp(z, jnp.zeros((), z.dtype))


def _normal_cdf(z: jax.Array) -> jax.Array:
    return 0.5 * jax.lax.erfc(-z * 0.5**0.5)


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation(name="relu", sigma=relu, sigma_prime=relu_prime, fixes_zero=True),
        Activation(name="gelu", sigma=gelu, sigma_prime=gelu_prime, fixes_zero=True),
        Activation(name="silu", sigma=silu, sigma_prime=silu_prime, fixes_zero=True),
        Activation(name="tanh", sigma=jnp.tanh, sigma_prime=tanh_prime, fixes_zero=True),
        Activation(
            name="sigmoid", sigma=jax.nn.sigmoid, sigma_prime=sigmoid_prime, fixes_zero=False
        ),
        Activation(name="softplus", sigma=softplus, sigma_prime=jax.nn.sigmoid, fixes_zero=False),
        Activation(name="identity", sigma=lambda z: z, sigma_prime=jnp.ones_like, fixes_zero=True),
    )
}


def get_activation(activation: object) -> Activation:
    """Return the Activation meant by a name, a pair (sigma, sigma_prime), or an Activation.

    Args:
        activation: a name in ACTIVATIONS; or two functions of an array, elementwise, the second
            the derivative of the first; or an Activation.

    Raises:
        ValueError: neither.

    Examples:
        >>> get_activation("sigmoid").fixes_zero
        False
        >>> get_activation((jnp.sin, jnp.cos)).name
        'sin'
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    if isinstance(activation, tuple) and len(activation) == 2 and all(map(callable, activation)):
        sigma, sigma_prime = activation
        name = getattr(sigma, "__name__", "user")
        return Activation(name=name, sigma=sigma, sigma_prime=sigma_prime, fixes_zero=False)
    raise ValueError(
        f"activation must be one of {tuple(ACTIVATIONS)} or a pair of functions "
        f"(sigma, sigma_prime): got activation={activation!r}."
    )
