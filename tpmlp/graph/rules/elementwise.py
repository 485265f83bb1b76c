"""Vertices without a collective: activations, sums, products, scales, shifts, dropout."""

from functools import reduce
from operator import add, mul
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from tpmlp.activations import activate
from tpmlp.collectives import all_reduce, block_index, einsum, vary_like
from tpmlp.graph.placement import Node
from tpmlp.graph.rules.rule import Given, Gradients, Params, Reader, Rule, clear
from tpmlp.graph.shape import seed_of
from tpmlp.xla import after

Inputs = tuple[jax.Array, ...]


def activation(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute sigma(z); padding rows stay 0, whatever sigma makes of 0."""
    (z,) = inputs
    h = activate(node.kind.sigma, z)
    return (h if node.kind.sigma.fixes_zero else clear(h, node)), None


def activation_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Compute g * sigma'(z), 0 on padding rows, where a user's derivative need not be finite."""
    return Gradients((clear(g * node.kind.sigma.sigma_prime(read(0)), node),), {})


def total(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute the sum of the inputs."""
    return reduce(add, inputs), None


def total_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Give g to every input."""
    return Gradients((g,) * len(node.inputs), {})


def product(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute the elementwise product of the inputs."""
    return reduce(mul, inputs), None


def product_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Give each input g times the other inputs."""
    inputs = [read(i) for i in range(len(node.inputs))]
    return Gradients(
        tuple(reduce(mul, [g, *inputs[:i], *inputs[i + 1 :]]) for i in range(len(inputs))), {}
    )


def scale(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute scale * h."""
    return params["scale"][:, None] * inputs[0], None


def scale_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Compute scale * g, and the sum over samples of g * h."""
    dscale = einsum("F/s/g B/d -> F/s/g +d", g * read(0), **node.axes)
    return Gradients((params["scale"][:, None] * g,), {"scale": dscale})


def shift(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute h + shift."""
    return inputs[0] + params["shift"][:, None], None


def shift_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Give g, and its sum over samples."""
    return Gradients((g,), {"shift": einsum("F/s/g B/d -> F/s/g +d", g, **node.axes)})


def dropout(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute h * mask / (1 - rate)."""
    return inputs[0] * _mask(node, inputs[0], given), None


def dropout_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Compute g * mask / (1 - rate), the mask drawn again."""
    return Gradients((g * _mask(node, g, given),), {})


def activity_l1(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Give h as it is."""
    return inputs[0], None


def activity_l1_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Add the derivative of the objective's own term, coefficient * sign(h) for each sample."""
    if given.share is None:
        return Gradients((g,), {})
    weights = _column_weights(node, given)
    return Gradients((g + weights[None] * jnp.sign(read(0)).astype(g.dtype),), {})


def activity_value(node: Node, h: jax.Array, given: Given) -> jax.Array:
    """Return what the vertex adds to the objective for this device's samples, "+d"."""
    sizes = jnp.abs(h) * _column_weights(node, given)[None]
    local = einsum("F/s/g B/d -> +d+s+g", sizes, **node.axes)
    return all_reduce("+d+s+g -> +d", local, **node.axes)


def _column_weights(node: Node, given: Given) -> jax.Array:
    """Return what each column, a sample or one of its tokens, counts."""
    assert given.share is not None
    positions = node.shape.positions
    return jnp.repeat(given.share * (node.kind.coefficient / positions), positions)


def _mask(node: Node, like: jax.Array, given: Given) -> jax.Array:
    """Return 1 / (1 - rate) where a feature stays, else 0.

    Random bits are a function of the key, the vertex, the number of the token in the whole batch
    and the feature, whichever device computes them.
    """
    rate, words = node.kind.rate, given.words
    if rate == 0 or words is None:
        return jnp.ones_like(like)
    first_row = block_index("F/s/g", **node.axes) * like.shape[0]
    first_column = given.first_sample * node.shape.positions
    rows = first_row + jax.lax.broadcasted_iota(jnp.int32, like.shape, 0)
    columns = first_column + jax.lax.broadcasted_iota(jnp.int32, like.shape, 1)
    counters = [vary_like(place, like).astype(jnp.uint32) for place in (columns, rows)]
    seed = given.seeds.get(node.name, jnp.uint32(seed_of(node.name)))
    words = jnp.stack([words[0] ^ seed, words[1]])
    # Not before `like` is there, or the bits of all vertices are drawn first thing, and held.
    key = after(vary_like(words, like), like)[:, None, None]
    bits, _ = threefry2x32_p.bind(*key, *counters)
    kept = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(kept, jnp.asarray(1 / (1 - rate), like.dtype), 0)


def _again(forward: Any) -> Any:
    """Return a rule's rebuild: forward again."""

    def rebuild(
        node: Node, params: Params, inputs: Inputs, residue: Any, given: Given
    ) -> jax.Array:
        return forward(node, params, inputs, given)[0]

    return rebuild


ACTIVATION = Rule(activation, activation_backward, reads=(0,), rebuild=_again(activation))
SUM = Rule(total, total_backward)
PRODUCT = Rule(product, product_backward, reads=None, rebuild=_again(product))
SCALE = Rule(scale, scale_backward, reads=(0,), rebuild=_again(scale))
SHIFT = Rule(shift, shift_backward, rebuild=_again(shift))
DROPOUT = Rule(dropout, dropout_backward, rebuild=_again(dropout))
ACTIVITY_L1 = Rule(activity_l1, activity_l1_backward, reads=(0,), rebuild=_again(activity_l1))
