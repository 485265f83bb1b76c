"""How the kernel computes: the types of its products and sums, and what else a strategy chooses.

Three types take part. Products and gathers have the *compute* type. A sum over devices moves in the
*reduce* type. Everything else (sums inside a product, biases, sigma, gradients, parameters) has
the *total* type, the parameters' own or a wider compute type; at least float32 where bits must not
depend on the mesh, as each sum over devices would round to a narrower one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpmlp.placement import OnMesh
from tpmlp.xla import axis_size, rounded


class Execution(NamedTuple):
    """The static choices of one run of the kernel.

    Attributes:
        compute: dtype of products and gathers.
        total: dtype of sums, and of all that is elementwise.
        reduce: dtype in which sums over devices move.
        bidirectional: whether rings run both ways round.
        splits_data: whether parameters are split over the data axis.
        invariant: whether bits must not depend on the mesh.
    """

    compute: Any
    total: Any
    reduce: Any
    bidirectional: bool
    splits_data: bool
    invariant: bool

    @property
    def accumulate(self) -> Any:
        """Dtype in which microbatches are added up: total, but at least float32."""
        return max(self.total, jnp.dtype(jnp.float32), key=lambda dtype: dtype.itemsize)

    def to_compute(self, x: jax.Array) -> jax.Array:
        """Return x in the compute type."""
        return rounded(x, self.compute) if self.invariant else x.astype(self.compute)

    def sum_dtype(self, axis: str) -> Any:
        """Return the dtype of a product that is then summed over a mesh axis."""
        return self.reduce if axis_size(axis) > 1 else self.total


def execution(placement: OnMesh, param_dtype: Any) -> Execution:
    """Return the choices that a strategy means for parameters of a dtype."""
    strategy = placement.strategy
    compute = jnp.dtype(strategy.compute_dtype or param_dtype)
    least = [jnp.dtype(jnp.float32)] if placement.is_invariant else []
    total = max(jnp.dtype(param_dtype), compute, *least, key=lambda dtype: dtype.itemsize)
    return Execution(
        compute=compute,
        total=total,
        reduce=jnp.dtype(strategy.reduce_dtype or total),
        bidirectional=strategy.overlap == "bidirectional_ring",
        splits_data=placement.splits_data,
        invariant=placement.is_invariant,
    )
