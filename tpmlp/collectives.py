"""Collectives and products by signature: the one place where lax's collectives are called.

    h = all_gather("I/s/g B/d -> I/s B/d", h, **axes)

Every call is checked while it is traced: the signature against the rules of its operation
(tpmlp.layout), the operand's rank against its layout, and the axes of its layout against the
axes on which JAX knows the value to differ (shard_map's check_vma). So a layout that forgets an
axis, or claims one, is refused before anything runs. The keywords bind roles to mesh axes:
`axes = {"g": "x", "s": "y", "d": "data"}`.

A collective over an axis of size 1 is nothing, and nothing is what is emitted.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp import xla
from tpmlp.layout import (
    Layout,
    Signature,
    einsum_formula,
    gathered,
    parse_layout,
    parse_signature,
    reduced,
    scattered,
    turned,
)

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_in_tree",
    "all_reduce_max",
    "block_index",
    "einsum",
    "per_stage",
    "reduce_scatter",
    "reduce_scatter_in_tree",
    "shift",
    "stage_index",
    "transpose",
    "tree_sum",
    "turn",
    "turn_in_group",
    "vary_like",
    "zeros",
    "zeros_of",
]


def all_gather(signature: str, x: jax.Array, **axes: str) -> jax.Array:
    """Join the blocks of one dim, so that every device of the axis holds all of them.

    As a function on the list of blocks along the axis: out[i] = concatenate(blocks).

    Args:
        signature: for example "I/s/g B/d -> I/s B/d".
        x: the local block.
        **axes: mesh axis of each role.

    Raises:
        LayoutError: the signature is no all-gather, or does not describe x.
    """
    parsed = parse_signature(signature)
    dim, roles = gathered(parsed)
    _check_operand(parsed, parsed.operands[0], x, axes)
    names = _live(roles, axes)
    if not names:
        return x
    # "invarying" makes the result provably equal on all devices of the axis, which later
    # signatures rely on; the plain all_gather leaves the value marked as device-dependent.
    return _moved(lambda x: lax.all_gather(x, names, axis=dim, tiled=True, to="invarying"), x)


def reduce_scatter(signature: str, x: jax.Array, **axes: str) -> jax.Array:
    """Sum over an axis and leave each device one block of one dim.

    As a function on the list of blocks along the axis: out[i] = split(sum(blocks))[i].

    Args:
        signature: for example "O/g B/d +s -> O/g/s B/d".
        x: the local partial sum.
        **axes: mesh axis of each role.

    Raises:
        LayoutError: the signature is no reduce-scatter, does not describe x, or the axis does not
            divide the dim.
    """
    dim, names = _scattered_dim(signature, x, axes)
    return lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True) if names else x


def reduce_scatter_in_tree(signature: str, x: jax.Array, **axes: str) -> jax.Array:
    """Compute what `reduce_scatter` does, adding blocks in the order of `tree_sum`.

    They move by an all-to-all, as many words, and are added by the device that keeps the sum.
    """
    dim, names = _scattered_dim(signature, x, axes)
    if not names:
        return x
    parts = x.reshape(*x.shape[:dim], _size(names), -1, *x.shape[dim + 1 :])
    return tree_sum(lax.all_to_all(parts, names, dim, dim, tiled=True), axis=dim)


def all_reduce(signature: str, x: jax.Array, **axes: str) -> jax.Array:
    """Sum over axes, so that every device holds the sum.

    As a function on the list of blocks along the axis: out[i] = sum(blocks).

    Args:
        signature: for example "O/g I/s +d -> O/g I/s".
        x: the local partial sum.
        **axes: mesh axis of each role.

    Raises:
        LayoutError: the signature is no all-reduce, or does not describe x.
    """
    names = _reduced_axes(signature, x, axes)
    return lax.psum(x, names) if names else x


def all_reduce_in_tree(signature: str, x: jax.Array, **axes: str) -> jax.Array:
    """Compute what `all_reduce` does, adding blocks in the order of `tree_sum`.

    Every device gathers them all, p / 2 times the words: let them be few.
    """
    names = _reduced_axes(signature, x, axes)
    if not names:
        return x
    return tree_sum(lax.all_gather(x[None], names, axis=0, tiled=True, to="invarying"), axis=0)


def tree_sum(x: jax.Array, axis: int) -> jax.Array:
    """Sum over a dim, whose size is a power of two: pairs of neighbours first, then of pairs.

    Every addition is one that the compiler can neither reorder nor join to a product.
    """
    while (size := x.shape[axis]) > 1:
        pairs = x.reshape(*x.shape[:axis], size // 2, 2, *x.shape[axis + 1 :])
        x = lax.index_in_dim(pairs, 0, axis + 1, keepdims=False) + lax.index_in_dim(
            pairs, 1, axis + 1, keepdims=False
        )
    return lax.squeeze(x, (axis,))


def all_reduce_max(signature: str, x: jax.Array, **axes: str) -> jax.Array:
    """Take the maximum over axes; as `all_reduce`, with +d read as a partial maximum over d.

    It has no derivative: where the maximum is a shift that cancels, as a softmax's is, hand it
    over through lax.stop_gradient.
    """
    names = _reduced_axes(signature, x, axes)
    return lax.pmax(x, names) if names else x


def shift(layout: str, x: jax.Array, role: str, by: int, **axes: str) -> jax.Array:
    """Receive the block of the device `by` places further along an axis, round the ring.

    As a function on the list of blocks along the axis: out[i] = blocks[(i + by) % p].

    Args:
        layout: of x, before and after, for example "I/s/g B/d".
        x: the local block.
        role: the axis to go along.
        by: places, positive or negative.
        **axes: mesh axis of each role.

    Raises:
        LayoutError: the layout does not describe x.
    """
    _check_operand(parse_signature(f"{layout} -> {layout}"), parse_layout(layout), x, axes)
    return _permuted(x, (), (axes[role], by))


def turn(
    signature: str, x: jax.Array, along: tuple[str, int] | None = None, /, **axes: str
) -> jax.Array:
    """Exchange the order of the two axes that split a dim.

    Every device sends its block to the one whose it is in the other order, and gets one.

    Args:
        signature: for example "F/s/g B/d -> F/g/s B/d".
        x: the local block.
        along: a role and by how many places: the block comes from there, as `shift` has it.
        **axes: mesh axis of each role.

    Raises:
        LayoutError: the signature does no such thing, or does not describe x.
    """
    shifts = None if along is None else (axes[along[0]], along[1])
    return _permuted(x, _turned_names(signature, x, axes), shifts)


def turn_in_group(signature: str, x: jax.Array, **axes: str) -> jax.Array:
    """Do `turn` by an all-gather, of which each device keeps its block; M times the words.

    A permutation is one meeting of all devices of a program: where stages are at different tasks,
    those of one stage can only gather or sum.
    """
    names = _turned_names(signature, x, axes)
    if not names:
        return x
    whole = _moved(lambda x: lax.all_gather(x, names, axis=0, tiled=True, to="invarying"), x)
    major, minor = (lax.axis_index(name) for name in names[::-1])
    first = (major * xla.axis_size(names[0]) + minor) * x.shape[0]
    return lax.dynamic_slice_in_dim(whole, first, x.shape[0], 0)


def _turned_names(signature: str, x: jax.Array, axes: dict[str, str]) -> tuple[str, ...]:
    """Return the mesh axes that a turn exchanges, major first; none where one has size 1."""
    parsed = parse_signature(signature)
    roles = turned(parsed)
    _check_operand(parsed, parsed.operands[0], x, axes)
    names = _live(roles, axes)
    return names if len(names) == 2 else ()


def _permuted(x: jax.Array, turns: tuple[str, ...], shifts: tuple[str, int] | None) -> jax.Array:
    """Move blocks to where they are when two axes are exchanged and one is gone along.

    Args:
        x: the local block.
        turns: major and minor axis of a dim, or none.
        shifts: an axis, and how many places along it a block comes from; or None.
    """
    along = () if shifts is None else shifts[:1]
    # JAX wants the axes in the mesh's order, and counts devices in it.
    names = tuple(sorted((*turns, *along), key=xla.axis_number))
    if not names:
        return x
    sizes = {name: xla.axis_size(name) for name in names}

    def number(place: dict[str, int]) -> int:
        count = 0
        for name in names:
            count = count * sizes[name] + place[name]
        return count

    def source(place: dict[str, int]) -> dict[str, int]:
        place = dict(place)
        if shifts is not None:
            name, by = shifts
            place[name] = (place[name] + by) % sizes[name]
        if turns:
            major, minor = turns
            # After, device (i, j) holds block j * majors + i, which device divmod(.., minors) has.
            block = place[minor] * sizes[major] + place[major]
            place[major], place[minor] = divmod(block, sizes[minor])
        return place

    places = [
        dict(zip(names, at, strict=True)) for at in product(*(range(sizes[name]) for name in names))
    ]
    pairs = [(number(source(place)), number(place)) for place in places]
    return _moved(lambda x: lax.ppermute(x, names, pairs), x)


def einsum(
    signature: str,
    *operands: jax.Array,
    dtype: Any = None,
    product: Any = xla.product,
    **axes: str,
) -> jax.Array:
    """Multiply and sum local blocks; what is summed over a split dim is a partial sum.

    No communication: a contraction over "I/s" must leave "+s" in the result.

    Args:
        signature: for example "O/g I/s, I/s B/d -> O/g B/d +s".
        *operands: the local blocks; the first of two is converted to the type of the second.
        dtype: of the sums, and so of the result; that of the operands by default.
        product: what multiplies two operands: (formula, a, b, dtype) -> result.
        **axes: mesh axis of each role.

    Raises:
        LayoutError: the signature is not honest, or does not describe the operands.
    """
    formula = einsum_formula(signature)
    parsed = parse_signature(signature)
    if len(operands) != len(parsed.operands):
        raise parsed.refuse(f"names {len(parsed.operands)} operands: got {len(operands)}.")
    for layout, x in zip(parsed.operands, operands, strict=True):
        _check_operand(parsed, layout, x, axes)
    if len(operands) == 2:
        return product(formula, *operands, dtype)
    return jnp.einsum(formula, *operands, preferred_element_type=dtype)


def transpose(signature: str, x: jax.Array, **axes: str) -> jax.Array:
    """Exchange the two dims of a local block.

    Args:
        signature: for example "B/d I/s/g -> I/s/g B/d".
        x: the local block.
        **axes: mesh axis of each role.

    Raises:
        LayoutError: the signature is no transpose, or does not describe x.
    """
    parsed = parse_signature(signature)
    _check_operand(parsed, parsed.operands[0], x, axes)
    if parsed.operands[0].dims != parsed.result.dims[::-1]:
        raise parsed.refuse("is no transpose. Write the same two dims the other way round.")
    return x.T


def zeros(layout: str, shape: tuple[int, ...], dtype: Any, **axes: str) -> jax.Array:
    """Return zeros that may come to differ over every axis of a layout, as a loop's start must."""
    names = _live(tuple(sorted(parse_layout(layout).axes)), axes)
    return (
        lax.pcast(jnp.zeros(shape, dtype), names, to="varying")
        if names
        else jnp.zeros(shape, dtype)
    )


