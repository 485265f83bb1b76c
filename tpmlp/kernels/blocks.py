"""Blocks of one shape on every mesh: what makes the bits of a result independent of the mesh.

A product's last bits depend on the sizes of its operands, an elementwise function's on how the
compiler cut its loop into vectors and what it fused, a sum's on the order of its terms. So under
reduction="invariant" every dim that a mesh axis splits is cut into NUM_BLOCKS blocks, and features
between layers, which two axes split, into NUM_PIECES, on every mesh alike. A device has some of the
blocks and runs the same program on each of them, in a loop (`blockwise`). What is summed over
blocks is added pair by pair, neighbours first (collectives.tree_sum), on a device and then over
devices.

It rests on the compiler making one machine code of a loop's body, whatever stands around the loop,
and so holds for one jaxlib on one kind of processor. The suite compares the bits of whole training
runs on many meshes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp import xla
from tpmlp.collectives import einsum
from tpmlp.kernels.as_written import as_written, differs_over, sealed
from tpmlp.kernels.cost import NUM_BLOCKS
from tpmlp.layout import parse_signature

Axes = dict[str, str]


def blocks_of(*roles: str, axes: Axes) -> int:
    """Return how many blocks of a dim a device has, if the axes of these roles split it."""
    return NUM_BLOCKS ** max(1, len(roles)) // math.prod(xla.axis_size(axes[r]) for r in roles)


@dataclass(frozen=True, slots=True)
class Cut:
    """How an array is cut into blocks.

    Attributes:
        dims: a letter for each dim.
        counts: blocks of each dim that is cut; k counts over these, the last fastest. One that is
            no dim of this array cuts others, and the same block comes again.
    """

    dims: str
    counts: dict[str, int]

    def take(self, whole: jax.Array, k: jax.Array) -> jax.Array:
        """Return the k-th block."""
        shape = [n // self.counts.get(d, 1) for n, d in zip(whole.shape, self.dims, strict=True)]
        return lax.dynamic_slice(whole, self._starts(shape, k), shape)

    def put(self, block: jax.Array, whole: jax.Array, k: jax.Array) -> jax.Array:
        """Return the whole with its k-th block replaced."""
        return lax.dynamic_update_slice(whole, block, self._starts(block.shape, k))

    @property
    def is_whole(self) -> bool:
        """Whether no dim is cut."""
        return not set(self.dims) & set(self.counts)

    def whole_shape(self, block: Any) -> list[int]:
        """Return the shape of the array that has blocks of a shape."""
        return [n * self.counts.get(d, 1) for n, d in zip(block.shape, self.dims, strict=True)]

    def _starts(self, shape: Sequence[int], k: jax.Array) -> list[jax.Array]:
        k = lax.convert_element_type(k, jnp.int32)
        index: dict[str, jax.Array] = {}
        for letter, count in reversed(self.counts.items()):
            index[letter], k = lax.rem(k, jnp.int32(count)), lax.div(k, jnp.int32(count))
        zero = jnp.int32(0)
        return [index.get(d, zero) * jnp.int32(n) for n, d in zip(shape, self.dims, strict=True)]


def run_blocks(
    function: Callable[..., Sequence[jax.Array]],
    arrays: Sequence[jax.Array],
    cuts: Sequence[Cut],
    result_cuts: Sequence[Cut],
    num_blocks: int,
) -> list[jax.Array]:
    """Run a function on the k-th block of every array, for each k, and put its results together.

    Args:
        function: of blocks; returns as many as there are results.
        arrays: the operands.
        cuts: how each is cut.
        result_cuts: how each result is.
        num_blocks: how many k there are.
    """
    arrays, cuts = [*arrays, xla.unknown_zero(_most_equal(arrays))], [*cuts, Cut("", {})]
    pairs = [_repeated(*pair, num_blocks) for pair in zip(arrays, cuts, strict=True)]

    def run(k: jax.Array) -> Sequence[jax.Array]:
        *blocks, zero = (
            cut.take(repeated, k).reshape(array.shape) if whole.is_whole else cut.take(repeated, k)
            for (repeated, cut), array, whole in zip(pairs, arrays, cuts, strict=True)
        )
        if num_blocks == 1:
            # What is computed from these alone XLA takes out of the loop, and joins to others.
            blocks = [sealed(block, zero) for block in blocks]
        return as_written(function, zero)(*blocks)

    def step(k: jax.Array, wholes: list[jax.Array]) -> list[jax.Array]:
        triples = zip(run(k), wholes, result_cuts, strict=True)
        return [cut.put(block, whole, k) for block, whole, cut in triples]

    blocks = jax.eval_shape(run, jax.ShapeDtypeStruct((), jnp.int32))
    wholes = [
        _blank(cut.whole_shape(block), block)
        for block, cut in zip(blocks, result_cuts, strict=True)
    ]
    # XLA opens a loop that it sees to run once, and fuses its body with what is around.
    stop = num_blocks if num_blocks > 1 else xla.unknown_zero(arrays[0]) + 1
    return lax.fori_loop(jnp.int32(0), stop, step, wholes)


def _most_equal(arrays: Sequence[jax.Array]) -> jax.Array:
    """Return the array of floats that differs over the fewest mesh axes."""
    floats = [array for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]
    return min(floats, key=lambda array: len(differs_over(jax.typeof(array))))


def _repeated(array: jax.Array, cut: Cut, num_blocks: int) -> tuple[jax.Array, Cut]:
    """Return a whole operand once for each block, so that it is no constant of the loop.

    What is computed from constants alone XLA takes out of some loops, and then computes otherwise:
    a division by a number becomes a product with its inverse.
    """
    if not cut.is_whole:
        return array, cut
    # One would be seen to be the same at every k.
    count = max(2, num_blocks)
    return jnp.broadcast_to(array, (count, *array.shape)), Cut("#" + cut.dims, {"#": count})


def blockwise(
    formula: str, counts: dict[str, int], function: Callable[..., Any], *arrays: jax.Array
) -> Any:
    """Run a function on block after block of arrays that are cut along the same dims.

    Args:
        formula: a letter for each dim of each operand and result: "oi,ib->ob".
        counts: blocks of each dim that is cut; the function gets the others whole. Every result has
            all of them.
        function: of blocks; returns a block, or a tuple of blocks where there are more results.
        *arrays: the operands.

    Examples:
        >>> x = jnp.arange(8, dtype=jnp.float32).reshape(2, 4)
        >>> blockwise("ij->ij", {"j": 2}, lambda block: block.sum(axis=1, keepdims=True), x)
        Array([[ 1.,  5.],
               [ 9., 13.]], dtype=float32)
    """
    operands, results = ([Cut(d, counts) for d in side.split(",")] for side in formula.split("->"))
    if len(results) > 1:
        return run_blocks(function, arrays, operands, results, math.prod(counts.values()))
    (result,) = run_blocks(
        lambda *blocks: (function(*blocks),), arrays, operands, results, math.prod(counts.values())
    )
    return result


def parameter_cuts(axes: Axes) -> tuple[Cut, Cut]:
    """Return how a device's W "O/g I/s" and b "O/g/s" are cut, into as many blocks."""
    grid = {"o": blocks_of("g", axes=axes), "i": blocks_of("s", axes=axes)}
    return Cut("oi", grid), Cut("o", {"o": blocks_of("g", "s", axes=axes)})


