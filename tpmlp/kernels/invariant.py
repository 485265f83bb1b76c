"""One dense layer whose bits do not depend on the mesh: blocks of one shape, added in trees.

The functions are those of tpmlp.kernels.dense, line for line, and equal to them up to the order of
sums. A gather only moves numbers, and is the same. A product is many, of blocks
(tpmlp.kernels.blocks); a reduce-scatter is an all-to-all, which moves as many words, and a tree.
"""

import jax

from tpmlp.collectives import all_gather, all_reduce_in_tree, reduce_scatter_in_tree, tree_sum
from tpmlp.kernels.blocks import blocks_of, blockwise, multiply
from tpmlp.kernels.dense import gather_gradient, gather_input
from tpmlp.kernels.execution import Execution

__all__ = [
    "backward_bias",
    "backward_input",
    "backward_weight",
    "forward",
    "gather_gradient",
    "gather_input",
    "reduce_bias",
    "reduce_weight",
]


def forward(
    W: jax.Array, b: jax.Array | None, h: jax.Array, run: Execution, /, **axes: str
) -> jax.Array:
    """Compute z = W h + b, "O/g/s B/d", from W "O/g I/s" and h "I/s B/d"."""
    z = multiply("O/g I/s, I/s B/d -> O/g B/d +s", W, h, dtype=run.total, axes=axes)
    z = reduce_scatter_in_tree("O/g B/d +s -> O/g/s B/d", z, **axes)
    return z if b is None else z + b[:, None]


def backward_input(W: jax.Array, g: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Compute dh = W^T g, "I/s/g B/d", from W "O/g I/s" and g "O/g B/d"."""
    dh = multiply("O/g I/s, O/g B/d -> I/s B/d +g", W, g, dtype=run.total, axes=axes)
    return reduce_scatter_in_tree("I/s B/d +g -> I/s/g B/d", dh, **axes)


def backward_weight(g: jax.Array, h: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Compute dW = g h^T, "O/g I/s +d", from g "O/g B/d" and h "I/s B/d"."""
    return multiply("O/g B/d, I/s B/d -> O/g I/s +d", g, h, dtype=run.total, axes=axes)


def backward_bias(g: jax.Array, /, **axes: str) -> jax.Array:
    """Compute db = sum_B g, "O/g/s +d", from g "O/g/s B/d"."""
    counts = {"o": blocks_of("g", "s", axes=axes), "b": blocks_of("d", axes=axes)}
    sums = blockwise("ob->ob", counts, lambda g: g.sum(axis=1, keepdims=True), g)
    return tree_sum(sums, axis=1)


def reduce_weight(dW: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Sum dW "O/g I/s +d" over the batch's parts: an all-reduce in its two halves."""
    dW = reduce_scatter_in_tree("O/g I/s +d -> O/g/d I/s", dW, **axes)
    return all_gather("O/g/d I/s -> O/g I/s", dW, **axes)


def reduce_bias(db: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Sum db "O/g/s +d" over the batch's parts."""
    return all_reduce_in_tree("O/g/s +d -> O/g/s", db, **axes)