def zeros_of(shapes: Any) -> Any:
    """Return zeros like traced values, from what jax.eval_shape says of them."""

    def make(of: Any) -> jax.Array:
        names = tuple(sorted(of.manual_axis_type.varying))
        made = jnp.zeros(of.shape, of.dtype)
        return lax.pcast(made, names, to="varying") if names else made

    return jax.tree.map(make, shapes)


def vary_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Return x as an array that may come to differ over the axes over which another does."""
    names = tuple(sorted(xla.differs_over(other) - xla.differs_over(x)))
    return lax.pcast(x, names, to="varying") if names else x


def per_stage(tree: Any) -> Any:
    """Return arrays that may come to differ from stage to stage."""

    def differ(x: jax.Array) -> jax.Array:
        varies = xla.axis_size("stage") == 1 or "stage" in xla.differs_over(x)
        return x if varies else lax.pcast(x, ("stage",), to="varying")

    return jax.tree.map(differ, tree)


def stage_index() -> jax.Array:
    """Return the index of this device's stage."""
    return lax.axis_index("stage")


def block_index(dim: str, **axes: str) -> jax.Array | int:
    """Return the index of this device's block of a dim, for example of "O/g/s".

    Counted major axis first; an int 0 where the dim is not split.
    """
    (parsed,) = parse_layout(dim).dims
    index: jax.Array | int = 0
    for name in _live(parsed.axes, axes):
        index = index * xla.axis_size(name) + lax.axis_index(name)
    return index


