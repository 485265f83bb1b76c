"""What the objective sums, in an order that no mesh changes: tpmlp.kernels.terms, line for line.

The outputs are gathered, and each block of samples has its loss computed whole, as on one device:
the softmax, the mean over outputs and the picked logit are sums that no axis splits. The price is
two gathers of [C, B] a step, of outputs and of targets that are values. Sums over samples and over
parameters are taken of one block at a time and added in a tree; they are at least float32.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.collectives import all_gather, all_reduce_in_tree, block_index, tree_sum
from tpmlp.kernels import terms
from tpmlp.kernels.as_written import as_written
from tpmlp.kernels.backprop import Chain, Layers
from tpmlp.kernels.blocks import blocks_of, blockwise, parameter_cuts
from tpmlp.kernels.cost import NUM_BLOCKS, NUM_PIECES
from tpmlp.kernels.execution import execution
from tpmlp.losses import Loss, PerSample, WholeHead
from tpmlp.regularizers import ElementwisePenalty
from tpmlp.xla import axis_size, rounded, unknown_zero


def total_weight(weight: jax.Array, chain: Chain) -> jax.Array:
    """Return the sum of the weights of all samples, from those of this device's."""
    total = execution(chain.placement, weight.dtype).total
    return over_samples(weight.astype(total)[None], chain)[0]


def over_samples(values: jax.Array, chain: Chain) -> jax.Array:
    """Sum "K B/d" over all samples, "K"."""
    axes = chain.placement.axes[-1]
    counts = {"b": blocks_of("d", axes=axes)}
    sums = blockwise("kb->kb", counts, lambda block: block.sum(axis=1, keepdims=True), values)
    return all_reduce_in_tree("K +d -> K", tree_sum(sums, axis=1), **axes)


def per_sample(z: jax.Array, y: Any, chain: Chain, loss: Loss) -> PerSample:
    """Return each sample's own loss and its gradient by z = z_{L+1}, "C/g/s B/d"."""

    def of_block(sample: PerSample) -> tuple[jax.Array, jax.Array]:
        return sample.loss[None], sample.gradient

    losses, g = _of_whole_outputs(of_block, "", z, y, chain=chain, loss=loss)
    return PerSample(losses[0], g, None)


