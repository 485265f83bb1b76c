"""Vertices that need all features of what they read: concatenations, slices, users' functions.

Features move: they are gathered from all devices, and each takes the block of the result that is
its own. Backward, the gradient is.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.collectives import all_gather, block_index, turn
from tpmlp.graph.placement import Node
from tpmlp.graph.rules.rule import Given, Gradients, Params, Reader, Rule, clear
from tpmlp.graph.shape import Shape
from tpmlp.layout import padded

Inputs = tuple[jax.Array, ...]


def turned(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Bring an array into the other orientation."""
    return turn("F/s/g B/d -> F/g/s B/d", inputs[0], **node.axes), None


def turned_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Bring g back."""
    return Gradients((turn("F/g/s B/d -> F/s/g B/d", g, **node.axes),), {})


def concatenate(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Take this device's block of all features, one input's after another."""
    pairs = zip(inputs, node.input_shapes, strict=True)
    return own(node, jnp.concatenate([whole(node, h, shape) for h, shape in pairs])), None


def concatenate_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Take this device's block of each input's features of g."""
    g, grads, first = whole(node, g, node.shape), [], 0
    for shape in node.input_shapes:
        grads.append(own(node, g[first : first + shape.features]))
        first += shape.features
    return Gradients(tuple(grads), {})


def cut(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Take this device's block of features start .. stop - 1."""
    (h,) = inputs
    return own(node, whole(node, h, node.input_shapes[0])[node.kind.start : node.kind.stop]), None


def cut_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Put g at features start .. stop - 1 of zeros."""
    before, after = node.kind.start, node.input_shapes[0].features - node.kind.stop
    filled = jnp.pad(whole(node, g, node.shape), ((before, after), (0, 0)))
    return Gradients((own(node, filled),), {})


def function(node: Node, params: Params, inputs: Inputs, given: Given) -> tuple[jax.Array, Any]:
    """Compute a user's function, of all features or of this device's."""
    if node.kind.of == "local":
        return clear(_columns(node.kind.function(*_rows(node, inputs))), node), None
    return own(node, _columns(node.kind.function(*_rows(node, _wholes(node, inputs))))), None


def function_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Compute what jax.vjp makes of the function."""
    inputs = tuple(read(i) for i in range(len(node.inputs)))
    local = node.kind.of == "local"
    arrays = _rows(node, inputs if local else _wholes(node, inputs))
    out, transposed = jax.vjp(node.kind.function, *arrays)
    g = g if local else whole(node, g, node.shape)
    grads = map(_columns, transposed(_as_rows(g, node.shape).astype(out.dtype)))
    if local:
        return Gradients(tuple(clear(grad, node) for grad in grads), {})
    return Gradients(tuple(own(node, grad) for grad in grads), {})


def whole(node: Node, array: jax.Array, shape: Shape) -> jax.Array:
    """Return all features of an array "F/s/g B/d", padding cut off: "F B/d"."""
    return all_gather("F/s/g B/d -> F B/d", array, **node.axes)[: shape.features]


def own(node: Node, array: jax.Array) -> jax.Array:
    """Return this device's block of features "F B/d", padded: "F/s/g B/d"."""
    rows = padded(array.shape[0], node.num_blocks)
    array = jnp.pad(array, ((0, rows - array.shape[0]), (0, 0)))
    size = rows // node.num_tensor_devices
    index = block_index("F/s/g", **node.axes)
    return jax.lax.dynamic_slice_in_dim(array, index * size, size)


def _wholes(node: Node, inputs: Inputs) -> Inputs:
    pairs = zip(inputs, node.input_shapes, strict=True)
    return tuple(whole(node, h, shape) for h, shape in pairs)


def _rows(node: Node, inputs: Inputs) -> list[jax.Array]:
    """Return arrays as users have them, samples first."""
    return [_as_rows(h, shape) for h, shape in zip(inputs, node.input_shapes, strict=True)]


def _as_rows(h: jax.Array, shape: Shape) -> jax.Array:
    return h.T if shape.tokens is None else h.T.reshape(-1, shape.tokens, h.shape[0])


def _columns(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, rows.shape[-1]).T


TURN = Rule(turned, turned_backward)
CONCATENATE = Rule(concatenate, concatenate_backward)
SLICE = Rule(cut, cut_backward)
FUNCTION = Rule(function, function_backward, reads=None)
