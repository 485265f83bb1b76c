"""One dense layer with its collectives cut into hops, each with a part of the product beside it.

An all-gather of p blocks is p - 1 hops round a ring; a product with the gathered array is a sum of
p products with one block each. Written so, the product with the block that is here needs nothing
of the hop that brings the next, and the two can overlap. A reduce-scatter is the same in reverse:
an accumulator travels round the ring and each device adds its part to it.

    gather_input   h_0, h_1, .. h_{p-1}           h_j from the device j places further along g
    forward        z_k = sum_j W[k, j] h_j        W[k, j]: rows of block k over s, columns of block
                                                  j over g; z_k travels to its device along s

A hop and the product beside it are held to begin together (tpmlp.xla.hold): left to itself XLA
on GPUs runs all hops of a gather first, and joins the products of a scatter into one (tpmlp.audit
shows what overlaps). The functions are those of tpmlp.kernels.dense and equal to them up to the
order of sums. Blocks of a ring belong to neighbours, which the notation of tpmlp.layout has no name
for: layouts are in the comments here.

References: Wang et al. 2023, Overlap communication with dependent computation via decomposition
in large deep learning models, ASPLOS.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp import xla
from tpmlp.collectives import shift, zeros
from tpmlp.kernels.dense import backward_bias, reduce_bias, reduce_weight
from tpmlp.kernels.execution import Execution

__all__ = [
    "backward_bias",
    "backward_input",
    "backward_weight",
    "forward",
    "gather_gradient",
    "gather_input",
    "reduce_bias",
    "reduce_weight",
]


class Blocks:
    """The blocks of one array round a ring, each fetched when first taken.

    Block k is that of the device k places further along, for k in `order`: the order in which they
    arrive, this device's own first.
    """

    def __init__(self, layout: str, x: jax.Array, role: str, run: Execution, axes: dict[str, str]):
        self.layout, self.role, self.axes = layout, role, axes
        self.here = {0: x}
        ahead, behind = _hops(xla.axis_size(axes[role]), run)
        self.order = sorted(range(-behind, ahead + 1), key=lambda k: (abs(k), -k))
        self.shape = x.shape

    def take(self, k: int, done: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Return block k, which goes on to the next device once `done` is there, and `done`."""
        if k not in self.here:
            by = 1 if k > 0 else -1
            block = shift(self.layout, self.here[k - by], self.role, by, **self.axes)
            self.here[k], done = xla.hold((block, done))
        return self.here[k], done

    def hold(self, other: jax.Array) -> jax.Array:
        """Return another array, and have what is computed from these blocks wait for it."""
        self.here, other = xla.hold((self.here, other))
        return other


def gather_input(h: jax.Array, run: Execution, /, **axes: str) -> Blocks:
    """Return the blocks "I/s/g B/d" of every device along g."""
    return Blocks("I/s/g B/d", h, "g", run, axes)


def gather_gradient(g: jax.Array, run: Execution, /, **axes: str) -> Blocks:
    """Return the blocks "O/g/s B/d" of every device along s."""
    return Blocks("O/g/s B/d", g, "s", run, axes)


def forward(
    W: jax.Array, b: jax.Array | None, h: Blocks, run: Execution, /, **axes: str
) -> jax.Array:
    """Compute z = W h + b, "O/g/s B/d"; arguments as in dense.forward, h in blocks."""
    z = _multiply(W, h, "g", "s", "O/g/s B/d", run, axes)
    return z if b is None else z + b[:, None]


def backward_input(W: jax.Array, g: Blocks, run: Execution, /, **axes: str) -> jax.Array:
    """Compute dh = W^T g, "I/s/g B/d": `forward` with W transposed and the roles exchanged."""
    return _multiply(W, g, "s", "g", "I/s/g B/d", run, axes, transposed=True)


def backward_weight(g: Blocks, h: Blocks, run: Execution, /, **axes: str) -> jax.Array:
    """Compute dW = g h^T, "O/g I/s +d": block [k, j] is g_k h_j^T."""
    rows, columns = g.shape[0], h.shape[0]
    shape = rows * len(g.order), columns * len(h.order)
    dW = zeros("O/g I/s +d", shape, run.total, **axes)
    block = None
    for k in g.order:
        for j in h.order:
            g_k, block = g.take(k, block)
            h_j, block = h.take(j, block)
            block = xla.product("ob,ib->oi", g_k, h_j, run.total)
            at = _start(k, rows, "s", axes), _start(j, columns, "g", axes)
            dW = lax.dynamic_update_slice(dW, block, at)
    return dW


def _multiply(
    W: jax.Array,
    x: Blocks,
    gathered: str,
    scattered: str,
    layout: str,
    run: Execution,
    axes: dict[str, str],
    *,
    transposed: bool = False,
) -> jax.Array:
    """Return this device's block of W x, x in blocks along one axis, the result along another.

    Of W^T x where it is transposed: blocks of W are, each where it is multiplied.
    """
    num_blocks = xla.axis_size(axes[scattered])
    out, into = (1, 0) if transposed else (0, 1)
    formula = "io,ib->ob" if transposed else "oi,ib->ob"
    rows, columns = W.shape[out] // num_blocks, x.shape[0]
    dtype = run.sum_dtype(axes[scattered])

    def product(k: int) -> jax.Array:
        """Return this device's part of the block of the device k places further along."""
        first = _start(k, rows, scattered, axes)
        W_k = lax.dynamic_slice_in_dim(W, first, rows, out)
        total = None
        for j in x.order:
            x_j, total = x.take(j, total)
            W_kj = lax.dynamic_slice_in_dim(W_k, _start(j, columns, gathered, axes), columns, into)
            part = xla.product(formula, W_kj, x_j, run.total)
            total = part if total is None else total + part
        assert total is not None
        return total.astype(dtype)

    return _scatter(layout, product, x, scattered, run, axes).astype(run.total)


def _scatter(
    layout: str,
    product: Callable[[int], jax.Array],
    x: Blocks,
    role: str,
    run: Execution,
    axes: dict[str, str],
) -> jax.Array:
    """Sum over a ring: what is for the device k places ahead hops there, added to on the way."""
    ahead, behind = _hops(xla.axis_size(axes[role]), run)
    travelling: dict[int, jax.Array] = {}
    for k in range(ahead, 0, -1):
        for direction in (1, -1) if k <= behind else (1,):
            part = product(direction * k)
            if direction in travelling:
                part = travelling[direction] + part
            travelling[direction] = shift(layout, x.hold(part), role, -direction, **axes)
    return sum(travelling.values(), start=product(0))


def _hops(size: int, run: Execution) -> tuple[int, int]:
    """Return how many blocks come from ahead and from behind; an even ring has one more ahead."""
    ahead = size // 2 if run.bidirectional else size - 1
    return ahead, size - 1 - ahead


def _start(k: int, block: int, role: str, axes: dict[str, str]) -> jax.Array:
    """Return where the block of the device k places further along an axis starts."""
    size = xla.axis_size(axes[role])
    place = jnp.int32(0) if size == 1 else lax.axis_index(axes[role])
    return (place + k) % size * block