def at_outputs(
    z: jax.Array, y: Any, weight: jax.Array, total: jax.Array, chain: Chain, loss: Loss
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of loss and correct over this device's samples, and g_{L+1}."""

    def of_block(
        sample: PerSample, weight: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        sample = jax.tree.map(lambda part: part.astype(total.dtype), sample)
        weight = weight.astype(total.dtype)
        sums = terms.weighted(sample, weight).sum(axis=1, keepdims=True)
        return sums, terms.weighted_gradient(sample, weight, total, loss)

    sums, g = _of_whole_outputs(of_block, ",b,", z, y, weight, total, chain=chain, loss=loss)
    return tree_sum(sums, axis=1), g


def _of_whole_outputs(
    function: Callable[..., tuple[jax.Array, jax.Array]],
    more_dims: str,
    z: jax.Array,
    y: Any,
    *more: jax.Array,
    chain: Chain,
    loss: Loss,
) -> tuple[jax.Array, jax.Array]:
    """Run function(PerSample, *more) -> ("kb", "cb") on blocks of samples with all their outputs.

    Args:
        function: of blocks.
        more_dims: the dims of `more`, as blockwise has them, each after a comma.
        z: z_{L+1}, "C/g/s B/d".
        y: targets, "B/d" or "B/d C/g/s" as the loss says.
        *more: operands besides.
        chain: placement and activation.
        loss: the loss.

    Returns:
        The first result of all blocks, and of the second the rows of this device, "C/g/s B/d".
    """
    axes = chain.placement.axes[-1]
    head = WholeHead(num_outputs=chain.placement.widths[-1], axes=axes)
    is_values = loss.targets == "values"
    targets = [] if y is None else [all_gather("B/d C/g/s -> B/d C", y, **axes) if is_values else y]

    def of_block(z: jax.Array, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        more, y = operands[: more_dims.count(",")], operands[more_dims.count(",") :]
        target = y[0].T if is_values else y[0] if y else None
        return function(loss.per_sample(z, target, head), *more)

    rows = z.shape[0]
    z = all_gather("C/g/s B/d -> C B/d", z, **axes)
    target_dims = "".join(",b" + "uvwxyz"[: y.ndim - 1] for y in targets)
    counts, formula = {"b": blocks_of("d", axes=axes)}, f"cb{more_dims}{target_dims}->kb,cb"
    first_result, g = blockwise(formula, counts, of_block, z, *more, *targets)
    first = block_index("C/g/s", **axes) * rows
    return first_result, lax.dynamic_slice_in_dim(g, first, rows, axis=0)


def means(
    sums: jax.Array, total: jax.Array, chain: Chain, loss: Loss
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of all samples and the share of right predictions, from "K +d" sums."""
    sums = all_reduce_in_tree("K +d -> K", sums, **chain.placement.axes[-1])
    divided = partial(terms.divided, loss=loss)
    return as_written(divided, unknown_zero(sums))(sums, total)


def penalty_value(layers: Layers, chain: Chain, penalty: ElementwisePenalty) -> jax.Array:
    """Compute R(W)."""
    dtype = terms.norm_dtype(layers)

    def value(block: jax.Array) -> jax.Array:
        counts = block.ndim == 2 or penalty.biases
        return penalty.value(block.astype(dtype)) if counts else jnp.zeros((), dtype)

    return rounded(_parameter_sum(value, layers, chain), layers[0][0].dtype)


def add_penalty(layers: Layers, grads: Layers, chain: Chain, penalty: ElementwisePenalty) -> Layers:
    """Add the gradient of R to gradients in the parameters' type."""

    def add(w: jax.Array, dw: jax.Array) -> jax.Array:
        return dw + penalty.gradient(w)

    added = []
    for (W, b), (dW, db), axes in zip(layers, grads, chain.placement.axes, strict=True):
        of_W, of_b = parameter_cuts(axes)
        dW = blockwise("oi,oi->oi", of_W.counts, add, W, dW)
        if penalty.biases and b is not None:
            db = blockwise("o,o->o", of_b.counts, add, b, db)
        added.append((dW, db))
    return tuple(added)


def global_norm(layers: Layers, chain: Chain) -> jax.Array:
    """Compute sqrt(sum_l |W_l|^2 + |b_l|^2).

    Cost per device:
        communication  64 (p-1)/p words for each W_l and b_l, over the p devices that split them
    """
    dtype = terms.norm_dtype(layers)
    return jnp.sqrt(
        _parameter_sum(lambda block: jnp.sum(jnp.square(block.astype(dtype))), layers, chain)
    )


def sample_norms(
    h: Sequence[jax.Array], g: Sequence[jax.Array], chain: Chain, *, biases: bool
) -> jax.Array:
    """Return sqrt(sum_l |g_l|^2 (|h_l|^2 + 1)), "B/d"; without the 1 where there are no biases."""
    layers = list(zip(h, g, chain.placement.axes, strict=True))
    h_squared = jnp.stack([_squares(h_l, "s", "g", axes) for h_l, _, axes in layers])
    g_squared = jnp.stack([_squares(g_l, "g", "s", axes) for _, g_l, axes in layers])
    norms = partial(terms.norms_of_squares, biases=biases)
    counts = {"b": blocks_of("d", axes=chain.placement.axes[-1])}
    return blockwise("kb,kb->b", counts, norms, h_squared, g_squared)


def _squares(x: jax.Array, major: str, minor: str, axes: dict[str, str]) -> jax.Array:
    """Sum the squares of features that two axes split, one before the other; "B/d"."""
    counts = {"f": blocks_of(major, minor, axes=axes), "b": blocks_of("d", axes=axes)}
    sums = blockwise("fb->fb", counts, lambda x: jnp.square(x).sum(axis=0, keepdims=True), x)
    signature = f"B/d +{major}+{minor} -> B/d"
    return all_reduce_in_tree(signature, tree_sum(sums, axis=0), **axes)


def _parameter_sum(
    function: Callable[[jax.Array], jax.Array], layers: Layers, chain: Chain
) -> jax.Array:
    """Sum function(block) over the blocks of every W_l and b_l, in one order on all meshes."""
    local, grids = [], []
    for (W, b), axes in zip(layers, chain.placement.axes, strict=True):
        of_W, of_b = parameter_cuts(axes)
        local.append(blockwise("oi->oi", of_W.counts, lambda W: function(W)[None, None], W))
        if b is not None:
            local.append(blockwise("o->o", of_b.counts, lambda b: function(b)[None], b))
        grids += [axes] * (len(local) - len(grids))
    # Device by device as the last layer counts them; layers of the other word count the other way.
    last = chain.placement.axes[-1]
    whole = all_gather("K P/g/s -> K P", jnp.stack([a.reshape(-1) for a in local]), **last)
    totals = [
        _tree_of_blocks(values.reshape(-1, *part.shape), axes, swapped=axes["g"] != last["g"])
        for values, part, axes in zip(whole, local, grids, strict=True)
    ]
    return reduce(jnp.add, totals)


def _tree_of_blocks(values: jax.Array, axes: dict[str, str], *, swapped: bool) -> jax.Array:
    """Add values of the blocks of W, [devices, O, I], or of b, [devices, O], in their own order."""
    G, S = (axis_size(axes[role]) for role in ("g", "s"))
    shape = values.shape[1:]
    values = (
        values.reshape(S, G, *shape).swapaxes(0, 1) if swapped else values.reshape(G, S, *shape)
    )
    if len(shape) == 1:
        return tree_sum(values.reshape(NUM_PIECES), axis=0)
    rows = values.swapaxes(1, 2).reshape(NUM_BLOCKS, NUM_BLOCKS)
    return tree_sum(tree_sum(rows, axis=1), axis=0)
