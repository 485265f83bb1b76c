"""Vertices that need all features of what they read: concatenations, slices, users' functions.

Features are gathered from all devices, once for all that read them (`whole`), and each device takes
the block of the result that is its own. Backward, each puts its block of g in its place among
zeros, and what comes out is summed where the features were: `whole`, transposed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.collectives import (
    all_gather,
    block_index,
    reduce_scatter,
    turn,
    turn_in_group,
    vary_like,
)
from tpmlp.graph.placement import Node
from tpmlp.graph.rules.rule import Given, Gradients, Params, Reader, Rule, clear
from tpmlp.graph.shape import Shape
from tpmlp.layout import padded
from tpmlp.xla import settled, unknown_zero

Inputs = tuple[jax.Array, ...]


def turned(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Bring an array into the other orientation."""
    return _move(given)("F/s/g B/d -> F/g/s B/d", inputs[0], **node.axes), None


def turned_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Bring g back."""
    return Gradients((_move(given)("F/g/s B/d -> F/s/g B/d", g, **node.axes),), {})


def _move(given: Given) -> Callable[..., jax.Array]:
    """Return what turns; where stages are at different tasks, not all devices can meet."""
    return turn if given.sizes["stage"] == 1 else turn_in_group


def whole(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Gather all features: "F/s/g B/d" -> "F B/d"."""
    (h,) = inputs
    return all_gather("F/s/g B/d -> F B/d", given.run.to_compute(h), **node.axes), None


def whole_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Sum the parts of g "F B/d +s+g", those of all readers at once, where the features are."""
    g = reduce_scatter("F B/d +s+g -> F/s/g B/d", g.astype(given.run.reduce), **node.axes)
    return Gradients((g.astype(given.run.total),), {})


def concatenate(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Take this device's block of all features, one input's after another."""
    return own(node, jnp.concatenate(_logical(node, inputs))), None


def concatenate_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Take each input's features of g; settled, or g stays until the last is added to others."""
    g, grads, first = placed(node, g), [], 0
    for shape in node.input_shapes:
        grads.append(settled(_padded(node, g[first : first + shape.features])))
        first += shape.features
    return Gradients(tuple(grads), {})


def cut(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Take this device's block of features start .. stop - 1."""
    return own(node, inputs[0][node.kind.start : node.kind.stop]), None


def cut_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Put g at features start .. stop - 1 of zeros."""
    before, after = node.kind.start, node.input_shapes[0].features - node.kind.stop
    filled = jnp.pad(placed(node, g), ((before, after), (0, 0)))
    return Gradients((_padded(node, filled),), {})


def function(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute a user's function, of all features or of this device's."""
    if node.kind.of == "local":
        return clear(_columns(node.kind.function(*_rows(node, inputs))), node), None
    arrays = _rows(node, tuple(_logical(node, inputs)))
    return own(node, _columns(node.kind.function(*arrays))), None


def function_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Compute what jax.vjp makes of the function."""
    inputs = tuple(read(i) for i in range(len(node.inputs)))
    if node.kind.of == "local":
        grads = _pulled_back(node, _rows(node, inputs), g)
        return Gradients(tuple(clear(grad, node) for grad in grads), {})
    # Each device takes its own block of g back: the function is linear in it.
    grads = _pulled_back(node, _rows(node, tuple(_logical(node, inputs))), placed(node, g))
    return Gradients(tuple(_padded(node, grad) for grad in grads), {})


def own(node: Node, array: jax.Array) -> jax.Array:
    """Return this device's block of features "F B/d", padded: "F/s/g B/d".

    Settled: else the compiler keeps all features for the backward pass, and takes the block there.
    """
    array = _padded(node, array)
    size = array.shape[0] // node.num_tensor_devices
    index = block_index("F/s/g", **node.axes)
    return settled(jax.lax.dynamic_slice_in_dim(array, index * size, size))


def placed(node: Node, block: jax.Array) -> jax.Array:
    """Return this device's block "F/s/g B/d" among zeros, padding cut off: "F B/d +s+g"."""
    size = block.shape[0]
    shape = (size * node.num_tensor_devices, *block.shape[1:])
    # Zeros that the compiler knew would be made at the start of the step, for all such vertices.
    zeros = jnp.full(shape, unknown_zero(block), block.dtype)
    index = block_index("F/s/g", **node.axes)
    whole = jax.lax.dynamic_update_slice_in_dim(zeros, block, index * size, axis=0)
    return whole[: node.width]


def _padded(node: Node, array: jax.Array) -> jax.Array:
    rows = padded(array.shape[0], node.num_blocks)
    return jnp.pad(array, ((0, rows - array.shape[0]), (0, 0)))


def _logical(node: Node, inputs: Inputs) -> list[jax.Array]:
    """Return whole inputs, padding cut off."""
    return [h[: shape.features] for h, shape in zip(inputs, node.input_shapes, strict=True)]


def _pulled_back(node: Node, arrays: list[jax.Array], g: jax.Array) -> list[jax.Array]:
    arrays = [vary_like(array, g) for array in arrays]
    out, transposed = jax.vjp(node.kind.function, *arrays)
    return [_columns(grad) for grad in transposed(_as_rows(g, node.shape).astype(out.dtype))]


def _rows(node: Node, inputs: Inputs) -> list[jax.Array]:
    """Return arrays as users have them, samples first."""
    return [_as_rows(h, shape) for h, shape in zip(inputs, node.input_shapes, strict=True)]


def _as_rows(h: jax.Array, shape: Shape) -> jax.Array:
    return h.T if shape.tokens is None else h.T.reshape(-1, shape.tokens, h.shape[0])


def _columns(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, rows.shape[-1]).T


TURN = Rule(turned, turned_backward)
WHOLE = Rule(whole, whole_backward)
CONCATENATE = Rule(concatenate, concatenate_backward)
SLICE = Rule(cut, cut_backward)
FUNCTION = Rule(function, function_backward, reads=None)
