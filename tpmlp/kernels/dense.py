"""One dense layer, z = W h + b, forward and backward, on one device's blocks.

    W : O/g I/s      b : O/g/s      h : I/s/g B/d      z, g : O/g/s B/d

The layer gathers its input over axis g and scatters its output over axis s. Which mesh axes these
are is the caller's choice, so one kernel is every published scheme: s of size 1 is
output-sharded ("column"), g of size 1 input-sharded ("row"), the two in turn a Megatron pair, both
larger than 1 the 2D layout. Whatever the roles, h, z and g are split into d/M features a device
at both ends of the layer.

The gathers are functions of their own, so that the network can say when they happen and what is
kept. tpmlp.kernels.ring has the same five functions with collectives cut into hops.
"""

import jax

from tpmlp.collectives import all_gather, all_reduce, einsum, reduce_scatter
from tpmlp.kernels.execution import Execution


def gather_input(h: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Give this device the features that its columns of W meet.

    Cost per device (B, I, O global; data, g, s the sizes of the axes; b = B / data):
        communication  b (I/s) (g-1)/g words received over g
        memory         b I/s

    Args:
        h: "I/s/g B/d", in the compute type.
        run: types and choices.
        **axes: mesh axis of the roles g, s and d.

    Returns:
        h: "I/s B/d".
    """
    return all_gather("I/s/g B/d -> I/s B/d", h, **axes)


def forward(
    W: jax.Array, b: jax.Array | None, h: jax.Array, run: Execution, /, **axes: str
) -> jax.Array:
    """Compute z = W h + b.

    The reduce-scatter adds the partial products and leaves d/M of the sum. The bias is added after
    the sum, by the one device that holds the row: added before, it would count once for each
    device of s.

    Cost per device (as in gather_input):
        compute        2 b I O / (g s) FLOPs
        communication  b (O/g) (s-1)/s words over s
        memory         none kept

    Args:
        W: "O/g I/s".
        b: "O/g/s", or None for a layer without bias.
        h: "I/s B/d", gathered.
        run: types and choices.
        **axes: mesh axis of the roles g, s and d.

    Returns:
        z: "O/g/s B/d", in the total type.
    """
    dtype = run.sum_dtype(axes["s"])
    z = einsum("O/g I/s, I/s B/d -> O/g B/d +s", W, h, dtype=dtype, **axes)
    z = reduce_scatter("O/g B/d +s -> O/g/s B/d", z, **axes).astype(run.total)
    return z if b is None else z + b[:, None]


def gather_gradient(g: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Give this device the rows of g that its rows of W meet: `forward`'s scatter, transposed.

    Cost per device (as in gather_input):
        communication  b (O/g) (s-1)/s words received over s
        memory         b O/g

    Args:
        g: "O/g/s B/d", in the compute type.
        run: types and choices.
        **axes: mesh axis of the roles g, s and d.

    Returns:
        g: "O/g B/d".
    """
    return all_gather("O/g/s B/d -> O/g B/d", g, **axes)


def backward_input(W: jax.Array, g: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Compute dh = W^T g: the product of `forward`, and `gather_input`, transposed.

    Cost per device (as in gather_input):
        compute        2 b I O / (g s) FLOPs
        communication  b (I/s) (g-1)/g words over g
        memory         none kept; on CPU a transposed copy of the block of W while the product runs

    Args:
        W: "O/g I/s".
        g: "O/g B/d", gathered.
        run: types and choices.
        **axes: mesh axis of the roles g, s and d.

    Returns:
        dh: "I/s/g B/d", d loss / d h, in the total type.
    """
    return scatter_input_gradient(backward_product(W, g, run, **axes), run, **axes)


def backward_product(W: jax.Array, g: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Compute W^T g, "I/s B/d +g" in the reduce type, from W "O/g I/s" and g "O/g B/d"."""
    dtype = run.sum_dtype(axes["g"])
    return einsum("O/g I/s, O/g B/d -> I/s B/d +g", W, g, dtype=dtype, **axes)


def scatter_input_gradient(dh: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Sum dh "I/s B/d +g" where h is, "I/s/g B/d" in the total type: `gather_input`, transposed."""
    return reduce_scatter("I/s B/d +g -> I/s/g B/d", dh, **axes).astype(run.total)


def backward_weight(g: jax.Array, h: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Compute dW = g h^T, a sum over this device's part of the batch.

    Cost per device (as in gather_input):
        compute        2 b I O / (g s) FLOPs
        communication  none
        memory         none kept

    Args:
        g: "O/g B/d", gathered.
        h: "I/s B/d", gathered.
        run: types and choices.
        **axes: mesh axis of the roles g, s and d.

    Returns:
        dW: "O/g I/s +d", in the total type.
    """
    return einsum("O/g B/d, I/s B/d -> O/g I/s +d", g, h, dtype=run.total, **axes)


def backward_bias(g: jax.Array, /, **axes: str) -> jax.Array:
    """Compute db = sum_B g, "O/g/s +d", from g "O/g/s B/d": every device has its own rows."""
    return einsum("O/g/s B/d -> O/g/s +d", g, **axes)


def gather_weights(W: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Return W as the layer multiplies it, "O/g I/s"; products convert it to their type.

    Cost per device (as in gather_input; D = data):
        communication  I O / (g s) (D-1)/D words received over d where data splits W, else none
        memory         I O / (g s) where data splits W or the types differ, while the layer runs

    Args:
        W: "O/g/d I/s" where the data axis splits parameters, else "O/g I/s".
        run: types and choices.
        **axes: mesh axis of the roles g, s and d.
    """
    if not run.splits_data:
        return W
    return all_gather("O/g/d I/s -> O/g I/s", W.astype(run.compute), **axes)


def gather_bias(b: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Return b as the layer adds it, "O/g/s" in the total type: `gather_weights` for a vector."""
    b = all_gather("O/g/s/d -> O/g/s", b, **axes) if run.splits_data else b
    return b.astype(run.total)


def reduce_weight(dW: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Sum dW over the batch's parts, where the parameters are: `gather_weights`, transposed.

    Cost per device (as in gather_weights):
        communication  2 I O / (g s) (D-1)/D words over d; half of it where data splits W

    Args:
        dW: "O/g I/s +d".
        run: types and choices.
        **axes: mesh axis of the roles g, s and d.

    Returns:
        dW: laid out as W.
    """
    dW = dW.astype(run.sum_dtype(axes["d"]))
    if run.splits_data:
        return reduce_scatter("O/g I/s +d -> O/g/d I/s", dW, **axes).astype(run.total)
    return all_reduce("O/g I/s +d -> O/g I/s", dW, **axes).astype(run.total)


def reduce_bias(db: jax.Array, run: Execution, /, **axes: str) -> jax.Array:
    """Sum db "O/g/s +d" over the batch's parts: `reduce_weight` for a vector."""
    db = db.astype(run.sum_dtype(axes["d"]))
    if run.splits_data:
        return reduce_scatter("O/g/s +d -> O/g/s/d", db, **axes).astype(run.total)
    return all_reduce("O/g/s +d -> O/g/s", db, **axes).astype(run.total)