def _moved(move: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return move(x), as bits where XLA's CPU collectives would widen bfloat16 to float32."""
    as_bits = x.dtype == jnp.bfloat16 and xla.on_cpu()
    return xla.on_bits(move, x) if as_bits else move(x)


def _scattered_dim(
    signature: str, x: jax.Array, axes: dict[str, str]
) -> tuple[int, tuple[str, ...]]:
    parsed = parse_signature(signature)
    dim, roles = scattered(parsed)
    _check_operand(parsed, parsed.operands[0], x, axes)
    names = _live(roles, axes)
    if x.shape[dim] % _size(names):
        raise parsed.refuse(
            f"splits dim {parsed.result.dims[dim].name} of local size {x.shape[dim]} over "
            f"{_size(names)} devices. Pad it to a multiple."
        )
    return dim, names


def _reduced_axes(signature: str, x: jax.Array, axes: dict[str, str]) -> tuple[str, ...]:
    parsed = parse_signature(signature)
    roles = reduced(parsed)
    _check_operand(parsed, parsed.operands[0], x, axes)
    return _live(roles, axes)


def _live(roles: tuple[str, ...], axes: dict[str, str]) -> tuple[str, ...]:
    return tuple(axes[role] for role in roles if xla.axis_size(axes[role]) > 1)


def _size(names: tuple[str, ...]) -> int:
    size = 1
    for name in names:
        size *= xla.axis_size(name)
    return size


def _check_operand(signature: Signature, layout: Layout, x: jax.Array, axes: dict[str, str]):
    if x.ndim != len(layout.dims):
        raise signature.refuse(f'calls an array of shape {x.shape} "{layout}": ranks differ.')
    if unbound := layout.axes.union(signature.result.axes) - axes.keys():
        raise signature.refuse(f"uses axes {sorted(unbound)} that are not bound: got {axes}.")
    claimed = set(_live(tuple(layout.axes), axes))
    varying = {n for n in jax.typeof(x).manual_axis_type.varying if xla.axis_size(n) > 1}
    # A layout that does not name the stages tells where an array of one stage lives.
    varying -= {"stage"} - claimed
    if claimed != varying:
        raise signature.refuse(
            f'calls an array "{layout}", which differs over mesh axes {sorted(claimed)}: the array '
            f"differs over {sorted(varying)}. Name each such axis, split or +partial, and no more."
        )
