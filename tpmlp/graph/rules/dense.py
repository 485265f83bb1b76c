"""Dense vertices and what they share: the kernel of tpmlp.kernels.dense, its gather apart."""

from typing import Any

import jax

from tpmlp.graph.placement import Node
from tpmlp.graph.rules.rule import Given, Gradients, Params, Reader, Rule
from tpmlp.kernels import dense


def gather(
    node: Node, params: Params, inputs: tuple[jax.Array, ...], given: Given
) -> tuple[jax.Array, Any]:
    """Make h whole over g: "I/s/g B/d" -> "I/s B/d", for all dense vertices that read it."""
    (h,) = inputs
    return dense.gather_input(given.run.to_compute(h), given.run, **node.axes), None


def gather_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Sum the parts of dh "I/s B/d +g", those of all dense vertices at once, where h is."""
    return Gradients((dense.scatter_input_gradient(g, given.run, **node.axes),), {})


def forward(
    node: Node, params: Params, inputs: tuple[jax.Array, ...], given: Given
) -> tuple[jax.Array, Any]:
    """Compute z = W h + b from h "I/s B/d", gathered."""
    (h,) = inputs
    h = given.run.to_compute(h)
    return dense.forward(params["W"], params.get("b"), h, given.run, **node.axes), None


def backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Compute dh = W^T g, db = sum of g, and later dW = g h^T.

    dh first, and h is gathered when dh is where h was: only one of the large arrays need be there
    at a time.
    """
    run, axes = given.run, node.axes
    g_all = dense.gather_gradient(run.to_compute(g), run, **axes)
    dh = dense.backward_product(params["W"], g_all, run, **axes)
    db = {"b": dense.backward_bias(g, **axes)} if "b" in params else {}

    def later(ready: jax.Array) -> Params:
        h = run.to_compute(read(0, ready))
        return {"W": dense.backward_weight(g_all, h, run, **axes)}

    return Gradients((dh,), db, later)


GATHER = Rule(gather, gather_backward)
DENSE = Rule(forward, backward, reads=(0,))
