"""What the objective sums, on one device's blocks: over samples, over outputs, over parameters.

    total weight   sum_i w_i                  loss   sum_i w_i loss(z_{L+1, i}, y_i)
    R(W)           sum over the elements      g_{L+1}, with the weight of each sample in it

tpmlp.kernels.invariant_terms has the same functions, in an order of sums that no mesh changes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import SequenceKey

from tpmlp.collectives import all_reduce, einsum, transpose
from tpmlp.kernels.network import Network, Params, param_dtype
from tpmlp.losses import Loss, PerSample
from tpmlp.regularizers import ElementwisePenalty


def total_weight(weight: jax.Array, network: Network) -> jax.Array:
    """Return the sum of the weights of all samples, from those of this device's."""
    axes = network.head.axes
    return all_reduce("+d -> ", einsum("B/d -> +d", weight, **axes), **axes)


def per_sample(z: jax.Array, y: Any, network: Network, loss: Loss) -> PerSample:
    """Return each sample's own loss and its gradient by z = z_{L+1}, "C/g/s B/d"."""
    axes = network.head.axes
    if loss.targets == "values":
        y = transpose("B/d C/g/s -> C/g/s B/d", y, **axes)
    return loss.per_sample(z, y, network.head)


def at_outputs(
    z: jax.Array, y: Any, weight: jax.Array, total: jax.Array, network: Network, loss: Loss
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of loss and correct over this device's samples, and g_{L+1}.

    Args:
        z: z_{L+1}, "C/g/s B/d".
        y: targets, "B/d" or "B/d C/g/s" as the loss says.
        weight: "B/d".
        total: the total weight, of all samples.
        network: where the outputs are.
        loss: the loss.

    Returns:
        sums: of the weighted terms, "K +d" with K = 2.
        g: "C/g/s B/d", 0 for samples of weight 0.
    """
    sample = per_sample(z, y, network, loss)
    sums = einsum("K B/d -> K +d", weighted(sample, weight), **network.head.axes)
    return sums, weighted_gradient(sample, weight, total, loss)


def weighted(sample: PerSample, weight: jax.Array) -> jax.Array:
    """Return loss and correct of each sample times its weight, "K B/d"."""
    correct = jnp.full_like(sample.loss, jnp.nan) if sample.correct is None else sample.correct
    return jnp.stack([jnp.where(weight != 0, weight * term, 0) for term in (sample.loss, correct)])


def weighted_gradient(
    sample: PerSample, weight: jax.Array, total: jax.Array, loss: Loss
) -> jax.Array:
    """Return g_{L+1}; 0 for samples of weight 0, whatever their gradient is."""
    scale = weight / total if loss.reduction == "mean" else weight
    return jnp.where(weight[None] != 0, sample.gradient * scale[None], 0)


def means(sums: jax.Array, total: jax.Array, network: Network, loss: Loss) -> tuple[jax.Array, ...]:
    """Return the loss of all samples, the share of right predictions, and what the model adds.

    Args:
        sums: "K +d" of these three; of two where the model adds nothing.
        total: the total weight.
        network: where the outputs are.
        loss: the loss.
    """
    sums = all_reduce("K +d -> K", sums, **network.head.axes)
    return *divided(sums[:2], total, loss), *sums[2:]


def divided(sums: jax.Array, total: jax.Array, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """Divide sums of loss and correct by the total weight."""
    loss_sum, correct = sums
    total = total.astype(sums.dtype)
    return loss_sum / total if loss.reduction == "mean" else loss_sum, correct / total


def penalty_value(params: Params, network: Network, penalty: ElementwisePenalty) -> jax.Array:
    """Compute R(W): each device sums its blocks, and one all-reduce adds the sums."""
    counted = [
        array
        for path, array in jax.tree.leaves_with_path(params)
        if penalty.biases or is_weight(path)
    ]
    if not counted:
        return jnp.zeros((), param_dtype(params))
    local = jnp.sum(jnp.stack([penalty.value(block) for block in counted]))
    return all_reduce(_over_parameters(network), local, p="stage", **network.head.axes)


def add_penalty(
    params: Params, grads: Params, network: Network, penalty: ElementwisePenalty
) -> Params:
    """Add the gradient of R to gradients in the parameters' type."""

    def add(path: Any, array: jax.Array, grad: jax.Array) -> jax.Array:
        return grad + penalty.gradient(array) if penalty.biases or is_weight(path) else grad

    return jax.tree.map_with_path(add, params, grads)


def is_weight(path: Any) -> bool:
    """Return whether a path of the parameters' tree ends at a W: in (W, b), or under its name."""
    end = path[-1]
    return end.idx == 0 if isinstance(end, SequenceKey) else end.key == "W"


def global_norm(params: Params, network: Network) -> jax.Array:
    """Compute sqrt(sum_l |W_l|^2 + |b_l|^2): each device sums its blocks, one all-reduce the sums.

    The sum goes over the axes that split the blocks and over no other: a block that devices hold
    copies of counts once. Padding is 0 and counts nothing.

    Cost per device:
        communication  2 (p-1)/p words over the p devices that the parameters are split over

    Args:
        params: local blocks, laid out as the parameters.
        network: where the outputs are.

    Returns:
        A scalar, equal on all devices, in `norm_dtype`.
    """
    dtype = norm_dtype(params)
    blocks = jax.tree.leaves(params)
    squares = jnp.stack([jnp.sum(jnp.square(block.astype(dtype))) for block in blocks])
    total = all_reduce(_over_parameters(network), jnp.sum(squares), p="stage", **network.head.axes)
    return jnp.sqrt(total)


def _over_parameters(network: Network) -> str:
    """Return the signature of a sum over all devices that parameters are split over."""
    return "+g+s+d+p -> " if network.placement.splits_data else "+g+s+p -> "


def over_samples(values: jax.Array, network: Network) -> jax.Array:
    """Sum "K B/d" over all samples, "K"."""
    axes = network.head.axes
    return all_reduce("K +d -> K", einsum("K B/d -> K +d", values, **axes), **axes)


def sample_norms(
    h: Sequence[jax.Array], g: Sequence[jax.Array], network: Any, *, biases: bool
) -> jax.Array:
    """Return sqrt(sum_l |g_l|^2 (|h_l|^2 + 1)), "B/d"; without the 1 where there are no biases.

    Args:
        h: h_1 .. h_{L+1}, each "I/s/g B/d".
        g: g_1 .. g_{L+1}, each "O/g/s B/d".
        network: a chain of layers.
        biases: whether the layers have biases.
    """
    h_terms, g_terms = [], []
    for h_l, g_l, axes in zip(h, g, network.placement.axes, strict=True):
        h_terms.append(einsum("I/s/g B/d -> B/d +g+s", jnp.square(h_l), **axes))
        g_terms.append(einsum("O/g/s B/d -> B/d +g+s", jnp.square(g_l), **axes))
    terms = jnp.stack([*h_terms, *g_terms])
    squares = all_reduce("K B/d +g+s -> K B/d", terms, **network.head.axes)
    return norms_of_squares(*jnp.split(squares, 2), biases=biases)


def norms_of_squares(h_squared: jax.Array, g_squared: jax.Array, *, biases: bool) -> jax.Array:
    """Return the norm of each sample's gradient from |h_l|^2 and |g_l|^2, "K B/d"."""
    return jnp.sqrt(jnp.sum(g_squared * (h_squared + int(biases)), axis=0))


def norm_dtype(params: Params) -> Any:
    """Return the widest type of the blocks and float32."""
    types = [jnp.dtype(jnp.float32), *(block.dtype for block in jax.tree.leaves(params))]
    return max(types, key=lambda dtype: dtype.itemsize)
