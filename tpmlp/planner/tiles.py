"""Bytes of arrays as a device lays them out: TPUs fill tiles, others pack elements.

A TPU stores the last two dims of an array, in memory order, as tiles of 8 x 128 elements; where
there are fewer than 8 rows, of the next power of two. Arrays of one dim fill runs of at most 1024
elements. The compiler chooses the order of the dims, so that least is lost. Derived from programs
that libtpu 0.0.42 compiled for v5e, v5p and v6e; `make test-aot` repeats the comparison.
"""

from collections.abc import Sequence
from itertools import permutations
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.layout import padded

_LANES, _SUBLANES, _WORD_BYTES = 128, 8, 4


def argument_bytes(arrays: Any, platform: str) -> int:
    """Return the bytes that arrays take on one device.

    Args:
        arrays: a tree of ShapeDtypeStructs, with shardings where they are split.
        platform: "tpu", or another.
    """
    leaves = jax.tree.leaves(arrays)
    return sum(_bytes(_local_shape(a), _item_bytes(a), platform == "tpu") for a in leaves)


def _local_shape(array: Any) -> tuple[int, ...]:
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    return (*shape, *_key_shape(array))


def _key_shape(array: Any) -> tuple[int, ...]:
    """Return the dims of the words of a key of jax.random; none of anything else."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, array).shape[array.ndim :] if is_key else ()


def _item_bytes(array: Any) -> int:
    return _WORD_BYTES if _key_shape(array) else array.dtype.itemsize


def _bytes(shape: Sequence[int], item_bytes: int, tiled: bool) -> int:
    return (_tiled(shape, item_bytes) if tiled else prod(shape)) * item_bytes


def _tiled(shape: Sequence[int], item_bytes: int) -> int:
    """Return the elements of an array, those that fill its tiles included.

    Examples:
        >>> _tiled((130, 5), item_bytes=4), _tiled((3,), item_bytes=2)
        (2048, 256)
    """
    per_word = max(1, _WORD_BYTES // item_bytes)
    if len(shape) < 2:
        size = prod(shape)
        run = min(max(_LANES * per_word, _power_of_two(size)), _LANES * _SUBLANES)
        return padded(size, run)
    orders = permutations(shape)
    return min(
        prod(major) * _rows(rows, per_word) * padded(lanes, _LANES)
        for *major, rows, lanes in orders
    )


def _rows(rows: int, least: int) -> int:
    return padded(rows, min(_SUBLANES, max(least, _power_of_two(rows))))


def _power_of_two(size: int) -> int:
    """Return the least power of two that is not smaller."""
    return 1 << max(0, size - 1).bit_length()
