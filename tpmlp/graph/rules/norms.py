"""Vertices that look at all features of a token: RMSNorm, LayerNorm, softmax.

What they sum over the features is one number a token, and crosses the devices in an all-reduce of
one row. Padding rows are 0, and count in no sum or mean.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.collectives import all_reduce, all_reduce_max, block_index, einsum
from tpmlp.graph.placement import Node
from tpmlp.graph.rules.rule import Given, Gradients, Params, Reader, Rule, clear

Inputs = tuple[jax.Array, ...]


def rms_norm(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute scale * h * root, root = 1 / sqrt(mean of h^2 + epsilon), which is kept."""
    (h,) = inputs
    (squares,) = _sums(node, h * h)
    root = jax.lax.rsqrt(squares / node.width + node.kind.epsilon)
    return rms_norm_again(node, params, inputs, root, given), root


def rms_norm_again(
    node: Node, params: Params, inputs: Inputs, root: jax.Array, given: Given
) -> jax.Array:
    """Compute scale * h * root."""
    return params["scale"][:, None] * (inputs[0] * root[None])


def rms_norm_backward(
    node: Node, params: Params, read: Reader, root: jax.Array, g: jax.Array, given: Given
) -> Gradients:
    """Compute dh = root * (dn - n * mean of dn * n), n = h * root, dn = scale * g."""
    n = read(0) * root[None]
    dn = params["scale"][:, None] * g
    (products,) = _sums(node, dn * n)
    dh = root[None] * (dn - n * (products / node.width)[None])
    return Gradients((dh,), {"scale": einsum("F/s/g B/d -> F/s/g +d", g * n, **node.axes)})


def layer_norm(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute scale * (h - mean) * root + shift, root = 1 / sqrt(variance + epsilon).

    The variance is a mean of squares of what the mean was taken from first: two all-reduces, where
    the difference of two means would need one and lose digits. Mean and root are kept.
    """
    (h,) = inputs
    (totals,) = _sums(node, h)
    mean = totals / node.width
    (squares,) = _sums(node, jnp.square(_centred(node, h, mean)))
    statistics = jnp.stack([mean, jax.lax.rsqrt(squares / node.width + node.kind.epsilon)])
    return layer_norm_again(node, params, inputs, statistics, given), statistics


def layer_norm_again(
    node: Node, params: Params, inputs: Inputs, statistics: jax.Array, given: Given
) -> jax.Array:
    """Compute scale * (h - mean) * root + shift."""
    mean, root = statistics
    n = _centred(node, inputs[0], mean) * root[None]
    return params["scale"][:, None] * n + params["shift"][:, None]


def layer_norm_backward(
    node: Node, params: Params, read: Reader, statistics: jax.Array, g: jax.Array, given: Given
) -> Gradients:
    """Compute dh = root * (dn - mean of dn - n * mean of dn * n), dn = scale * g."""
    mean, root = statistics
    n = _centred(node, read(0), mean) * root[None]
    dn = params["scale"][:, None] * g
    sums, products = (s / node.width for s in _sums(node, dn, dn * n))
    dh = root[None] * clear(dn - sums[None] - n * products[None], node)
    dscale = einsum("F/s/g B/d -> F/s/g +d", g * n, **node.axes)
    dshift = einsum("F/s/g B/d -> F/s/g +d", g, **node.axes)
    return Gradients((dh,), {"scale": dscale, "shift": dshift})


def softmax(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute exp(z - max) / sum of exp(z - max); max and sum are kept."""
    z = _real(node, inputs[0])
    largest = all_reduce_max("B/d +s+g -> B/d", jnp.max(z, axis=0), **node.axes)
    (total,) = _sums(node, jnp.exp(z - largest[None]))
    statistics = jnp.stack([largest, total])
    return softmax_again(node, params, inputs, statistics, given), statistics


def softmax_again(
    node: Node, params: Params, inputs: Inputs, statistics: jax.Array, given: Given
) -> jax.Array:
    """Compute exp(z - max) / sum."""
    largest, total = statistics
    return jnp.exp(_real(node, inputs[0]) - largest[None]) / total[None]


def softmax_backward(
    node: Node, params: Params, read: Reader, statistics: jax.Array, g: jax.Array, given: Given
) -> Gradients:
    """Compute dz = r * (g - sum of g * r)."""
    r = softmax_again(node, params, (read(0),), statistics, given)
    (products,) = _sums(node, g * r)
    return Gradients((r * (g - products[None]),), {})


def _sums(node: Node, *terms: jax.Array) -> list[jax.Array]:
    """Sum each "F/s/g B/d" over all features, together in one all-reduce; each "B/d"."""
    local = [einsum("F/s/g B/d -> B/d +s+g", term, **node.axes) for term in terms]
    return list(all_reduce("K B/d +s+g -> K B/d", jnp.stack(local), **node.axes))


def _centred(node: Node, h: jax.Array, mean: jax.Array) -> jax.Array:
    return clear(h - mean[None], node)


def _real(node: Node, z: jax.Array) -> jax.Array:
    """Return z with -inf for padding rows."""
    if node.width == node.padded_width:
        return z
    first = block_index("F/s/g", **node.axes) * z.shape[0]
    rows = first + jnp.arange(z.shape[0], dtype=jnp.int32)
    return jnp.where((rows < node.width)[:, None], z, -jnp.inf)


RMS_NORM = Rule(rms_norm, rms_norm_backward, (0,), rms_norm_again, residue="B/d")
LAYER_NORM = Rule(layer_norm, layer_norm_backward, (0,), layer_norm_again, residue="K B/d")
SOFTMAX = Rule(softmax, softmax_backward, (0,), softmax_again, residue="K B/d")
