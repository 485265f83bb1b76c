"""apply in a user's own program: what is differentiated there is the explicit backward pass.

tests/test_step.py shows that the gradient is right. A failure here alone means that a user's
transform of apply moves more than the kernel does, loses a sharding, or is not what it says.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import Problem, arrays, mesh_of, relative_error, samples
from tests.strategies import QUICKLY, counts, volumes, volumes_of
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.objective import make_objective
from tpmlp.predict import step_collectives

PROBLEM = Problem(widths=(17, 12, 20, 10))
MODEL = PROBLEM.model
X = samples(PROBLEM)[0]
V = np.random.default_rng(4).normal(size=(30, 10))
PLACES: dict[str, tuple[Any, tpmlp.Strategy]] = {
    "1x3x1": ((1, 3, 1), tpmlp.Strategy(layout="row")),
    "1x4x2, recompute": ((1, 4, 2), tpmlp.Strategy(keep="recompute")),
    "2x2x2": ((2, 2, 2), tpmlp.Strategy()),
    "2x3x1, split": ((2, 3, 1), tpmlp.Strategy(shard_weights=True)),
}
every_place = pytest.mark.parametrize("name", PLACES)


@cache
def placed(name: str) -> tuple[Any, dict[str, Any]]:
    """Return parameters, and where they are."""
    where = {"mesh": mesh_of(PLACES[name][0]), "strategy": PLACES[name][1]}
    return tpmlp.from_numpy(MODEL, arrays(PROBLEM), **where), where


def loss_of_all(params: Any, x: Any, **where: Any) -> jax.Array:
    """Return a loss that no mean over samples gives: it looks at the outputs of all at once."""
    outputs = tpmlp.apply(MODEL, params, x, **where)
    return jax.nn.logsumexp(outputs) + jnp.sum(jnp.sin(outputs))


@cache
def differentiated(name: str) -> tuple[Any, Any]:
    """Compile jax.grad of a user's loss in params and x; return the program and its result."""
    params, where = placed(name)
    gradient = jax.grad(lambda params, x: loss_of_all(params, x, **where), argnums=(0, 1))
    compiled = jax.jit(gradient).lower(params, X).compile(QUICKLY)
    return compiled, compiled(params, X)


@cache
def expected() -> tuple[reference.Trace, np.ndarray]:
    """Return the reference's trace with g_{L+1} of the user's loss, and dx = W_1^T g_1."""
    z = reference.forward(arrays(PROBLEM), X, activation="sigmoid")
    v = np.exp(z - z.max()) / np.exp(z - z.max()).sum() + np.cos(z)
    run = reference.trace(arrays(PROBLEM), X, activation="sigmoid", cotangent=v)
    return run, run.g[1] @ arrays(PROBLEM)[0][0]


@every_place
def test_the_gradient_of_a_loss_of_the_whole_batch_is_the_references(name):
    _, (dparams, dx) = differentiated(name)
    run, dx_wanted = expected()
    for l, (dW, db) in enumerate(tpmlp.to_numpy(MODEL, dparams), 1):
        assert relative_error(dW, run.dW[l]) <= FLOAT64
        assert relative_error(db, run.db[l]) <= FLOAT64
    assert relative_error(dx, dx_wanted) <= FLOAT64


@every_place
def test_gradients_keep_the_shardings_of_the_parameters_in_a_users_jit(name):
    params, _ = placed(name)
    for p, d in zip(*map(jax.tree.leaves, (params, differentiated(name)[1][0])), strict=True):
        assert d.shape == p.shape
        assert d.sharding.is_equivalent_to(p.sharding, p.ndim)


@every_place
def test_a_users_gradient_moves_what_the_kernel_is_predicted_to_and_nothing_else(name):
    params, where = placed(name)

    def squares(params, x):
        return jnp.sum(tpmlp.apply(MODEL, params, x, **where) ** 2)

    audit = tpmlp.audit(jax.jit(jax.grad(squares)).lower(params, X).compile(QUICKLY))
    placement = make_objective(MODEL, loss="output", **where).placement
    rows = step_collectives(placement, bias=True, batch_size=30, dtype="float64")
    assert volumes_of(audit) == volumes(rows)
    for kind in ("all_gather", "reduce_scatter"):
        assert audit.counts[kind] == counts(rows)[kind]


def test_jax_vjp_outside_jit_is_the_explicit_backward_pass():
    params, where = placed("2x2x2")
    outputs, transposed = jax.vjp(lambda p, x: tpmlp.apply(MODEL, p, x, **where), params, X)
    dparams, dx = transposed(jnp.asarray(V))
    run = reference.trace(arrays(PROBLEM), X, activation="sigmoid", cotangent=V)
    assert relative_error(outputs, run.z[3]) <= FLOAT64
    assert relative_error(dx, run.g[1] @ arrays(PROBLEM)[0][0]) <= FLOAT64
    for l, (dW, db) in enumerate(tpmlp.to_numpy(MODEL, dparams), 1):
        assert relative_error(dW, run.dW[l]) <= FLOAT64
        assert relative_error(db, run.db[l]) <= FLOAT64


def test_jvp_of_apply_is_refused_by_jax_and_of_its_gradient_is_the_hessian_product():
    params, where = placed("1x3x1")

    def mse(params):
        return jnp.mean((tpmlp.apply(MODEL, params, X, **where) - V) ** 2)

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(mse, (params,), (params,))

    def both(params, v):
        product = tpmlp.hessian_vector_product(MODEL, params, v, X, V, loss="mse", **where)
        return jax.jvp(jax.grad(mse), (params,), (v,))[1], product

    pair = jax.jit(both).lower(params, params).compile(QUICKLY)(params, params)
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        assert relative_error(a, b) <= FLOAT64
