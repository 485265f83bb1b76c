"""Vertices of tokens: embeddings, positions, means over tokens."""

from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.collectives import all_gather, block_index, einsum, reduce_scatter
from tpmlp.graph.placement import Node
from tpmlp.graph.rules.rule import Given, Gradients, Params, Reader, Rule

Inputs = tuple[jax.Array, ...]


def embedding(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Look up r = W^T onehot(id), W "V/g F/s": a dense vertex, transposed, whose g is one-hot.

    Every device looks in the rows that it has; the sum over g is with zeros. An id that is none
    gives NaN.
    """
    (ids,) = inputs
    rows, here = _local_rows(node, params["W"], ids)
    vocabulary = node.input_shapes[0].vocabulary
    assert vocabulary is not None
    r = jnp.where(here[:, None], params["W"][rows], 0).astype(given.run.compute)
    r = jnp.where(((ids >= 0) & (ids < vocabulary))[:, None], r, jnp.nan)
    # All terms of the sum but one are 0: it is exact in the compute type.
    r = reduce_scatter("F/s B/d +g -> F/s/g B/d", r.T, **node.axes)
    return r.astype(given.run.total), None


def embedding_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Add the columns of g to the rows that were looked up: dW = onehot(id) g^T."""
    run, axes = given.run, node.axes
    g = all_gather("F/s/g B/d -> F/s B/d", run.to_compute(g), **axes).astype(run.total)
    rows, here = _local_rows(node, params["W"], read(0))
    dW = jnp.zeros(params["W"].shape, run.total).at[rows].add(jnp.where(here[:, None], g.T, 0))
    return Gradients((None,), {"W": dW})


def positions(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute h + shift of the token's place."""
    (h,) = inputs
    return (h.reshape(h.shape[0], -1, node.shape.positions) + params["shift"][:, None]).reshape(
        h.shape
    ), None


def positions_again(
    node: Node, params: Params, inputs: Inputs, residue: Any, given: Given
) -> jax.Array:
    """Compute h + shift of the token's place."""
    return positions(node, params, inputs, given)[0]


def positions_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Give g, and its sum over samples."""
    by_place = g.reshape(g.shape[0], -1, node.shape.positions)
    return Gradients((g,), {"shift": einsum("F/s/g B/d T -> F/s/g T +d", by_place, **node.axes)})


def token_mean(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute the mean over the tokens of each sample."""
    (h,) = inputs
    return jnp.mean(h.reshape(h.shape[0], -1, node.input_shapes[0].positions), axis=-1), None


def token_mean_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Give each token g / T."""
    num_tokens = node.input_shapes[0].positions
    return Gradients((jnp.repeat(g / num_tokens, num_tokens, axis=1),), {})


def _local_rows(node: Node, W: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the row of W "V/g F/s" on this device for each id, and whether it is there."""
    first = jnp.asarray(block_index("V/g", **node.axes) * W.shape[0], ids.dtype)
    rows = ids - first
    return jnp.clip(rows, 0, W.shape[0] - 1), (rows >= 0) & (rows < W.shape[0])


EMBEDDING = Rule(embedding, embedding_backward, reads=(0,))
POSITIONS = Rule(positions, positions_backward, rebuild=positions_again)
TOKEN_MEAN = Rule(token_mean, token_mean_backward)
