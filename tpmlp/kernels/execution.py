"""How the kernel computes: the types of its products and sums, and what else a strategy chooses.

Three types take part. Products and gathers have the *compute* type. A sum over devices moves in the
*reduce* type. Everything else (sums inside a product, biases, sigma, gradients, parameters) has
the *total* type, the parameters' own or a wider compute type.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from tpmlp.placement import Placement
from tpmlp.xla import axis_size


class Execution(NamedTuple):
    """The static choices of one run of the kernel.

    Attributes:
        compute: dtype of products and gathers.
        total: dtype of sums, and of all that is elementwise.
        reduce: dtype in which sums over devices move.
        bidirectional: whether rings run both ways round.
        splits_data: whether parameters are split over the data axis.
    """

    compute: Any
    total: Any
    reduce: Any
    bidirectional: bool
    splits_data: bool

    def sum_dtype(self, axis: str) -> Any:
        """Return the dtype of a product that is then summed over a mesh axis."""
        return self.reduce if axis_size(axis) > 1 else self.total


def execution(placement: Placement, param_dtype: Any) -> Execution:
    """Return the choices that a strategy means for parameters of a dtype."""
    strategy = placement.strategy
    compute = jnp.dtype(strategy.compute_dtype or param_dtype)
    total = max(jnp.dtype(param_dtype), compute, key=lambda dtype: dtype.itemsize)
    return Execution(
        compute=compute,
        total=total,
        reduce=jnp.dtype(strategy.reduce_dtype or total),
        bidirectional=strategy.overlap == "bidirectional_ring",
        splits_data=placement.splits_data,
    )
