"""The gradient of each sample by itself: its norm, and sums with a factor for each sample.

    |dW_l|^2 = |g_l|^2 |h_l|^2,   |db_l|^2 = |g_l|^2           of one sample's own loss
    sum_i c_i dW_{l,i} = (g_l * c) h_l^T,   sum_i c_i db_{l,i} = sum over the batch of g_l * c

One sample's dW_l is the outer product of two vectors, so its norm is the product of theirs, and no
gradient of one sample is ever formed. Both vectors are split d/M: each device sums the squares of
its features, and one all-reduce over the tensor axes adds the sums of all layers, 2 (L+1) words a
sample; under reduction="invariant" they are added in trees, each in a gather of its own. g is
linear in g_{L+1}, so clipping scales the g_l that are there already, and only the products g h^T
come after the norms: neither the forward pass nor the recursion runs again.

References: Goodfellow 2015, Efficient per-example gradient computations; Bu et al. 2023,
Differentially private optimization on large model at small cost (book-keeping).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.kernels import backprop, objective
from tpmlp.kernels.backprop import Chain, Forward, Kept, Layers
from tpmlp.kernels.execution import execution
from tpmlp.losses import Loss
from tpmlp.xla import after, hold


class Clipped(NamedTuple):
    """What a clipped pass gives.

    Attributes:
        losses: "B/d", each sample's own loss.
        norms: "B/d", of each sample's own gradient before it is clipped.
        grads: sum_i min(1, max_norm / norm_i) grad_i, laid out as the parameters.
    """

    losses: jax.Array
    norms: jax.Array
    grads: Layers


class Moments(NamedTuple):
    """Sums over the gradients of one batch, scalars equal on all devices.

    Attributes:
        num_samples: B, padding not counted.
        squares: sum_i |grad_i|^2.
        norm_of_sum: |sum_i grad_i|.
    """

    num_samples: jax.Array
    squares: jax.Array
    norm_of_sum: jax.Array


class _Recursion(NamedTuple):
    """One forward pass and the recursion from each sample's own loss.

    Attributes:
        losses: "B/d".
        norms: "B/d".
        kept: what the forward pass leaves.
        g: g_1 .. g_{L+1}, each "O/g/s B/d", 0 for samples of weight 0.
    """

    losses: jax.Array
    norms: jax.Array
    kept: Kept
    g: list[jax.Array]


def norms(
    layers: Layers, x: jax.Array, y: Any, weight: jax.Array, *, chain: Chain, loss: Loss
) -> jax.Array:
    """Compute the norm of each sample's own gradient, "B/d"; products g h^T are not computed.

    Args:
        layers: local blocks of ((W_1, b_1), ...).
        x: "B/d I/s/g", samples as rows.
        y: targets, "B/d" or "B/d C/g/s" as the loss says.
        weight: "B/d"; where it is 0 the norm is. Else it plays no part.
        chain: placement and activation.
        loss: the loss; its mean or sum over samples plays no part.
    """

    def of_part(part: Any) -> jax.Array:
        return _recursion(layers, *part, chain=chain, loss=loss).norms

    return lax.map(of_part, _parts(chain, x, y, weight)).reshape(-1)


def clipped_sum(
    layers: Layers,
    x: jax.Array,
    y: Any,
    weight: jax.Array,
    max_norm: jax.Array,
    *,
    chain: Chain,
    loss: Loss,
) -> Clipped:
    """Compute sum_i min(1, max_norm / norm_i) grad_i; other arguments as in `norms`.

    The norms of a microbatch are all-reduced before its products. Gradients cross the data axis as
    in objective.accumulate: once, or at each microbatch where data splits the weights.
    """
    splits = chain.placement.splits_data

    def add(total: Layers, part: Any) -> tuple[Layers, tuple[jax.Array, jax.Array]]:
        run = _recursion(layers, *part, chain=chain, loss=loss)
        # A norm of 0 gives a factor of min(1, inf).
        factor = jnp.minimum(1, max_norm.astype(run.norms.dtype) / run.norms)
        g = [g_l * factor[None] for g_l in run.g]
        grads = _weight_gradients(layers, part[0], run.kept, g, chain, reduce=splits)
        return objective.added(total, grads), (run.losses, run.norms)

    _, nothing = objective.no_samples(layers, chain)
    grads, (losses, norms_of_parts) = lax.scan(add, nothing, _parts(chain, x, y, weight))
    grads = grads if splits else backprop.reduce_gradients(grads, chain)
    grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), grads, layers)
    return Clipped(losses.reshape(-1), norms_of_parts.reshape(-1), grads)


def moments(
    layers: Layers, x: jax.Array, y: Any, weight: jax.Array, *, chain: Chain, loss: Loss
) -> Moments:
    """Compute what the gradient noise scale is estimated from; arguments as in `norms`."""
    unclipped = jnp.asarray(jnp.inf, layers[0][0].dtype)
    run = clipped_sum(layers, x, y, weight, unclipped, chain=chain, loss=loss)
    terms = jnp.stack([(weight != 0).astype(run.norms.dtype), jnp.square(run.norms)])
    B, squares = objective.terms_of(chain).over_samples(terms, chain)
    norm = objective.terms_of(chain).global_norm(run.grads, chain).astype(B.dtype)
    return Moments(B, squares, norm)


def _parts(chain: Chain, *arrays: Any) -> Any:
    """Cut this device's samples into microbatches, a dim of their own that comes first."""
    num_parts = chain.placement.strategy.microbatches
    return jax.tree.map(lambda a: a.reshape(num_parts, -1, *a.shape[1:]), arrays)


