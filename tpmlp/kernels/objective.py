"""The objective and its gradient, on one device's blocks: forward, loss, recursion, R.

    (1 / sum_i w_i) sum_i w_i loss(z_{L+1, i}, y_i) + R(W)

Sample weights are w; padding samples have weight 0. Where a model has outputs for every token of a
sample, each of them is one of the i, with a weight of its own or its sample's. The total weight
crosses the data axis first, as every g_{L+1} is divided by it; the sums of losses and of right
predictions cross it together. R is added to dW after dW has been summed over the data axis: it
belongs to the objective once, not once a shard.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.collectives import zeros
from tpmlp.kernels import invariant_terms, terms
from tpmlp.kernels.execution import execution
from tpmlp.kernels.network import Network, Params, Passed, param_dtype
from tpmlp.losses import Loss
from tpmlp.regularizers import ElementwisePenalty
from tpmlp.xla import rounded


class Value(NamedTuple):
    """Scalars of one batch, equal on all devices.

    Attributes:
        loss: the data loss, without R.
        weight: the sum of the sample weights.
        correct: the weighted share of right predictions; NaN for a loss that has none.
        activity: what the model itself adds to the objective; None if nothing.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    activity: jax.Array | None = None


class Pass(NamedTuple):
    """All that one forward and backward pass computes; what is not used is not computed.

    Attributes:
        value: the scalars.
        grads: gradients of the data loss and of an elementwise R, laid out as the parameters.
        arrays: what a trace shows, as the network has it.
    """

    value: Value
    grads: Params
    arrays: Any


class Samples(NamedTuple):
    """What a device has of a batch, targets and weights by prediction.

    Attributes:
        x: as the network reads it.
        y: targets, "B/d" or "B/d C/g/s" as the loss says.
        weight: "B/d".
    """

    x: Any
    y: Any
    weight: jax.Array


def value(
    params: Params, x: Any, y: Any, weight: jax.Array, *, network: Network, loss: Loss
) -> Value:
    """Compute the loss of a batch; forward only.

    Args:
        params: local blocks, in the structure of the parameters.
        x: samples as rows, as the network reads them: "B/d I/s/g" for a chain.
        y: targets, "B/d" or "B/d C/g/s" as the loss says; with tokens a dim T after B.
        weight: "B/d", or "B/d T".
        network: the model on its mesh.
        loss: the loss.
    """
    samples = by_prediction(network, x, y, weight)
    total = terms_of(network).total_weight(samples.weight, network)
    passed = network.forward(params, x, _shares(network, samples, total, loss))
    sums, _ = _at_outputs(passed, samples, total, network, loss)
    return _value(sums, total, params, network, loss)


def value_and_grad(
    params: Params,
    x: Any,
    y: Any,
    weight: jax.Array,
    *,
    network: Network,
    loss: Loss,
    penalty: ElementwisePenalty | None,
) -> Pass:
    """Compute the loss of a batch and its gradient; arguments as in `value`."""
    samples = by_prediction(network, x, y, weight)
    total = terms_of(network).total_weight(samples.weight, network)
    sums, grads, arrays = _one_pass(params, samples, total, network=network, loss=loss)
    value = _value(sums, total, params, network, loss)
    return Pass(value, _finished(params, grads, network, penalty), arrays)


def accumulate(
    params: Params,
    x: Any,
    y: Any,
    weight: jax.Array,
    *,
    network: Network,
    loss: Loss,
    penalty: ElementwisePenalty | None,
) -> tuple[Value, Params]:
    """Compute what `value_and_grad` does in microbatches, one after another, adding gradients up.

    Gradients cross the data axis once, after the last microbatch; where data splits the weights
    they are reduced at each, since whole ones are what must not be held.
    """
    samples = by_prediction(network, x, y, weight)
    total = terms_of(network).total_weight(samples.weight, network)

    def one_pass(part: Samples, of: Network, reduce: bool) -> tuple[jax.Array, Params]:
        sums, grads, _ = _one_pass(params, part, total, network=of, loss=loss, reduce=reduce)
        return sums, grads

    sums, grads = sum_parts(one_pass, params, samples, network)
    value = _value(sums, total, params, network, loss)
    return value, _finished(params, grads, network, penalty)


def by_prediction(network: Network, x: Any, y: Any, weight: jax.Array) -> Samples:
    """Return samples with a target and a weight for each prediction: each token's, one by one."""
    tokens = network.placement.outputs.tokens
    if tokens is None:
        return Samples(x, y, weight)
    flat = None if y is None else y.reshape(-1, *y.shape[2:])
    return Samples(x, flat, weight.reshape(-1) if weight.ndim == 2 else jnp.repeat(weight, tokens))


