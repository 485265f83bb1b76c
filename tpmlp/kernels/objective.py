"""The objective and its gradient, on one device's blocks: forward, loss, recursion, R.

    (1 / sum_i w_i) sum_i w_i loss(z_{L+1, i}, y_i) + R(W)

Sample weights are w; padding samples have weight 0. The total weight crosses the data axis first,
as every g_{L+1} is divided by it; the sums of losses and of right predictions cross it together. R
is added to dW after dW has been summed over the data axis: it belongs to the objective once, not
once a shard.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.collectives import all_reduce, einsum, transpose, zeros
from tpmlp.kernels import backprop
from tpmlp.kernels.backprop import Chain, Layers
from tpmlp.kernels.execution import execution
from tpmlp.losses import Head, Loss, PerSample
from tpmlp.regularizers import ElementwisePenalty


class Value(NamedTuple):
    """Scalars of one batch, equal on all devices.

    Attributes:
        loss: the data loss, without R.
        weight: the sum of the sample weights.
        correct: the weighted share of right predictions; NaN for a loss that has none.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


class Pass(NamedTuple):
    """All that one forward and backward pass computes; what is not used is not computed.

    Attributes:
        value: the scalars.
        grads: gradients of the data loss and of an elementwise R, laid out as the parameters.
        z: z_1 .. z_{L+1}, each "O/g/s B/d".
        g: g_1 .. g_{L+1}, each "O/g/s B/d", gradients of the data loss.
    """

    value: Value
    grads: Layers
    z: list[jax.Array]
    g: list[jax.Array]


def value(
    layers: Layers, x: jax.Array, y: Any, weight: jax.Array, *, chain: Chain, loss: Loss
) -> Value:
    """Compute the loss of a batch; forward only.

    Args:
        layers: local blocks of ((W_1, b_1), ...).
        x: "B/d I/s/g", samples as rows.
        y: targets, "B/d" or "B/d C/g/s" as the loss says.
        weight: "B/d".
        chain: placement and activation.
        loss: the loss.
    """
    z = backprop.forward(layers, x, chain).z[-1]
    sums = sums_of(per_sample(z, y, chain, loss), weight, chain)
    return _value(sums, total_weight(weight, chain), chain, loss)


def value_and_grad(
    layers: Layers,
    x: jax.Array,
    y: Any,
    weight: jax.Array,
    *,
    chain: Chain,
    loss: Loss,
    penalty: ElementwisePenalty | None,
) -> Pass:
    """Compute the loss of a batch and its gradient; arguments as in `value`."""
    total = total_weight(weight, chain)
    sums, grads, z, g = _one_pass(layers, x, y, weight, total, chain=chain, loss=loss)
    return Pass(_value(sums, total, chain, loss), _finished(layers, grads, penalty), z, g)


def accumulate(
    layers: Layers,
    x: jax.Array,
    y: Any,
    weight: jax.Array,
    *,
    chain: Chain,
    loss: Loss,
    penalty: ElementwisePenalty | None,
) -> tuple[Value, Layers]:
    """Compute what `value_and_grad` does in microbatches, one after another, adding gradients up.

    Gradients cross the data axis once, after the last microbatch; where data splits the weights
    they are reduced at each, since whole ones are what must not be held.
    """
    total = total_weight(weight, chain)

    def one_pass(x: Any, y: Any, weight: Any, reduce: bool) -> tuple[jax.Array, Layers]:
        sums, grads, *_ = _one_pass(
            layers, x, y, weight, total, chain=chain, loss=loss, reduce=reduce
        )
        return sums, grads

    sums, grads = sum_parts(one_pass, layers, (x, y, weight), chain)
    return _value(sums, total, chain, loss), _finished(layers, grads, penalty)


def sum_parts(
    one_pass: Callable[..., tuple[jax.Array, Layers]], layers: Layers, samples: Any, chain: Chain
) -> tuple[jax.Array, Layers]:
    """Add up what a pass computes of the samples, in as many microbatches as the strategy says.

    Args:
        one_pass: (x, y, weight, reduce) -> (sums "K +d" with K = 2, gradients); `reduce` says
            whether the gradients are summed over the data axis there.
        layers: local blocks of ((W_1, b_1), ...).
        samples: (x, y, weight).
        chain: placement and activation.
    """
    num_parts, splits = chain.placement.strategy.microbatches, chain.placement.splits_data
    if num_parts == 1:
        return one_pass(*samples, True)

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one_pass(*part, splits)), None

    parts = jax.tree.map(lambda a: a.reshape(num_parts, -1, *a.shape[1:]), samples)
    (sums, grads), _ = lax.scan(add, no_samples(layers, chain), parts)
    return sums, grads if splits else backprop.reduce_gradients(grads, chain)


