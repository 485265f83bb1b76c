"""Gradients of single samples: their norms, their clipped sum, and how noisy they are.

Each is of the sample's own loss: R is not in it, and it is not divided by the number of samples.
tpmlp.kernels.per_example says how the norms come out of a step's own h_l and g_l.

The formula holds for samples that are vectors, x [B, d_0]: with positions besides, a sample's dW_l
is a sum of outer products, whose norm is no product of norms. Tokens, [B, T, d_0], are refused.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tpmlp.batch import Batch, place_batch
from tpmlp.checks import as_array, check_positive
from tpmlp.kernels import per_example as kernel
from tpmlp.kernels.as_written import as_written
from tpmlp.kernels.backprop import Chain
from tpmlp.model import MLP, Params
from tpmlp.models import check_is_chain
from tpmlp.objective import Objective, make_objective
from tpmlp.parameters import check_params
from tpmlp.placement import check_no_stages
from tpmlp.strategy import Strategy
from tpmlp.xla import unknown_zero


class ClippedSum(NamedTuple):
    """What clipped_gradient_sum gives.

    Attributes:
        grads: sum_i min(1, max_norm / norms_i) grad_i, placed as the parameters.
        norms: [B], of each sample's gradient before it is clipped.
        losses: [B], each sample's own loss.
    """

    grads: Params
    norms: jax.Array
    losses: jax.Array


class NoiseScale(NamedTuple):
    """What gradient_noise_scale gives: scalars.

    Attributes:
        noise_scale: tr(Sigma) / |G|^2, in samples.
        covariance_trace: tr(Sigma), the variance of one sample's gradient.
        squared_norm: |G|^2 of the true gradient G; below 0 where the batch is too small to tell.
    """

    noise_scale: jax.Array
    covariance_trace: jax.Array
    squared_norm: jax.Array


def per_example_gradient_norms(
    model: MLP,
    params: Params,
    x: Any,
    y: Any = None,
    weight: Any = None,
    *,
    loss: Any,
    mesh: Mesh,
    strategy: Strategy | None = None,
) -> jax.Array:
    """Return the norm of each sample's own gradient, sqrt(sum_l |g_l|^2 (|h_l|^2 + 1)).

    A forward pass and the recursion; the products g_l h_l^T are not computed. One all-reduce
    besides, of 2 (L+1) words a sample, for each microbatch.

    Args:
        model: the MLP.
        params: placed for this mesh and strategy.
        x: samples [B, d_0].
        y: targets, as the loss says.
        weight: [B]; samples of weight 0 are left out: their norm is 0. Else it plays no part. It
            is here for the Batch of shard_batch, whose padding has weight 0.
        loss: as in value_and_grad, but not None.
        mesh: the mesh.
        strategy: Strategy() by default. Where compute_dtype is narrower than the parameters, the
            norms are those of g_l before it is rounded for the product.

    Returns:
        Norms [B].

    Raises:
        ValueError: x is of tokens; loss is None; else as for a step of value_and_grad.

    Examples:
        The gradient of w x + b by (w, b) is (x, 1).

        >>> import numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(data=2, x=4)
        >>> mlp = tpmlp.MLP((1, 1))
        >>> params = tpmlp.from_numpy(mlp, [(np.ones((1, 1)), np.zeros(1))], mesh)
        >>> x = np.array([[0.0], [1.0], [7.0]])
        >>> norms = per_example_gradient_norms(mlp, params, x, loss="output", mesh=mesh)
        >>> np.square(norms).round(12)
        array([ 1.,  2., 50.])

    References:
        Goodfellow 2015, Efficient per-example gradient computations.
    """
    objective = _make_objective(model, loss, mesh, strategy)
    placed = _place(objective, params, Batch(x, y, weight))
    return _norms(objective)(*placed)[: np.shape(x)[0]]


def clipped_gradient_sum(
    model: MLP,
    params: Params,
    x: Any,
    y: Any = None,
    weight: Any = None,
    *,
    loss: Any,
    mesh: Mesh,
    max_norm: Any,
    strategy: Strategy | None = None,
) -> ClippedSum:
    """Return sum_i min(1, max_norm / |grad_i|) grad_i over the samples, for private training.

    A step's products, and no more: the norms come first, then each g_l that is there already is
    scaled, sample by sample, and multiplied with h_l. All g_l are kept until then, d/M a device;
    g_l is gathered a second time. With keep="recompute" the layers that are not kept are computed
    once more for these products.

    No noise is added, and nothing is divided. One sample more or less changes the sum by max_norm
    at most, up to rounding: by 2^-8 of it more where compute_dtype is bfloat16.

    Args:
        model: the MLP.
        params: placed for this mesh and strategy.
        x: samples [B, d_0].
        y: targets, as the loss says.
        weight: [B]; samples of weight 0 are left out: their norm is 0, and they add nothing. Else
            it plays no part.
        loss: as in value_and_grad, but not None.
        mesh: the mesh.
        max_norm: a positive number; another one of its type compiles nothing anew.
        strategy: Strategy() by default.

    Returns:
        ClippedSum(grads, norms, losses).

    Raises:
        ValueError: x is of tokens; loss is None; max_norm is not positive; else as for a step of
            value_and_grad.

    Examples:
        >>> import numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(data=2, x=4)
        >>> mlp = tpmlp.MLP((1, 1), bias=False)
        >>> params = tpmlp.from_numpy(mlp, [(np.ones((1, 1)), None)], mesh)
        >>> x = np.array([[0.0], [1.0], [7.0]])
        >>> run = clipped_gradient_sum(mlp, params, x, loss="output", mesh=mesh, max_norm=2.0)
        >>> tpmlp.to_numpy(mlp, run.grads)[0][0], np.asarray(run.norms)
        (array([[3.]]), array([0., 1., 7.]))

    References:
        Abadi et al. 2016, Deep learning with differential privacy, algorithm 1; Bu et al. 2023,
        Differentially private optimization on large model at small cost.
    """
    check_positive("max_norm", max_norm, "Use for example max_norm=1.0.")
    objective = _make_objective(model, loss, mesh, strategy)
    placed, num_samples = _place(objective, params, Batch(x, y, weight)), np.shape(x)[0]
    run = _clipped(objective)(*placed, max_norm)
    return ClippedSum(run.grads, run.norms[:num_samples], run.losses[:num_samples])


def gradient_noise_scale(
    model: MLP,
    params: Params,
    x: Any,
    y: Any = None,
    weight: Any = None,
    *,
    loss: Any,
    mesh: Mesh,
    strategy: Strategy | None = None,
) -> NoiseScale:
    """Estimate the simple noise scale tr(Sigma) / |G|^2 of the gradient, R left out.

    The batch size up to which a larger batch still saves steps nearly in proportion. From B
    samples with gradients grad_i, m = sum_i |grad_i|^2 / B and q = |sum_i grad_i / B|^2:

        tr(Sigma) ~ (m - q) B / (B - 1),   |G|^2 ~ (B q - m) / (B - 1)

    Both are unbiased; their ratio is not, and one batch says little: average the two over steps
    and divide the averages.

    Args:
        model: the MLP.
        params: placed for this mesh and strategy.
        x: samples [B, d_0], at least two.
        y: targets, as the loss says.
        weight: [B]; samples of weight 0 are left out. Else it plays no part.
        loss: as in value_and_grad, but not None.
        mesh: the mesh.
        strategy: Strategy() by default.

    Returns:
        NoiseScale(noise_scale, covariance_trace, squared_norm).

    Raises:
        ValueError: x is of tokens; loss is None; x has one row; else as for a step of
            value_and_grad.

    Examples:
        Gradients 1, 2 and 3: mean 2, variance 1, and 4 is 1/3 too much for |G|^2.

        >>> import numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(data=2, x=4)
        >>> mlp = tpmlp.MLP((1, 1), bias=False)
        >>> params = tpmlp.from_numpy(mlp, [(np.ones((1, 1)), None)], mesh)
        >>> x = np.array([[1.0], [2.0], [3.0]])
        >>> run = gradient_noise_scale(mlp, params, x, loss="output", mesh=mesh)
        >>> [round(float(value), 12) for value in run]
        [0.272727272727, 1.0, 3.666666666667]

    References:
        McCandlish et al. 2018, An empirical model of large-batch training, eq. 2.9, appendix A.1.
    """
    objective = _make_objective(model, loss, mesh, strategy)
    placed = _place(objective, params, Batch(x, y, weight))
    if np.shape(x)[0] < 2:
        raise ValueError(
            f"x must have at least two rows: got x of shape {np.shape(x)}. A variance needs two "
            "samples."
        )
    return _noise_scale(objective)(*placed)


def _make_objective(model: MLP, loss: Any, mesh: Mesh, strategy: Strategy | None) -> Objective:
    check_is_chain(model, "gradients of one sample")
    if loss is None:
        raise ValueError(
            "loss must be a loss of one sample: got loss=None. For a gradient with given "
            "cotangents v [B, d_out] use loss=lambda z, v: jnp.vdot(v, z) and y=v."
        )
    objective = make_objective(model, loss=loss, mesh=mesh, strategy=strategy)
    check_no_stages(objective.placement, "gradients of one sample")
    return objective


def _place(objective: Objective, params: Params, batch: Batch) -> tuple[Params, Batch]:
    params = check_params(objective.model, params, objective.placement)
    _check_vectors(batch.x)
    return params, place_batch(objective.placement, objective.loss, batch)


def _check_vectors(x: Any) -> None:
    """Refuse tokens, [B, T, d_0], for what they are; other shapes are refused as by a step."""
    shape = as_array("x", x).shape
    if len(shape) > 2:
        raise ValueError(
            f"x must have one vector a sample, [B, d_0]: got x of shape {shape}. |dW|^2 = |g|^2 "
            "|h|^2 holds for a vector, not for tokens, whose dW_l is a sum of g h^T over them. "
            f"For each token's norm give x.reshape(-1, {shape[-1]}); for a sample's, take "
            "global_norm of the gradient of its tokens alone."
        )


@lru_cache(maxsize=16)
def _norms(objective: Objective) -> Callable[[Params, Batch], jax.Array]:
    def body(chain: Chain, *blocks: Any) -> jax.Array:
        return kernel.norms(*blocks, chain=chain, loss=objective.loss)

    return jax.jit(objective.map(body, objective.placement.spec("B/d", 1)))


@lru_cache(maxsize=16)
def _clipped(objective: Objective) -> Callable[[Params, Batch, Any], kernel.Clipped]:
    def body(chain: Chain, *blocks: Any) -> kernel.Clipped:
        return kernel.clipped_sum(*blocks, chain=chain, loss=objective.loss)

    rows = objective.placement.spec("B/d", 1)
    specs = kernel.Clipped._make([rows, rows, objective.param_specs])
    return jax.jit(objective.map(body, specs, more_specs=(PartitionSpec(),)))


@lru_cache(maxsize=16)
def _noise_scale(objective: Objective) -> Callable[[Params, Batch], NoiseScale]:
    def body(chain: Chain, *blocks: Any) -> kernel.Moments:
        return kernel.moments(*blocks, chain=chain, loss=objective.loss)

    specs = kernel.Moments._make([PartitionSpec()] * 3)
    moments = objective.map(body, specs)

    def estimated(B: jax.Array, squares: jax.Array, norm_of_sum: jax.Array) -> NoiseScale:
        m, q = squares / B, jnp.square(norm_of_sum / B)
        covariance_trace = (m - q) * B / (B - 1)
        squared_norm = (B * q - m) / (B - 1)
        return NoiseScale(covariance_trace / squared_norm, covariance_trace, squared_norm)

    def estimate(params: Params, batch: Batch) -> NoiseScale:
        found = moments(params, batch)
        return as_written(estimated, unknown_zero(found.num_samples))(*found)

    return jax.jit(estimate)
