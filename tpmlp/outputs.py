"""apply: the outputs of a model, differentiable by jax.grad through the explicit backward pass."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec

from tpmlp.batch import check_sample_values, check_samples, fill
from tpmlp.kernels.network import param_dtype
from tpmlp.layout import padded
from tpmlp.models import Model, check_model
from tpmlp.parameters import check_params
from tpmlp.placement import SampleSpec
from tpmlp.randomness import check_dropout_key, random_words
from tpmlp.strategy import Strategy


def apply(
    model: Model,
    params: Any,
    x: Any,
    *,
    mesh: Mesh,
    strategy: Strategy | None = None,
    key: jax.Array | None = None,
    training: bool = False,
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
        model: the MLP or the Graph.
        params: placed for this mesh and strategy.
        x: samples [B, d_0]; of a Graph as in a step of value_and_grad.
        mesh: the mesh.
        strategy: Strategy() by default.
        key: from jax.random.key, for a Graph with Dropout while training.
        training: whether Dropout drops.

    Returns:
        Outputs [B, d_out], or [B, T, d_out].

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
    placement = model.place(mesh, strategy)
    params = check_params(model, params, placement)
    x = check_samples(placement, x)
    if not any(isinstance(array, Tracer) for array in jax.tree.leaves(x)):
        on_host = jax.tree.map(np.asarray, x)
        jax.tree.map(check_sample_values, placement.samples, on_host)
    keys = check_dropout_key(model, key) if training else ()
    return _apply(model, placement)(params, x, *keys)


@lru_cache(maxsize=16)
def _apply(model: Model, placement: Any) -> Callable[..., jax.Array]:
    outputs = _outputs(model, placement)
    width = placement.outputs.width

    def run(params: Any, x: Any, *keys: jax.Array) -> jax.Array:
        num_samples = jax.tree.leaves(x)[0].shape[0]
        rows = padded(num_samples, placement.row_blocks)

        def whole(spec: SampleSpec, array: jax.Array) -> jax.Array:
            array = array if spec.vocabulary else array.astype(param_dtype(params))
            return fill(array, (rows, *spec.padded_shape), jnp)

        words = random_words(keys[0]) if keys else None
        x = jax.tree.map(whole, placement.samples, x)
        return outputs(params, x, words)[:num_samples, ..., :width]

    return jax.jit(run)


def _outputs(model: Model, placement: Any) -> Callable[..., jax.Array]:
    """Return padded outputs as a function of padded arrays, with the kernel's own derivative."""
    network = model.network(placement)
    params = jax.tree.map(lambda s: s.spec, model.shardings(placement))
    x = jax.tree.map(lambda spec: spec.sharding.spec, placement.samples)
    float_x = jax.tree.map(
        lambda spec: None if spec.vocabulary else spec.sharding.spec, placement.samples
    )
    rows = placement.outputs.values.spec
    shard_map = partial(jax.shard_map, mesh=placement.mesh)
    kept = network.kept_specs

    def forward_body(params: Any, x: Any, words: Any) -> Any:
        outputs, kept = network.dropping(words).outputs(params, x)
        return outputs.T.reshape(-1, *placement.outputs.shape[:-1], outputs.shape[0]), kept

    def backward_body(params: Any, x: Any, words: Any, kept: Any, g: jax.Array) -> Any:
        columns = g.reshape(-1, g.shape[-1]).T
        return network.dropping(words).gradients(params, x, kept, columns)

    whole = PartitionSpec()
    forward = shard_map(forward_body, in_specs=(params, x, whole), out_specs=(rows, kept))
    backward = shard_map(
        backward_body, in_specs=(params, x, whole, kept, rows), out_specs=(params, float_x)
    )

    @jax.custom_vjp
    def outputs(params: Any, x: Any, words: Any) -> jax.Array:
        return forward(params, x, words)[0]

    def outputs_fwd(params: Any, x: Any, words: Any) -> Any:
        out, kept = forward(params, x, words)
        return out, (params, x, words, kept)

    def outputs_bwd(residue: Any, g: jax.Array) -> Any:
        params, x, words, kept = residue
        grads, dx = backward(params, x, words, kept, g)
        return grads, dx, None  # Bits have no derivative, and ids have None in dx.

    outputs.defvjp(outputs_fwd, outputs_bwd)
    return outputs
