"""The norm of parameters or gradients as one vector, on one device's blocks."""

import jax
import jax.numpy as jnp

from tpmlp.collectives import all_reduce
from tpmlp.kernels.backprop import Chain, Layers


def global_norm(layers: Layers, chain: Chain) -> jax.Array:
    """Compute sqrt(sum_l |W_l|^2 + |b_l|^2): each device sums its blocks, one all-reduce the sums.

    The sum goes over the axes that split the blocks and over no other: a block that devices hold
    copies of counts once. Padding is 0 and counts nothing.

    Cost per device:
        communication  2 (p-1)/p words over the p devices that the parameters are split over

    Args:
        layers: local blocks of ((W_1, b_1 or None), ...), laid out as the parameters.
        chain: placement and activation.

    Returns:
        A scalar, equal on all devices, in the widest type of the blocks and float32.
    """
    partial = "+g+s+d -> " if chain.placement.splits_data else "+g+s -> "
    blocks = jax.tree.leaves(layers)
    types = [jnp.dtype(jnp.float32), *(block.dtype for block in blocks)]
    widest = max(types, key=lambda dtype: dtype.itemsize)
    squares = jnp.stack([jnp.sum(jnp.square(block.astype(widest))) for block in blocks])
    return jnp.sqrt(all_reduce(partial, jnp.sum(squares), **chain.placement.axes[-1]))