def sum_parts(
    one_pass: Callable[..., tuple[jax.Array, Params]],
    params: Params,
    samples: Samples,
    network: Network,
) -> tuple[jax.Array, Params]:
    """Add up what a pass computes of the samples, in as many microbatches as the strategy says.

    Args:
        one_pass: (samples, network, reduce) -> (sums "K +d" of loss, correct and what the model
            adds, gradients); `reduce` says whether the gradients are summed over the data axis
            there.
        params: local blocks, in the structure of the parameters.
        samples: by prediction.
        network: the model on its mesh.
    """
    placement = network.placement
    num_parts, splits = placement.strategy.microbatches, placement.splits_data
    if num_parts == 1:
        return one_pass(samples, network, True)
    num_samples = jax.tree.leaves(samples.x)[0].shape[0]
    per_part = num_samples // num_parts

    def add(carry: Any, numbered: Any) -> tuple[Any, None]:
        number, part = numbered
        of_part = network.at(number * per_part, num_samples)
        return added(carry, one_pass(part, of_part, splits)), None

    parts = jax.tree.map(lambda a: a.reshape(num_parts, -1, *a.shape[1:]), samples)
    numbers = jnp.arange(num_parts, dtype=jnp.int32)
    (sums, grads), _ = lax.scan(add, no_samples(params, network), (numbers, parts))
    sums = sums.astype(param_dtype(params))
    return sums, grads if splits else network.reduce(grads)


def terms_of(network: Network) -> Any:
    """Return the module whose functions make the objective's sums."""
    return invariant_terms if network.placement.is_invariant else terms


def penalty_value(params: Params, network: Network, penalty: ElementwisePenalty) -> jax.Array:
    """Compute R(W), a scalar in the parameters' type, equal on all devices."""
    return terms_of(network).penalty_value(params, network, penalty)


def added(totals: Any, part: Any) -> Any:
    """Return totals with a part of them added, in the totals' types."""
    return jax.tree.map(lambda total, a: total + a.astype(total.dtype), totals, part)


def no_samples(params: Params, network: Network) -> tuple[jax.Array, Params]:
    """Return the sums and gradients of no samples, to add to."""
    dtype = execution(network.placement, param_dtype(params)).accumulate
    sums = zeros("K +d", (2 + network.adds,), dtype, **network.head.axes)
    return sums, network.zeros(params, dtype)


def _one_pass(
    params: Params,
    samples: Samples,
    total: jax.Array,
    *,
    network: Network,
    loss: Loss,
    reduce: bool = True,
) -> tuple[jax.Array, Params, Any]:
    """Return this device's sums, gradients and arrays of samples with a total weight."""
    passed = network.forward(params, samples.x, _shares(network, samples, total, loss))
    sums, g = _at_outputs(passed, samples, total, network, loss)
    result = passed.backward(g, reduce)
    return sums, result.grads, result.arrays


def _at_outputs(
    passed: Passed, samples: Samples, total: jax.Array, network: Network, loss: Loss
) -> tuple[jax.Array, jax.Array]:
    """Return sums "K +d" of loss, correct and what the model adds, and g of the outputs."""
    sums, g = terms_of(network).at_outputs(
        passed.outputs, samples.y, samples.weight, total, network, loss
    )
    if passed.activity is not None:
        sums = jnp.append(sums, passed.activity.astype(sums.dtype))
    return sums, g


def _shares(network: Network, samples: Samples, total: jax.Array, loss: Loss) -> jax.Array | None:
    """Return what each sample counts in a mean, or in a sum, over samples: the sum of its shares.

    None where the model adds nothing to the objective.
    """
    if not network.adds:
        return None
    positions = network.placement.outputs.positions
    by_sample = samples.weight.reshape(-1, positions)
    if loss.reduction == "mean":
        return by_sample.sum(axis=1) / total
    return by_sample.mean(axis=1)


def _value(
    sums: jax.Array, total: jax.Array, params: Params, network: Network, loss: Loss
) -> Value:
    mean, correct, *activity = terms_of(network).means(sums, total, network, loss)
    dtype = param_dtype(params)
    return Value(*(rounded(scalar, dtype) for scalar in (mean, total, correct, *activity)))


def _finished(
    params: Params, grads: Params, network: Network, penalty: ElementwisePenalty | None
) -> Params:
    """Return gradients in the parameters' type, with that of R added."""
    grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), grads, params)
    return terms_of(network).add_penalty(params, grads, network, penalty) if penalty else grads
