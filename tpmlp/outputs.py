"""apply: the outputs of a model, differentiable by jax.grad through the explicit backward pass."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from tpmlp.batch import check_features, fill
from tpmlp.checks import check_finite
from tpmlp.kernels import backprop
from tpmlp.kernels.backprop import Chain
from tpmlp.layout import padded
from tpmlp.model import MLP, Params, chain_of, param_shardings
from tpmlp.objective import check_model
from tpmlp.parameters import check_params
from tpmlp.strategy import Strategy


def apply(
    model: MLP, params: Params, x: Any, *, mesh: Mesh, strategy: Strategy | None = None
) -> jax.Array:
    """Return the outputs h(W, x) at logical width.

    Differentiable by jax.grad and jax.vjp, in params and in x: the derivative is the explicit
    backward pass, not a derivative of the forward pass. It works inside a program of the user's,
    under jax.jit or in a module of flax or equinox (experiments/examples), and gradients are
    placed as the parameters.

    jax.jvp refuses it, as it does any function with a reverse derivative of its own. Curvature
    along a direction is tpmlp.hessian_vector_product or gauss_newton_vector_product; for a loss
    of the user's own, jax.jvp of jax.grad of that loss, which goes through.

    Args:
        model: the MLP.
        params: placed for this mesh and strategy.
        x: samples [B, d_0].
        mesh: the mesh.
        strategy: Strategy() by default.

    Returns:
        Outputs [B, d_out].

    Raises:
        ValueError: parameters of another model, mesh or layout; x of a wrong shape or dtype, or
            with a NaN or an infinity.

    Examples:
        >>> import jax, numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(x=4, y=2)
        >>> mlp = tpmlp.MLP((3, 10))
        >>> params = mlp.init(jax.random.key(0), mesh)
        >>> x = np.ones((30, 3), np.float32)
        >>> grads = jax.grad(lambda params: apply(mlp, params, x, mesh=mesh).sum())(params)
        >>> tpmlp.to_numpy(mlp, grads)[0][1]  # db: every sample counts once
        array([30., 30., 30., 30., 30., 30., 30., 30., 30., 30.], dtype=float32)
    """
    check_model(model)
    chain = chain_of(model, mesh, strategy)
    params = check_params(model, params, chain.placement)
    x = check_features(x, chain.placement.widths[0])
    if not isinstance(x, Tracer):
        check_finite("x", np.asarray(x))
    return _apply(model, chain)(params, x)


@lru_cache(maxsize=16)
def _apply(model: MLP, chain: Chain) -> Callable[[Params, jax.Array], jax.Array]:
    placement = chain.placement
    outputs = _outputs(model, chain)

    def run(params: Params, x: jax.Array) -> jax.Array:
        rows = padded(x.shape[0], placement.row_blocks)
        x_whole = fill(x.astype(params[0][0].dtype), (rows, placement.padded_widths[0]), jnp)
        return outputs(params, x_whole)[: x.shape[0], : placement.widths[-1]]

    return jax.jit(run)


def _outputs(model: MLP, chain: Chain) -> Callable[[Params, jax.Array], jax.Array]:
    """Return padded outputs as a function of padded arrays, with the kernel's own derivative."""
    placement = chain.placement
    num_layers = model.num_layers
    params = jax.tree.map(lambda s: s.spec, param_shardings(model, placement))
    x = placement.spec("B/d I/s/g", 1)
    kept = [backprop.is_kept(l, num_layers, placement.strategy) for l in range(1, num_layers)]
    z = [placement.spec("O/g/s B/d", l) if is_kept else None for l, is_kept in enumerate(kept, 1)]
    rows = placement.spec("B/d O/g/s", num_layers)
    shard_map = partial(jax.shard_map, mesh=placement.mesh)

    def forward_body(layers: Any, x: jax.Array) -> Any:
        passed = backprop.forward(layers, x, chain)
        return passed.z[-1].T, backprop.keep(passed, chain).z

    def backward_body(layers: Any, x: jax.Array, z: Any, g: jax.Array) -> Any:
        kept = backprop.Kept(z, [None] * num_layers)
        result = backprop.backward(layers, x, kept, g.T, chain)
        grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), result.grads, layers)
        return grads, result.dx.T.astype(x.dtype)

    forward = shard_map(forward_body, in_specs=(params, x), out_specs=(rows, z))
    backward = shard_map(backward_body, in_specs=(params, x, z, rows), out_specs=(params, x))

    @jax.custom_vjp
    def outputs(params: Params, x: jax.Array) -> jax.Array:
        return forward(params, x)[0]

    def outputs_fwd(params: Params, x: jax.Array) -> Any:
        out, z = forward(params, x)
        return out, (params, x, z)

    def outputs_bwd(kept: Any, g: jax.Array) -> Any:
        params, x, z = kept
        return backward(params, x, z, g)

    outputs.defvjp(outputs_fwd, outputs_bwd)
    return outputs