def _recursion(
    layers: Layers, x: jax.Array, y: Any, weight: jax.Array, *, chain: Chain, loss: Loss
) -> _Recursion:
    passed = backprop.forward(layers, x, chain)
    sample = objective.terms_of(chain).per_sample(passed.z[-1], y, chain, loss)
    g = jnp.where(weight[None] != 0, sample.gradient, 0)
    kept = backprop.keep(passed, chain)
    all_g = _output_gradients(layers, x, kept, g, chain)
    return _Recursion(sample.loss, _norms(layers, x, passed, all_g, chain), kept, all_g)


def _norms(
    layers: Layers, x: jax.Array, passed: Forward, g: list[jax.Array], chain: Chain
) -> jax.Array:
    run = execution(chain.placement, layers[0][0].dtype)
    h = [
        backprop.layer_input(before, l, run, chain).astype(run.total)
        for l, before in enumerate((x, *passed.z[:-1]), 1)
    ]
    biases = layers[0][1] is not None
    return objective.terms_of(chain).sample_norms(h, g, chain, biases=biases)


def _output_gradients(
    layers: Layers, x: jax.Array, kept: Kept, g: jax.Array, chain: Chain
) -> list[jax.Array]:
    """Return g_1 .. g_{L+1} from g_{L+1}: `backprop.backward` without dW and db."""
    run, layer = execution(chain.placement, layers[0][0].dtype), backprop.layer_functions(chain)
    g = g.astype(run.total)
    z, all_g = list(kept.z), [g]
    for l in range(len(layers), 1, -1):
        axes = chain.placement.axes[l - 1]
        if z[l - 2] is None:
            z, g = backprop.recompute(layers, x, z, l, g, run, chain)
        before, W, g = hold((z[l - 2], layers[l - 1][0], g))
        g_all = layer.gather_gradient(run.to_compute(g), run, **axes)
        W = backprop.whole_weight(W, g, run, axes)
        dh = layer.backward_input(W, g_all, run, **axes)
        g = backprop.through_sigma(dh, before, l - 1, run, chain)
        all_g.append(g)
    return all_g[::-1]


def _weight_gradients(
    layers: Layers, x: jax.Array, kept: Kept, all_g: list[jax.Array], chain: Chain, *, reduce: bool
) -> Layers:
    """Return ((dW_1, db_1), ...) from g_1 .. g_{L+1}: what `_output_gradients` leaves out.

    A layer waits for the one after it, so that the two gathered arrays of one layer are there at a
    time; h_l is gathered again after that, as in backprop.backward.
    """
    run, layer = execution(chain.placement, layers[0][0].dtype), backprop.layer_functions(chain)
    z, grads = list(kept.z), []
    for l in range(len(layers), 0, -1):
        axes, b, g = chain.placement.axes[l - 1], layers[l - 1][1], all_g[l - 1]
        g = after(g, grads[-1][0]) if grads else g
        if l > 1 and z[l - 2] is None:
            z, g = backprop.recompute(layers, x, z, l, g, run, chain)
        before, g, _ = hold((x if l == 1 else z[l - 2], g, grads[-1:]))
        g_all = layer.gather_gradient(run.to_compute(g), run, **axes)
        h = kept.h[l - 1]
        if h is None:
            h = backprop.layer_input(after(before, g), l, run, chain)
            h = layer.gather_input(h, run, **axes)
        dW = layer.backward_weight(g_all, h, run, **axes)
        db = None if b is None else layer.backward_bias(g, **axes)
        grads.append(backprop.reduced(dW, db, run, chain, axes) if reduce else (dW, db))
    return tuple(reversed(grads))
