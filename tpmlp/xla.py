"""What XLA has to be told: orders and copies that it would otherwise undo, platform by platform.

XLA merges equal computations, moves them to where they can first run, and folds one operation into
another. The kernel's memory rests on some that look equal and must stay apart: the second gather of
h_l, a converted copy of W_l that is made anew at each use. Every such order is a function here, and
tpmlp.audit shows in the compiled program that it was obeyed.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def on_cpu() -> bool:
    """Return whether the shard_map that is being traced is for CPU devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


def axis_size(axis: str) -> int:
    """Return the size of a mesh axis in the shard_map that is being traced.

    lax.axis_size traces a sum over the axis each time: a fifth of the time to trace a deep network.
    """
    return jax.sharding.get_abstract_mesh().shape[axis]


def axis_number(axis: str) -> int:
    """Return the place of a mesh axis among those of the shard_map that is being traced."""
    return jax.sharding.get_abstract_mesh().axis_names.index(axis)


def hold(arrays: Any) -> Any:
    """Return arrays, none of which is there before the others are; on CPU, just as they are.

    What passes through is a new value to the compiler, so nothing computed from it is merged with
    what was computed before. The CPU compiler drops the barrier before it merges: `after` there.

    An array that is equal on all devices of an axis must not wait for one that differs there, or it
    would count as one that may differ: each waits for those that differ over no more axes.
    """
    if on_cpu():
        return arrays
    leaves, structure = jax.tree.flatten(arrays)
    axes = [differs_over(leaf) for leaf in leaves]
    held = list(leaves)
    # In an order of their own: one that depends on hashes would differ from host to host.
    for mine in sorted(set(axes), key=sorted):
        waited_for = [i for i, others in enumerate(axes) if others <= mine]
        values = lax.optimization_barrier([leaves[i] for i in waited_for])
        for i, value in zip(waited_for, values, strict=True):
            # Those that differ over fewer axes took part, and leave by a barrier of their own.
            held[i] = value if axes[i] == mine else held[i]
    return jax.tree.unflatten(structure, held)


def differs_over(array: jax.Array) -> frozenset[str]:
    """Return the mesh axes over which devices may hold different values of an array."""
    varying = jax.typeof(array).manual_axis_type.varying
    return frozenset(axis for axis in varying if axis_size(axis) > 1)


def never(beside: jax.Array) -> jax.Array:
    """Return False, by a condition on an element of an array that the compiler takes for open."""
    start, stop = (0,) * beside.ndim, (1,) * beside.ndim
    first = lax.squeeze(lax.slice(beside, start, stop), range(beside.ndim))
    return lax.gt(first, lax.full_like(first, jnp.inf))


def after(array: jax.Array, *others: jax.Array) -> jax.Array:
    """Return an array, on CPU as a new value that is not there before others are.

    It is made to depend on one element of each, by a condition that holds for no number and that
    the compiler does not see through.
    """
    if not on_cpu():
        return array
    any_of = reduce(lax.bitwise_or, map(never, others))
    return lax.select(any_of, lax.full_like(array, 0), array)


def settled(array: jax.Array) -> jax.Array:
    """Return an array, on CPU as the result of a branch, which no other operation is joined to.

    A sum that many read, itself of such a sum, would be computed anew by each of them, and so on
    back to the first: the program grows with the square of their number.
    """
    if not on_cpu():
        return array
    return lax.cond(never(array), jnp.negative, lambda array: array, array)


def unknown_zero(beside: jax.Array) -> jax.Array:
    """Return 0, as an int32 that the compiler does not know."""
    return never(beside).astype(jnp.int32)


@jax.custom_jvp
def hidden(x: jax.Array, zero: jax.Array) -> jax.Array:
    """Return floats, their bits taken through an exclusive or with an `unknown_zero`.

    No compiler pass joins what makes them to what reads them.
    """
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    return lax.bitcast_convert_type(bits ^ zero.astype(bits.dtype), x.dtype)


@hidden.defjvp
def _hidden_jvp(at: Any, along: Any) -> tuple[jax.Array, jax.Array]:
    (x, zero), (dx, _) = at, along
    return hidden(x, zero), hidden(dx, zero)


def rounded(array: jax.Array, dtype: Any) -> jax.Array:
    """Return an array in a type, rounded to it here and now.

    A conversion alone is no order to round: XLA may keep the digits (its excess precision) where
    the next operation converts back, and so in one program and not in another.
    """
    narrow, wide = jnp.finfo(dtype), jnp.finfo(array.dtype)
    if narrow.nmant < wide.nmant:
        array = lax.reduce_precision(array, narrow.nexp, narrow.nmant)
    return array.astype(dtype)


def product(formula: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Multiply two matrices, a in the type of b, sums in `dtype`.

    A copy of `a` in another type is made when b is there, and no sooner: else all copies are made
    first thing in the program. Where the contracted dim comes first in `a` the CPU compiler has a
    slow product, so there the transpose is written out: 5 to 20 % faster in float32, several times
    in bfloat16 where the processor has matrix units.

    Args:
        formula: subscripts of an einsum, for example "ab,ac->bc".
        a: a matrix.
        b: a matrix.
        dtype: of the sums, and so of the result; that of b if None.
    """
    left, rest = formula.split(",")
    transposed = on_cpu() and left[0] in rest.split("->")[0] and left[0] not in rest.split("->")[1]
    if transposed or a.dtype != b.dtype:
        a = after(a, b).astype(b.dtype)
    if transposed:
        a, formula = _written_transpose(a), f"{left[::-1]},{rest}"
    return dot(formula, a, b, dtype)


def dot(formula: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Multiply as jnp.einsum does, which takes three times as long to trace."""
    (left, right), result = formula.split("->")[0].split(","), formula.split("->")[1]
    (summed,) = set(left) & set(right)
    assert result == (left + right).replace(summed, "")
    contracted = (left.index(summed),), (right.index(summed),)
    return lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=dtype)


def _written_transpose(a: jax.Array) -> jax.Array:
    """Return a.T as an array of its own.

    XLA folds a transpose into the product that reads it, through a bitcast and through a barrier
    too. It does not fold a transpose of three dims of another type.
    """
    rows, columns = a.shape
    factor = next((n for n in (8, 4, 2, 3, 5, 7) if columns % n == 0 and columns > n), None)
    if factor is None:
        return a.T
    parts = a.reshape(rows, factor, columns // factor)
    return _reversed_bits(parts).reshape(columns, rows)


def on_bits(move: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return move(x), which only moves elements, done to integers of the same bits.

    To JAX an integer has no derivative: a tangent would become 0, without a word. What moves
    elements moves tangents alike.
    """

    @jax.custom_jvp
    def moved(x: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return lax.bitcast_convert_type(move(bits), x.dtype)

    moved.defjvp(lambda x, dx: (moved(*x), moved(*dx)))
    return moved(x)


@jax.jit  # Traced once for all layers of a shape: a derivative of one's own takes 1 ms to trace.
def _reversed_bits(parts: jax.Array) -> jax.Array:
    return on_bits(lambda bits: bits.transpose(1, 2, 0), parts)
