"""R(W) against its definition, counted once whatever the mesh.

A failure on meshes with data > 1 only: R is added before the sum over data, or once a shard. A
failure on padded meshes only: R's gradient does not vanish on padding. db alone: `biases`.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import Problem, arrays, mesh_of, name_of, relative_error, samples
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.regularizers import ElementwisePenalty, get_regularizer

PROBLEM = Problem(widths=(17, 12, 10), activation="tanh", loss="mse")
MESHES = [(2, 2, 2), (8, 1, 1), (1, 1, 7)]


def quartic(layers):
    """Return a user's R, which couples layers and counts the biases."""
    (W_1, b_1), (W_2, b_2) = layers
    return jnp.sum(W_1**4) * jnp.sum(W_2) + jnp.sum(jnp.sin(b_1)) + b_2[3]


def elementwise(l1, l2, biases):
    """Return the definition of R with its gradient by jax.grad."""

    def R(layers):
        counted = [a for W, b in layers for a in ((W, b) if biases else (W,))]
        return sum(l1 * jnp.sum(jnp.abs(a)) + l2 * jnp.sum(a**2) for a in counted)

    return R


# name: (what a user passes, the definition)
REGULARIZERS = {
    "l2": (tpmlp.l2(0.3), elementwise(0.0, 0.3, False)),
    "l1": (tpmlp.l1(0.2), elementwise(0.2, 0.0, False)),
    "elastic_net": (tpmlp.elastic_net(0.4, 0.25), elementwise(0.1, 0.3, False)),
    "biases": (tpmlp.elastic_net(0.4, 0.25, biases=True), elementwise(0.1, 0.3, True)),
    "user": (quartic, quartic),
}


@cache
def by_definition(name):
    """Return R and its gradient by jax.grad of its definition, unsharded."""
    return jax.jit(jax.value_and_grad(REGULARIZERS[name][1]))(arrays(PROBLEM))


@cache
def with_regularizer(name, sizes):
    """Return loss + R and the gradients; their padding must be 0."""
    mesh = mesh_of(sizes)
    params = tpmlp.from_numpy(PROBLEM.model, arrays(PROBLEM), mesh)
    batch = tpmlp.shard_batch(PROBLEM.model, *samples(PROBLEM)[:2], mesh=mesh)
    step = tpmlp.value_and_grad(
        PROBLEM.model, loss="mse", mesh=mesh, regularizer=REGULARIZERS[name][0]
    )
    loss, grads = step(params, *batch)
    for (dW, db), (d_out, d_in) in zip(grads, [(12, 17), (10, 12)], strict=True):
        assert not np.asarray(dW)[d_out:].any()
        assert not np.asarray(dW)[:, d_in:].any()
        assert not np.asarray(db)[d_out:].any()
    return loss, tpmlp.to_numpy(PROBLEM.model, grads)


@pytest.mark.parametrize("tensor", ["loss", "dW_1", "db_1", "dW_2", "db_2"])
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_tensor_with_a_regularizer_is_that_of_the_data_plus_r_once(name, sizes, tensor):
    R, dR = by_definition(name)
    x, y, _ = samples(PROBLEM)
    loss, grads = reference.value_and_grad(arrays(PROBLEM), x, y, activation="tanh", loss="mse")
    wanted: dict[str, Any] = {"loss": loss + R}
    got: dict[str, Any] = {"loss": with_regularizer(name, sizes)[0]}
    for l in (1, 2):
        for k, kind in enumerate(("dW", "db")):
            wanted[f"{kind}_{l}"] = grads[l - 1][k] + dR[l - 1][k]
            got[f"{kind}_{l}"] = with_regularizer(name, sizes)[1][l - 1][k]
    assert relative_error(got[tensor], wanted[tensor]) <= FLOAT64


@pytest.mark.parametrize("name", ["l2", "l1", "elastic_net", "biases"])
def test_the_reference_of_a_regularizer_is_the_same_function(name):
    R, dR = by_definition(name)
    value, gradients = REGULARIZERS[name][0].reference(arrays(PROBLEM))
    assert value == pytest.approx(float(R), rel=FLOAT64)
    for (dW, db), (dW_wanted, db_wanted) in zip(gradients, dR, strict=True):
        assert relative_error(dW, dW_wanted) <= FLOAT64
        assert relative_error(np.zeros_like(db_wanted) if db is None else db, db_wanted) <= FLOAT64


def test_l1_has_gradient_zero_at_zero():
    assert float(ElementwisePenalty(l1=3.0).gradient(jnp.zeros(()))) == 0.0


UNTYPED: Any = tpmlp
BAD = {
    "negative": (lambda: tpmlp.l2(-0.5), "-0.5"),
    "negative l1": (lambda: tpmlp.l1(-1), "-1"),
    "nan": (lambda: tpmlp.l2(float("nan")), "nan"),
    "infinite": (lambda: tpmlp.l1(float("inf")), "inf"),
    "ratio above one": (lambda: tpmlp.elastic_net(0.1, 1.5), "ratio=1.5"),
    "negative coefficient": (lambda: tpmlp.elastic_net(-0.25, 0.5), "-0.25"),
    "string": (lambda: UNTYPED.l2("a"), "'a'"),
    "number": (lambda: get_regularizer(0.1), "regularizer=0.1"),
    "name": (lambda: get_regularizer("l2"), "regularizer='l2'"),
}


@pytest.mark.parametrize(("make", "value"), BAD.values(), ids=BAD)
def test_what_is_no_regularizer_is_refused_with_its_value(make, value):
    with pytest.raises(ValueError, match="must be") as refusal:
        make()
    assert value in str(refusal.value)
