"""The global norm of gradients that are split over a mesh, and clipping by it.

Gradients are padded arrays over the whole mesh, with copies where an axis does not split them. The
norm is that of the logical arrays: padding is 0, and a copy counts once. R is in it where it is in
the gradients, as in those of a step.

optax.clip_by_global_norm, also within fit, scales by the same number, as XLA adds the same sums:
with an all-reduce for each group of axes that some array is split over, and one scalar an array.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tpmlp.checks import check_positive
from tpmlp.kernels.objective import terms_of
from tpmlp.models import Model, check_model
from tpmlp.parameters import check_params
from tpmlp.strategy import Strategy


class ClippedGradients(NamedTuple):
    """What clip_by_global_norm gives.

    Attributes:
        grads: the gradients, scaled.
        norm: their global norm before, a scalar.
    """

    grads: Any
    norm: jax.Array


def global_norm(
    model: Model, grads: Any, *, mesh: Mesh, strategy: Strategy | None = None
) -> jax.Array:
    """Return sqrt(sum_l |dW_l|^2 + |db_l|^2), the norm of all gradients as one vector.

    Works inside jax.jit too. One scalar is all-reduced, over the axes that split the gradients.

    Args:
        model: the model.
        grads: gradients of a step, or parameters, placed for this mesh and strategy.
        mesh: the mesh.
        strategy: Strategy() by default.

    Returns:
        A scalar in the widest type of the gradients and float32.

    Raises:
        ValueError: gradients of another model, mesh or layout.

    Examples:
        >>> import numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(data=2, x=4)
        >>> mlp = tpmlp.MLP((3, 1))
        >>> grads = tpmlp.from_numpy(mlp, [(np.float32([[1, 4, 8]]), np.zeros(1))], mesh)
        >>> float(global_norm(mlp, grads, mesh=mesh))
        9.0
    """
    grads, placement = _checked(model, grads, mesh, strategy)
    return _global_norm(model, placement)(grads)


def clip_by_global_norm(
    model: Model,
    grads: Any,
    max_norm: Any,
    *,
    mesh: Mesh,
    strategy: Strategy | None = None,
) -> ClippedGradients:
    """Scale gradients by min(1, max_norm / norm), norm their global norm.

    Args:
        model: the model.
        grads: gradients of a step, placed for this mesh and strategy.
        max_norm: a positive number; traced in a program of yours, if you like.
        mesh: the mesh.
        strategy: Strategy() by default.

    Returns:
        ClippedGradients(grads, norm): placed as they were, and the norm before.

    Raises:
        ValueError: gradients of another model, mesh or layout; max_norm is not positive.

    Examples:
        >>> import numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(data=2, x=4)
        >>> mlp = tpmlp.MLP((3, 1))
        >>> grads = tpmlp.from_numpy(mlp, [(np.float32([[1, 4, 8]]), np.zeros(1))], mesh)
        >>> clipped, norm = clip_by_global_norm(mlp, grads, 4.5, mesh=mesh)
        >>> tpmlp.to_numpy(mlp, clipped)[0][0], float(norm)
        (array([[0.5, 2. , 4. ]], dtype=float32), 9.0)
    """
    check_positive("max_norm", max_norm, "Use for example max_norm=1.0.")
    grads, placement = _checked(model, grads, mesh, strategy)
    return _clip_by_global_norm(model, placement)(grads, max_norm)


def _checked(model: Model, grads: Any, mesh: Mesh, strategy: Strategy | None) -> tuple[Any, Any]:
    check_model(model)
    placement = model.place(mesh, strategy)
    return check_params(model, grads, placement), placement


@lru_cache(maxsize=16)
def _global_norm(model: Model, placement: Any) -> Callable[[Any], jax.Array]:
    specs = jax.tree.map(lambda s: s.spec, model.shardings(placement))
    network = model.network(placement)

    def body(params: Any) -> jax.Array:
        return terms_of(network).global_norm(params, network)

    mesh = placement.mesh
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec()))


@lru_cache(maxsize=16)
def _clip_by_global_norm(model: Model, placement: Any) -> Callable[[Any, Any], ClippedGradients]:
    norm_of = _global_norm(model, placement)

    def clip(grads: Any, max_norm: jax.Array) -> ClippedGradients:
        norm = norm_of(grads)
        # A norm of 0 gives a factor of min(1, inf).
        factor = jnp.minimum(1, max_norm.astype(norm.dtype) / norm)
        return ClippedGradients(jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm)

    return jax.jit(clip)
