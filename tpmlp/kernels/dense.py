"""One dense layer, z = W h + b, forward and backward, on one device's blocks.

    W : O/g I/s      b : O/g/s      h : I/s/g B/d      z, g : O/g/s B/d

The layer gathers its input over axis g and scatters its output over axis s. Which mesh axes these
are is the caller's choice, so one kernel is every published scheme: s of size 1 is
output-sharded ("column"), g of size 1 input-sharded ("row"), the two in turn a Megatron pair, both
larger than 1 the 2D layout. Whatever the roles, h, z and g are split into d/M features a device
at both ends of the layer.
"""

import jax

from tpmlp.collectives import all_gather, all_reduce, einsum, reduce_scatter


def forward(W: jax.Array, b: jax.Array | None, h: jax.Array, /, **axes: str) -> jax.Array:
    """Compute z = W h + b.

    The gather gives this device the features its columns of W meet; the reduce-scatter adds the
    partial products and leaves d/M of the sum. The bias is added after the sum, by the one device
    that holds the row: added before, it would count once for each device of s.

    Cost per device (B, I, O global; data, g, s the sizes of the axes; b = B / data):
        compute        2 b I O / (g s) FLOPs
        communication  b (I/s) (g-1)/g words received over g, b (O/g) (s-1)/s over s
        memory         none kept; b I/s for the gathered input while the product runs

    Args:
        W: "O/g I/s".
        b: "O/g/s", or None for a layer without bias.
        h: "I/s/g B/d".
        **axes: mesh axis of the roles g, s and d.

    Returns:
        z: "O/g/s B/d".
    """
    h = all_gather("I/s/g B/d -> I/s B/d", h, **axes)
    z = einsum("O/g I/s, I/s B/d -> O/g B/d +s", W, h, **axes)
    z = reduce_scatter("O/g B/d +s -> O/g/s B/d", z, **axes)
    return z if b is None else z + b[:, None]


def backward(
    W: jax.Array, h: jax.Array, g: jax.Array, /, **axes: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute dW = g h^T, db = sum_B g and dh = W^T g: `forward`, transposed, line by line.

    A gather becomes a reduce-scatter over the same axis and the other way round. h is gathered a
    second time rather than kept: keeping it would cost b I/s elements a layer, and the network
    one collective less. dW and db are sums over the batch, so each is all-reduced over d once.

    Cost per device (as in forward; D = data):
        compute        4 b I O / (g s) FLOPs; 2 b I O / (g s) where dh is not used
        communication  b (O/g) (s-1)/s words received over s; 2 b (I/s) (g-1)/g over g, half of it
                       where dh is not used; 2 (I O / (g s) + O / (g s)) (D-1)/D over d
        memory         none kept; b O/g and b I/s for the gathered operands while products run

    Args:
        W: "O/g I/s".
        h: "I/s/g B/d", the layer's input.
        g: "O/g/s B/d", d loss / d z.
        **axes: mesh axis of the roles g, s and d.

    Returns:
        dW: "O/g I/s".
        db: "O/g/s".
        dh: "I/s/g B/d", d loss / d h. What the caller does not use is not computed: the compiler
            drops it, its collective included.
    """
    db = einsum("O/g/s B/d -> O/g/s +d", g, **axes)
    db = all_reduce("O/g/s +d -> O/g/s", db, **axes)
    g = all_gather("O/g/s B/d -> O/g B/d", g, **axes)
    h = all_gather("I/s/g B/d -> I/s B/d", h, **axes)
    dW = einsum("O/g B/d, I/s B/d -> O/g I/s +d", g, h, **axes)
    dW = all_reduce("O/g I/s +d -> O/g I/s", dW, **axes)
    dh = einsum("O/g I/s, O/g B/d -> I/s B/d +g", W, g, **axes)
    dh = reduce_scatter("I/s B/d +g -> I/s/g B/d", dh, **axes)
    return dW, db, dh
