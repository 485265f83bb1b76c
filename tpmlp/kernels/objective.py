"""The objective and its gradient, on one device's blocks: forward, loss, recursion, R.

    (1 / sum_i w_i) sum_i w_i loss(z_{L+1, i}, y_i) + R(W)

Sample weights are w; padding samples have weight 0. The scalars of the batch (loss, weight, number
right) cross the data axis in one all-reduce of three elements. R is added to dW after dW has been
summed over the data axis: it belongs to the objective once, not once a shard.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpmlp.collectives import all_reduce, einsum
from tpmlp.kernels import backprop
from tpmlp.kernels.backprop import Chain, Layers
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
        x: "I/s/g B/d".
        y: targets, "B/d" or "C/g/s B/d" as the loss says.
        weight: "B/d".
        chain: placement and activation.
        loss: the loss.
    """
    z = backprop.forward(layers, x, chain)
    return _value(z[-1], y, weight, chain=chain, loss=loss)[0]


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
    z = backprop.forward(layers, x, chain)
    scalars, sample = _value(z[-1], y, weight, chain=chain, loss=loss)
    scale = weight / scalars.weight if loss.reduction == "mean" else weight
    g = jnp.where(weight[None] != 0, sample.gradient * scale[None], 0)
    grads, all_g, _ = backprop.backward(layers, x, z, g, chain)
    if penalty is not None:
        grads = _add_penalty(layers, grads, penalty)
    return Pass(scalars, grads, z, all_g)


def penalty_value(layers: Layers, chain: Chain, penalty: ElementwisePenalty) -> jax.Array:
    """Compute R(W): each device sums its blocks, and one all-reduce adds the sums."""
    counted = [a for W, b in layers for a in (W, b if penalty.biases else None) if a is not None]
    local = jnp.sum(jnp.stack([penalty.value(block) for block in counted]))
    return all_reduce("+g+s -> ", local, **chain.placement.axes[-1])


def _value(
    z: jax.Array, y: Any, weight: jax.Array, *, chain: Chain, loss: Loss
) -> tuple[Value, PerSample]:
    axes = chain.placement.axes[-1]
    sample = loss.per_sample(z, y, Head(num_outputs=chain.placement.widths[-1], axes=axes))
    correct = jnp.full_like(sample.loss, jnp.nan) if sample.correct is None else sample.correct
    weighted = [jnp.where(weight != 0, weight * term, 0) for term in (sample.loss, correct)]
    local = [einsum("B/d -> +d", term, **axes) for term in (weight, *weighted)]
    total, loss_sum, correct_sum = all_reduce("K +d -> K", jnp.stack(local), **axes)
    mean = loss_sum / total if loss.reduction == "mean" else loss_sum
    return Value(mean, total, correct_sum / total), sample


def _add_penalty(layers: Layers, grads: Layers, penalty: ElementwisePenalty) -> Layers:
    def add(w: jax.Array, dw: jax.Array) -> jax.Array:
        return dw + penalty.gradient(w)

    return tuple(
        (add(W, dW), add(b, db) if penalty.biases and b is not None else db)
        for (W, b), (dW, db) in zip(layers, grads, strict=True)
    )
