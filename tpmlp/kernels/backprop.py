"""The recursion over layers, on one device's blocks.

    h_1 = x,   z_l = W_l h_l + b_l,   h_{l+1} = sigma(z_l)               l = 1 .. L+1
    g_l = (W_{l+1}^T g_{l+1}) * sigma'(z_l)                              l = L .. 1
    dW_l = g_l h_l^T,   db_l = sum over the batch of g_l

One array a layer is kept for the backward pass, z_l, split d/M: h_{l+1} and sigma'(z_l) are
rebuilt from it. The recursion is unrolled; layers are a Python list, l at index l - 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.activations import Activation
from tpmlp.collectives import block_index
from tpmlp.kernels import dense
from tpmlp.placement import Placement

Layers = Any  # ((W_1, b_1 or None), ...), local blocks


class Chain(NamedTuple):
    """The static description of a chain of dense layers.

    Attributes:
        placement: roles and widths of every layer.
        activation: sigma and sigma'.
    """

    placement: Placement
    activation: Activation


class Backward(NamedTuple):
    """What the backward pass gives.

    Attributes:
        grads: ((dW_1, db_1 or None), ...), laid out as the parameters.
        g: g_1 .. g_{L+1}, each "O/g/s B/d".
        dx: d loss / d x, "I/s/g B/d"; free when not used.
    """

    grads: Layers
    g: list[jax.Array]
    dx: jax.Array


def forward(layers: Layers, x: jax.Array, chain: Chain) -> list[jax.Array]:
    """Compute z_1 .. z_{L+1}, each "O/g/s B/d"; x is "I/s/g B/d"."""
    h, z = x, []
    for l, (W, b) in enumerate(layers, 1):
        z.append(dense.forward(W, b, h, **chain.placement.axes[l - 1]))
        if l < len(layers):
            h = sigma(z[-1], l, chain)
    return z


def backward(
    layers: Layers, x: jax.Array, z: list[jax.Array], g: jax.Array, chain: Chain
) -> Backward:
    """Run the recursion from g_{L+1} down to g_1: `forward`, transposed, last layer first."""
    grads, all_g, dh = [], [g], x
    for l in range(len(layers), 0, -1):
        W, b = layers[l - 1]
        kept = _again(z[l - 2] if l > 1 else x, g, chain)
        h = sigma(kept, l - 1, chain) if l > 1 else kept
        dW, db, dh = dense.backward(W, h, g, **chain.placement.axes[l - 1])
        grads.append((dW, None if b is None else db))
        if l > 1:
            g = dh * sigma_prime(kept, l - 1, chain)
            all_g.append(g)
    return Backward(tuple(reversed(grads)), all_g[::-1], dh)


def sigma(z: jax.Array, layer: int, chain: Chain) -> jax.Array:
    """Compute h_{l+1} from z_l. Padding rows stay 0, whatever the activation makes of 0."""
    h = chain.activation.sigma(z)
    return h if chain.activation.fixes_zero else _mask(h, layer, chain)


def sigma_prime(z: jax.Array, layer: int, chain: Chain) -> jax.Array:
    """Compute sigma'(z_l), 0 on padding rows, where a user's derivative need not be finite."""
    return _mask(chain.activation.sigma_prime(z), layer, chain)


def _mask(array: jax.Array, layer: int, chain: Chain) -> jax.Array:
    """Set the padding rows of an "O/g/s B/d" of a layer to 0."""
    width, whole = (w[layer] for w in (chain.placement.widths, chain.placement.padded_widths))
    if width == whole:
        return array
    first = block_index("O/g/s", **chain.placement.axes[layer - 1]) * array.shape[0]
    rows = first + jnp.arange(array.shape[0], dtype=jnp.int32)
    return jnp.where((rows < width)[:, None], array, 0)


def _again(kept: jax.Array, g: jax.Array, chain: Chain) -> jax.Array:
    """Return kept, in a way that lets nothing computed from it be shared with the forward pass.

    Without this, XLA finds that the backward pass gathers the same h_l as the forward pass, keeps
    the gathered array, and the kernel holds M times what it should. On TPU and GPU a barrier
    that waits for g does it. The CPU compiler drops barriers before it merges, so there the
    value is made to depend on g: it is kept unless g[0, 0] is NaN, and then dW is NaN anyway.
    """
    if chain.placement.mesh.devices.flat[0].platform != "cpu":
        return lax.optimization_barrier((kept, g))[0]
    poisoned = jnp.isnan(g[0, 0])
    return jnp.where(poisoned, jnp.nan, kept)
