"""Curvature: products of the Hessian, and of its Gauss-Newton part, with a direction.

    H v = d/dt grad(W + t v)           of loss + R, grad the explicit backward pass
    G v = J^T H_loss J v + H_R v       J: of the outputs in the parameters

The first is jax.jvp over the kernel: forward over an explicit reverse. The second is the part of
H that is left where the outputs are taken as linear in the parameters; for a loss that is convex in
the outputs and without R it has no negative eigenvalue. Neither holds a matrix. Of a layer's
products a gradient takes 3, the second 5, the first at most 9; the first moves twice the words of
a gradient.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tpmlp.activations import ACTIVATIONS
from tpmlp.batch import Batch, place_batch
from tpmlp.kernels.backprop import Chain
from tpmlp.kernels.curvature import gauss_newton_product
from tpmlp.losses import UserLoss
from tpmlp.model import MLP, Params
from tpmlp.models import check_is_chain
from tpmlp.objective import Objective, make_objective
from tpmlp.parameters import check_params, clear_padding, logical_params
from tpmlp.placement import check_no_stages
from tpmlp.regularizers import UserPenalty
from tpmlp.strategy import Strategy

Product = Callable[[Objective, Params, Params, Batch], Params]


def hessian_vector_product(
    model: MLP,
    params: Params,
    v: Params,
    x: Any,
    y: Any = None,
    *,
    loss: Any,
    mesh: Mesh,
    regularizer: Any = None,
    strategy: Strategy | None = None,
    weight: Any = None,
) -> Params:
    """Return H v, H the Hessian of loss + R in the parameters.

    It is what a step's gradient does along v: jax.jvp over the explicit backward pass. sigma' is
    differentiated by JAX; what JAX takes as 0 (the second derivative of relu and of |w|) is 0.

    Args:
        model: the MLP.
        params: placed for this mesh and strategy.
        v: a direction, placed as the parameters and of their types, such as a gradient; what
            its padding holds is taken as 0.
        x: samples [B, d_0]; placed by shard_batch, or anything that NumPy takes.
        y: targets, as the loss says.
        loss: as in value_and_grad.
        mesh: the mesh.
        regularizer: as in value_and_grad.
        strategy: Strategy() by default.
        weight: sample weights [B]; 1 by default.

    Returns:
        H v, placed as the parameters.

    Raises:
        ValueError: as for a step of value_and_grad; v is not laid out as the parameters; a
            function of the user's that JAX cannot differentiate as often as is needed.

    Examples:
        >>> import jax, numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(x=8)
        >>> mlp = tpmlp.MLP((3, 2), bias=False)  # z = W x, so H of mse is 2 x x^T / d_out
        >>> params = mlp.init(jax.random.key(0), mesh)
        >>> v = tpmlp.from_numpy(mlp, [(np.ones((2, 3), np.float32), None)], mesh)
        >>> Hv = hessian_vector_product(
        ...     mlp, params, v, np.array([[1, 2, 3]]), np.zeros((1, 2)), loss="mse", mesh=mesh
        ... )
        >>> tpmlp.to_numpy(mlp, Hv)[0][0]
        array([[ 6., 12., 18.],
               [ 6., 12., 18.]], dtype=float32)

    References:
        Pearlmutter 1994, Fast exact multiplication by the Hessian, Neural Computation 6.
    """
    check_is_chain(model, "products with a curvature")
    objective = make_objective(
        model, loss=loss, mesh=mesh, regularizer=regularizer, strategy=strategy
    )
    check_no_stages(objective.placement, "products with a curvature")
    arguments = _checked(objective, params, v, Batch(x, y, weight))
    _check_sigma_prime(objective, params[0][0].dtype)
    return _compiled(_hessian_product, objective)(*arguments)


def gauss_newton_vector_product(
    model: MLP,
    params: Params,
    v: Params,
    x: Any,
    y: Any = None,
    *,
    loss: Any,
    mesh: Mesh,
    regularizer: Any = None,
    strategy: Strategy | None = None,
    weight: Any = None,
) -> Params:
    """Return G v = J^T H_loss J v + H_R v, the Gauss-Newton part of the Hessian.

    J v is jax.jvp of the forward pass, J^T the explicit backward pass, with the same sigma': G is
    symmetric. sigma' itself is not differentiated. R's Hessian is whole.

    Args:
        model: the MLP.
        params: placed for this mesh and strategy.
        v: as in hessian_vector_product.
        x: samples [B, d_0]; placed by shard_batch, or anything that NumPy takes.
        y: targets, as the loss says.
        loss: as in value_and_grad.
        mesh: the mesh.
        regularizer: as in value_and_grad.
        strategy: Strategy() by default; keep="gathered" does as "shard".
        weight: sample weights [B]; 1 by default.

    Returns:
        G v, placed as the parameters.

    Raises:
        ValueError: as in hessian_vector_product.

    Examples:
        >>> import jax, numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(x=4, y=2)
        >>> mlp = tpmlp.MLP((2, 1, 1), activation="identity", bias=False)
        >>> ones = [(np.ones((1, 2), np.float32), None), (np.ones((1, 1), np.float32), None)]
        >>> params = tpmlp.from_numpy(mlp, ones, mesh)
        >>> x, y = np.array([[1.0, 2.0]]), np.array([[0.0]])  # z = W_2 W_1 x, J v = 3 + 3
        >>> Gv = gauss_newton_vector_product(mlp, params, params, x, y, loss="mse", mesh=mesh)
        >>> [W.tolist() for W, _ in tpmlp.to_numpy(mlp, Gv)]
        [[[12.0, 24.0]], [[36.0]]]

    References:
        Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient descent,
        Neural Computation 14.
    """
    check_is_chain(model, "products with a curvature")
    objective = make_objective(
        model, loss=loss, mesh=mesh, regularizer=regularizer, strategy=strategy
    )
    check_no_stages(objective.placement, "products with a curvature")
    arguments = _checked(objective, params, v, Batch(x, y, weight))
    return _compiled(_gauss_newton_product, objective)(*arguments)


def _hessian_product(objective: Objective, params: Params, v: Params, batch: Batch) -> Params:
    def gradient(params: Params) -> Params:
        return objective.value_and_grad(params, batch)[1]

    return jax.jvp(gradient, (params,), (v,))[1]


def _gauss_newton_product(objective: Objective, params: Params, v: Params, batch: Batch) -> Params:
    def body(chain: Chain, *blocks: Any) -> Params:
        arguments = objective.kernel_arguments
        return gauss_newton_product(*blocks, chain=chain, **arguments)

    run = objective.map(body, objective.param_specs, more_specs=(objective.param_specs,))
    product = run(params, batch, v)
    if not isinstance(objective.regularizer, UserPenalty):
        return product
    _, of_penalty = jax.jvp(jax.grad(objective.penalty), (params,), (v,))
    return jax.tree.map(jnp.add, product, of_penalty)


@lru_cache(maxsize=16)
def _compiled(product: Product, objective: Objective) -> Callable[..., Params]:
    """Return the product as a compiled function of (params, v, batch)."""

    def run(params: Params, v: Params, batch: Batch) -> Params:
        return product(objective, params, clear_padding(objective.model, v), batch)

    return jax.jit(run, out_shardings=objective.model.shardings(objective.placement))


def _checked(
    objective: Objective, params: Params, v: Params, batch: Batch
) -> tuple[Params, Params, Batch]:
    params = check_params(objective.model, params, objective.placement)
    v = _check_direction(objective, v, params[0][0].dtype)
    batch = place_batch(objective.placement, objective.loss, batch)
    _check_loss(objective, batch, params[0][0].dtype)
    _check_penalty(objective, params)
    return params, v, batch


def _check_direction(objective: Objective, v: Any, dtype: Any) -> Params:
    """Return v as tuples, or refuse what is not laid out as the parameters."""
    try:
        v = check_params(objective.model, v, objective.placement)
    except ValueError as error:
        raise ValueError(
            f"v must be laid out as params, as a gradient is: of v, {error}"
        ) from error
    for array in jax.tree.leaves(v):
        if array.dtype != dtype:
            raise ValueError(
                f"v must have the dtype of params, {dtype}: got v of dtype {array.dtype}. "
                "Convert it with jax.tree.map(lambda a: a.astype(...), v)."
            )
    return v


def _check_sigma_prime(objective: Objective, dtype: Any) -> None:
    activation = objective.model.sigma
    if ACTIVATIONS.get(activation.name) is not activation:
        z = jax.ShapeDtypeStruct((1, 1), dtype)
        _check_jvp(f"activation {activation.name!r} must have a sigma'", activation.sigma_prime, z)


def _check_loss(objective: Objective, batch: Batch, dtype: Any) -> None:
    loss = objective.loss
    if isinstance(loss, UserLoss):
        z = jax.ShapeDtypeStruct(objective.model.widths[-1:], dtype)

        def gradient(z: jax.Array) -> jax.Array:
            return jax.grad(loss.function)(z, jnp.zeros(batch.y.shape[1:], batch.y.dtype))

        _check_jvp(f"loss {loss.name!r} must have a gradient", gradient, z)


def _check_penalty(objective: Objective, params: Params) -> None:
    penalty = objective.regularizer
    if isinstance(penalty, UserPenalty):
        layers = jax.eval_shape(lambda p: logical_params(objective.model, p), params)
        _check_jvp("regularizer must have a gradient", jax.grad(penalty.value), layers)


def _check_jvp(what: str, function: Callable[..., Any], at: Any) -> None:
    """Refuse a user's function that jax.jvp cannot differentiate.

    It is lowered, not only traced: JAX puts off its refusal of a custom_vjp.
    """
    try:
        jax.jit(lambda at: jax.jvp(function, (at,), (at,))).lower(at)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{what} that jax.jvp differentiates: got {type(error).__name__}: {error}. Write it "
            "in jax.numpy, or give it a rule with jax.custom_jvp."
        ) from error
