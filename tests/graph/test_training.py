"""A sharded language model trains on real text as plain JAX and optax train the unsharded one.

A failure here with test_engine.py right is one of the loss, of the optimiser on padded arrays, or
of an array that a step leaves in another place than it found it.
"""

import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tpmlp
from tests.tolerances import FLOAT64
from tpmlp.graph import language_model, plain

TOKENS, STEPS, BATCH = 8, 6, 4


def text() -> tuple[np.ndarray, np.ndarray]:
    """Return pieces of a documentation as ids [STEPS * BATCH, TOKENS], and the next ones."""
    ids = np.frombuffer(inspect.cleandoc(json.__doc__ or "").encode("ascii"), np.uint8)
    pieces = ids[: STEPS * BATCH * (TOKENS + 1)].reshape(-1, TOKENS + 1).astype(np.int32)
    return pieces[:, :-1], pieces[:, 1:]


def test_a_language_model_trains_step_for_step_as_in_plain_jax():
    model = language_model(128, 16, TOKENS, num_blocks=2, num_heads=4, hidden=20)
    mesh, optimizer = tpmlp.make_mesh(data=2, x=2, y=2), optax.adam(3e-2)
    x, y = text()
    params = model.init(jax.random.key(0), mesh, dtype="float64")
    logical = jax.tree.map(jnp.asarray, tpmlp.to_numpy(model, params))
    sharded = tpmlp.value_and_grad(model, loss="cross_entropy", mesh=mesh)

    def unsharded(params: Any, x: Any, y: Any) -> jax.Array:
        logits = plain.outputs(model, params, {model.sources[0].name: x})[model.output]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    expected = jax.jit(jax.value_and_grad(unsharded))
    state, plain_state = optimizer.init(params), optimizer.init(logical)
    losses = []
    for i in range(STEPS):
        batch = slice(i * BATCH, (i + 1) * BATCH)
        loss, grads = sharded(params, x[batch], y[batch])
        wanted, plain_grads = expected(logical, x[batch], y[batch])
        assert abs(loss - wanted) <= FLOAT64 * wanted
        with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
            updates, state = optimizer.update(grads, state, params)
            plain_updates, plain_state = optimizer.update(plain_grads, plain_state, logical)
        params = optax.apply_updates(params, updates)
        logical = optax.apply_updates(logical, plain_updates)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