def elementwise(function: Callable[..., Any], *arrays: jax.Array, axes: Axes) -> jax.Array:
    """Apply an elementwise function to arrays "O/g/s B/d"."""
    counts = {"o": blocks_of("g", "s", axes=axes), "b": blocks_of("d", axes=axes)}
    return blockwise(",".join(["ob"] * len(arrays)) + "->ob", counts, function, *arrays)


def multiply(signature: str, a: jax.Array, b: jax.Array, *, dtype: Any, axes: Axes) -> jax.Array:
    """Multiply as collectives.einsum does: products of blocks, added in trees."""
    dims = {dim.name: dim for layout in parse_signature(signature).operands for dim in layout.dims}
    counts = [blocks_of(*dim.axes, axes=axes) for dim in dims.values()]

    def product(formula: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        return _product(formula, dict(zip("abc", counts, strict=True)), a, b, dtype)

    return einsum(signature, a, b, dtype=dtype, product=product, **axes)


def _product(
    formula: str, counts: dict[str, int], a: jax.Array, b: jax.Array, dtype: Any
) -> jax.Array:
    left, right = formula.split("->")[0].split(",")
    (summed,) = set(left) & set(right)

    def partial_products(a: jax.Array, b: jax.Array) -> jax.Array:
        parts = [
            jnp.split(x, counts[summed], dims.index(summed)) for x, dims in ((a, left), (b, right))
        ]
        products = [xla.dot(formula, a, b, dtype) for a, b in zip(*parts, strict=True)]
        while len(products) > 1:
            products = [a + b for a, b in zip(products[::2], products[1::2], strict=True)]
        return products[0]

    kept = {letter: count for letter, count in counts.items() if letter != summed}
    return blockwise(formula, kept, partial_products, xla.rounded(a, b.dtype), b)


def _blank(shape: Sequence[int], block: Any) -> jax.Array:
    """Return zeros that differ over the mesh axes that a block differs over."""
    axes = tuple(sorted(differs_over(block)))
    zeros = jnp.zeros(shape, block.dtype)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros
