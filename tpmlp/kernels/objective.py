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
from jax import lax

from tpmlp.collectives import zeros
from tpmlp.kernels import backprop, invariant_terms, terms
from tpmlp.kernels.backprop import Backward, Chain, Forward, Layers
from tpmlp.kernels.execution import execution
from tpmlp.losses import Loss
from tpmlp.regularizers import ElementwisePenalty
from tpmlp.xla import rounded


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
        h: h_1 .. h_{L+1} of the forward pass, each "I/s/g B/d".
        z: z_1 .. z_{L+1} of the forward pass, each "O/g/s B/d".
        sigma_prime: sigma'(z_1) .. sigma'(z_L) of the backward pass, each "O/g/s B/d".
        g: g_1 .. g_{L+1}, each "O/g/s B/d", gradients of the data loss.
    """

    value: Value
    grads: Layers
    h: list[jax.Array]
    z: list[jax.Array]
    sigma_prime: list[jax.Array]
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
    z, total = backprop.forward(layers, x, chain).z[-1], terms_of(chain).total_weight(weight, chain)
    sums, _ = terms_of(chain).at_outputs(z, y, weight, total, chain, loss)
    return _value(sums, total, layers, chain, loss)


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
    total = terms_of(chain).total_weight(weight, chain)
    sums, passed, result = _one_pass(layers, x, y, weight, total, chain=chain, loss=loss)
    return Pass(
        value=_value(sums, total, layers, chain, loss),
        grads=_finished(layers, result.grads, chain, penalty),
        h=passed.h,
        z=passed.z,
        sigma_prime=result.sigma_prime,
        g=result.g,
    )


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
    total = terms_of(chain).total_weight(weight, chain)

    def one_pass(x: Any, y: Any, weight: Any, reduce: bool) -> tuple[jax.Array, Layers]:
        sums, _, result = _one_pass(
            layers, x, y, weight, total, chain=chain, loss=loss, reduce=reduce
        )
        return sums, result.grads

    sums, grads = sum_parts(one_pass, layers, (x, y, weight), chain)
    return _value(sums, total, layers, chain, loss), _finished(layers, grads, chain, penalty)


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
        return added(carry, one_pass(*part, splits)), None

    parts = jax.tree.map(lambda a: a.reshape(num_parts, -1, *a.shape[1:]), samples)
    (sums, grads), _ = lax.scan(add, no_samples(layers, chain), parts)
    sums = sums.astype(layers[0][0].dtype)
    return sums, grads if splits else backprop.reduce_gradients(grads, chain)


def terms_of(chain: Chain) -> Any:
    """Return the module whose functions make the objective's sums."""
    return invariant_terms if chain.placement.is_invariant else terms


def penalty_value(layers: Layers, chain: Chain, penalty: ElementwisePenalty) -> jax.Array:
    """Compute R(W), a scalar in the parameters' type, equal on all devices."""
    return terms_of(chain).penalty_value(layers, chain, penalty)


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
) -> tuple[jax.Array, Forward, Backward]:
    """Return this device's sums, and both passes, of samples with a total weight."""
    passed = backprop.forward(layers, x, chain)
    sums, g = terms_of(chain).at_outputs(passed.z[-1], y, weight, total, chain, loss)
    kept = backprop.keep(passed, chain)
    return sums, passed, backprop.backward(layers, x, kept, g, chain, reduce=reduce)


def _value(sums: jax.Array, total: jax.Array, layers: Layers, chain: Chain, loss: Loss) -> Value:
    mean, correct = terms_of(chain).means(sums, total, chain, loss)
    return Value(*(rounded(scalar, layers[0][0].dtype) for scalar in (mean, total, correct)))


def added(totals: Any, part: Any) -> Any:
    """Return totals with a part of them added, in the totals' types."""
    return jax.tree.map(lambda total, a: total + a.astype(total.dtype), totals, part)


def no_samples(layers: Layers, chain: Chain) -> tuple[jax.Array, Layers]:
    """Return the sums and gradients of no samples, to add to."""
    dtype = execution(chain.placement, layers[0][0].dtype).accumulate
    split = chain.placement.splits_data
    W_layout, b_layout = chain.placement.param_layouts if split else ("O/g I/s +d", "O/g/s +d")
    grads = tuple(
        (
            zeros(W_layout, W.shape, dtype, **axes),
            None if b is None else zeros(b_layout, b.shape, dtype, **axes),
        )
        for (W, b), axes in zip(layers, chain.placement.axes, strict=True)
    )
    sums = zeros("K +d", (2,), dtype, **chain.placement.axes[-1])
    return sums, grads


def _finished(
    layers: Layers, grads: Layers, chain: Chain, penalty: ElementwisePenalty | None
) -> Layers:
    """Return gradients in the parameters' type, with that of R added."""
    grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), grads, layers)
    return terms_of(chain).add_penalty(layers, grads, chain, penalty) if penalty else grads