def penalty_value(layers: Layers, chain: Chain, penalty: ElementwisePenalty) -> jax.Array:
    """Compute R(W): each device sums its blocks, and one all-reduce adds the sums."""
    counted = [a for W, b in layers for a in (W, b if penalty.biases else None) if a is not None]
    local = jnp.sum(jnp.stack([penalty.value(block) for block in counted]))
    partial = "+g+s+d -> " if chain.placement.splits_data else "+g+s -> "
    return all_reduce(partial, local, **chain.placement.axes[-1])


def _one_pass(
    layers: Layers,
    x: jax.Array,
    y: Any,
    weight: jax.Array,
    total: jax.Array,
    *,
    chain: Chain,
    loss: Loss,
    reduce: bool = True,
) -> tuple[jax.Array, Layers, list[jax.Array], list[jax.Array]]:
    """Return this device's sums (`sums_of`), gradients, z and g of samples with a total weight."""
    passed = backprop.forward(layers, x, chain)
    sample, g = at_outputs(passed.z[-1], y, weight, total, chain, loss)
    kept = backprop.keep(passed, chain)
    result = backprop.backward(layers, x, kept, g, chain, reduce=reduce)
    return sums_of(sample, weight, chain), result.grads, passed.z, result.g


def at_outputs(
    z: jax.Array, y: Any, weight: jax.Array, total: jax.Array, chain: Chain, loss: Loss
) -> tuple[PerSample, jax.Array]:
    """Return what the loss says of z_{L+1}, and g_{L+1}, for samples with a total weight."""
    sample = per_sample(z, y, chain, loss)
    scale = weight / total if loss.reduction == "mean" else weight
    return sample, jnp.where(weight[None] != 0, sample.gradient * scale[None], 0)


def per_sample(z: jax.Array, y: Any, chain: Chain, loss: Loss) -> PerSample:
    """Return each sample's own loss and its gradient by z = z_{L+1}; arguments as in `value`."""
    axes = chain.placement.axes[-1]
    if loss.targets == "values":
        y = transpose("B/d C/g/s -> C/g/s B/d", y, **axes)
    return loss.per_sample(z, y, Head(num_outputs=chain.placement.widths[-1], axes=axes))


def total_weight(weight: jax.Array, chain: Chain) -> jax.Array:
    """Return the sum of the weights of all samples, from those of this device's."""
    axes = chain.placement.axes[-1]
    return all_reduce("+d -> ", einsum("B/d -> +d", weight, **axes), **axes)


def sums_of(sample: PerSample, weight: jax.Array, chain: Chain) -> jax.Array:
    """Return the weighted sums of loss and correct over this device's samples, "K +d"."""
    correct = jnp.full_like(sample.loss, jnp.nan) if sample.correct is None else sample.correct
    terms = [jnp.where(weight != 0, weight * term, 0) for term in (sample.loss, correct)]
    return einsum("K B/d -> K +d", jnp.stack(terms), **chain.placement.axes[-1])


def _value(sums: jax.Array, total: jax.Array, chain: Chain, loss: Loss) -> Value:
    loss_sum, correct = all_reduce("K +d -> K", sums, **chain.placement.axes[-1])
    mean = loss_sum / total if loss.reduction == "mean" else loss_sum
    return Value(mean, total, correct / total)


def no_samples(layers: Layers, chain: Chain) -> tuple[jax.Array, Layers]:
    """Return the sums and gradients of no samples, to add to."""
    dtype = execution(chain.placement, layers[0][0].dtype).total
    split = chain.placement.splits_data
    W_layout, b_layout = chain.placement.param_layouts if split else ("O/g I/s +d", "O/g/s +d")
    grads = tuple(
        (
            zeros(W_layout, W.shape, dtype, **axes),
            None if b is None else zeros(b_layout, b.shape, dtype, **axes),
        )
        for (W, b), axes in zip(layers, chain.placement.axes, strict=True)
    )
    sums = zeros("K +d", (2,), layers[0][0].dtype, **chain.placement.axes[-1])
    return sums, grads


def _finished(layers: Layers, grads: Layers, penalty: ElementwisePenalty | None) -> Layers:
    """Return gradients in the parameters' type, with that of R added."""

    def finish(w: jax.Array, dw: jax.Array, *, counted: bool) -> jax.Array:
        dw = dw.astype(w.dtype)
        return dw + penalty.gradient(w) if counted and penalty is not None else dw

    biases = penalty is not None and penalty.biases
    return tuple(
        (
            finish(W, dW, counted=penalty is not None),
            None if b is None else finish(b, db, counted=biases),
        )
        for (W, b), (dW, db) in zip(layers, grads, strict=True)
    )
