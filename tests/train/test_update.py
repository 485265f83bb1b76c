"""A training step updates each layer as the recursion passes it.

A failure means that gradients of all layers are kept to the end of the backward pass: memory for a
second copy of the model.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import tpmlp
from tpmlp.ahead import step_shapes
from tpmlp.inspection.audit import Audit
from tpmlp.objective import make_objective
from tpmlp.train.optimizer import MaskedOptimizer, ShardedOptimizer, shape_trees
from tpmlp.train.run import compile_step

WIDTHS = (256,) * 9
BATCH = 16
# Of all layers, on one of eight devices.
GRADIENT_BYTES = 8 * 256 * 256 * 4 // 8


def audited(tx: optax.GradientTransformation) -> Audit:
    """Count what a step of fit holds, compiled for shapes alone."""
    mlp = tpmlp.MLP(WIDTHS)
    objective = make_objective(mlp, loss="mse", mesh=tpmlp.make_mesh(x=4, y=2))
    logical, padded = shape_trees(mlp, objective.placement, jnp.float32)
    masked = MaskedOptimizer(tx, padded, logical)
    optimizer = ShardedOptimizer(mlp, objective.placement, masked)
    params, batch = step_shapes(objective, BATCH)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(masked.init, params),
        optimizer.state_shardings,
    )
    return tpmlp.audit(compile_step(objective, optimizer, params, state, batch))


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adam(1e-3)], ids=["sgd", "adam"])
def test_no_stack_of_gradients_is_kept(tx):
    assert audited(tx).temp_bytes < GRADIENT_BYTES / 2


def test_a_norm_of_all_gradients_keeps_them_all():
    # So that the test above could fail: here they must all be there at once.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    assert audited(tx).temp_bytes > GRADIENT_BYTES


def test_parameters_and_state_are_updated_in_place():
    held = audited(optax.adam(1e-3))
    # Parameters and two moments; biases, and the count of steps, on top.
    assert held.alias_bytes >= 3 * GRADIENT_BYTES
