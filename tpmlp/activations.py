"""Activations: sigma and sigma', side by side, each stable at any magnitude.

The kernel keeps z_l alone and rebuilds h_{l+1} = sigma(z_l) and sigma'(z_l) from it, so both are
functions of z. `fixes_zero` says whether sigma(0) = 0: padding rows of z are 0, and where sigma
moves them (sigmoid gives 1/2) the kernel must put them back, or they would leak into dW.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
        largest_slope: the largest |sigma'(z)| of any z; None where that is not known.
    """

    name: str
    sigma: Elementwise
    sigma_prime: Elementwise
    fixes_zero: bool
    largest_slope: float | None = None


@partial(jax.jit, static_argnums=0)  # Traced once for all layers of a shape.
def activate(activation: Activation, z: jax.Array) -> jax.Array:
    """Compute sigma(z), whose derivative is sigma'(z) as the backward pass has it.

    JAX's own derivative of sigma can be another: that of max(z, 0) is 1/2 at 0, where sigma' is 0.
    """
    return _activate(activation, z)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _activate(activation: Activation, z: jax.Array) -> jax.Array:
    return activation.sigma(z)


@_activate.defjvp
def _activate_jvp(
    activation: Activation, at: tuple[jax.Array], along: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (z,), (dz,) = at, along
    h = activation.sigma(z)
    return h, (activation.sigma_prime(z) * dz).astype(h.dtype)


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
    return _normal_cdf(z) + z * _normal_density(z)


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


# In JAX 0.12 the derivative of erfc is a polynomial that shard_map's check_vma refuses.
@jax.custom_jvp
def _normal_cdf(z: jax.Array) -> jax.Array:
    return 0.5 * jax.lax.erfc(-z * 0.5**0.5)


_normal_cdf.defjvps(lambda dz, cdf, z: _normal_density(z) * dz)


def _normal_density(z: jax.Array) -> jax.Array:
    return jnp.exp(-0.5 * z * z) * (2 * jnp.pi) ** -0.5


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation(
            name="relu", sigma=relu, sigma_prime=relu_prime, fixes_zero=True, largest_slope=1.0
        ),
        Activation(
            name="gelu",
            sigma=gelu,
            sigma_prime=gelu_prime,
            fixes_zero=True,
            largest_slope=1.1289041,  # At sqrt(2).
        ),
        Activation(
            name="silu",
            sigma=silu,
            sigma_prime=silu_prime,
            fixes_zero=True,
            largest_slope=1.0998393,  # At 2.3994.
        ),
        Activation(
            name="tanh", sigma=jnp.tanh, sigma_prime=tanh_prime, fixes_zero=True, largest_slope=1.0
        ),
        Activation(
            name="sigmoid",
            sigma=jax.nn.sigmoid,
            sigma_prime=sigmoid_prime,
            fixes_zero=False,
            largest_slope=0.25,
        ),
        Activation(
            name="softplus",
            sigma=softplus,
            sigma_prime=jax.nn.sigmoid,
            fixes_zero=False,
            largest_slope=1.0,
        ),
        Activation(
            name="identity",
            sigma=lambda z: z,
            sigma_prime=jnp.ones_like,
            fixes_zero=True,
            largest_slope=1.0,
        ),
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
