"""Padding: rows of a block that are no features, kept at 0."""

import jax
import jax.numpy as jnp

from tpmlp.collectives import block_index


def clear_rows(array: jax.Array, width: int, dim: str, **axes: str) -> jax.Array:
    """Set the rows of a local block to 0 that lie beyond the logical width.

    Args:
        array: the block, features first.
        width: logical number of features.
        dim: how they are split, for example "O/g/s".
        **axes: mesh axis of each role.
    """
    first = block_index(dim, **axes) * array.shape[0]
    rows = first + jnp.arange(array.shape[0], dtype=jnp.int32)
    return jnp.where((rows < width)[:, None], array, 0)
