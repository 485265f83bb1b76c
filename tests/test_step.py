"""The public functions: value_and_grad in a user's own program, and apply with its derivative.

tests/kernels shows that the kernel is right; a failure here alone is in what is around it: checks,
the transpose to features first, padding of batches, the custom derivative of apply.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tpmlp
from tests.cases import (
    FEW_PLACEMENTS,
    ONE_LAYOUT,
    PLACEMENTS,
    Problem,
    arrays,
    error_of,
    expected,
    mesh_of,
    name_of,
    relative_error,
    samples,
    strategy_of,
)
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.ahead import compile_lowered
from tpmlp.losses import Cotangent

PROBLEM = Problem(widths=(17, 12, 10))
MODEL = PROBLEM.model


@cache
def placed(placement):
    """Return parameters on a mesh, a step for them, and where they are."""
    mesh, strategy = mesh_of(placement[0]), strategy_of(placement[1], 2)
    params = tpmlp.from_numpy(MODEL, arrays(PROBLEM), mesh, strategy=strategy)
    step = tpmlp.value_and_grad(MODEL, loss="cross_entropy", mesh=mesh, strategy=strategy)
    return params, step, {"mesh": mesh, "strategy": strategy}


def assert_equal_gradients(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert relative_error(a, b) <= FLOAT64


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 7), (4, 2, 1), (2, 2, 2)], ids=name_of)
def test_a_step_gives_the_loss_with_r_and_gradients_placed_as_the_parameters(sizes):
    mesh = mesh_of(sizes)
    x, y, _ = samples(PROBLEM)
    params = tpmlp.from_numpy(MODEL, arrays(PROBLEM), mesh)
    step = tpmlp.value_and_grad(MODEL, loss="cross_entropy", mesh=mesh, regularizer=tpmlp.l2(0.1))
    loss, grads = step(params, x, y)
    wanted = reference.value_and_grad(
        arrays(PROBLEM), x, y, activation="sigmoid", loss="cross_entropy",
        regularizer=reference.l2(0.1),
    )  # fmt: skip
    assert loss.shape == ()
    assert relative_error(loss, wanted[0]) <= FLOAT64
    assert_equal_gradients(tpmlp.to_numpy(MODEL, grads), wanted[1])
    for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True):
        assert p.shape == g.shape
        assert g.sharding.is_equivalent_to(p.sharding, p.ndim)


@pytest.mark.parametrize("placement", FEW_PLACEMENTS[1:], ids=name_of)
@pytest.mark.parametrize("form", ["raw", "weighted", "placed"])
def test_a_step_inside_a_users_jit_gives_the_same(placement, form):
    params, step, where = placed(placement)
    x, y, _ = samples(PROBLEM)
    weight = np.linspace(0, 2, 30)
    batch = {
        "raw": (x, y),
        "weighted": (x, y, weight),
        "placed": tuple(tpmlp.shard_batch(MODEL, x, y, **where)),
    }[form]
    wanted = step(params, *batch)
    got = jax.jit(lambda params, *batch: step(params, *batch))(params, *batch)
    assert relative_error(got[0], wanted[0]) <= FLOAT64
    assert_equal_gradients(got[1], wanted[1])


def test_traced_values_are_padded_inside_a_users_jit():
    params, step, where = placed(((2, 2, 2), "row-column"))
    x, _, _ = samples(PROBLEM)
    v = np.random.default_rng(5).normal(size=(30, 10))
    step = tpmlp.value_and_grad(MODEL, loss="mse", **where)
    assert_equal_gradients(
        jax.jit(step)(params, x[:29], v[:29])[1], step(params, x[:29], v[:29])[1]
    )


def test_a_step_with_closed_over_samples_works_inside_a_users_jit():
    params, step, _ = placed(((1, 3, 1), "row"))
    x, y, _ = samples(PROBLEM)
    assert_equal_gradients(jax.jit(lambda p: step(p, x, y))(params)[1], step(params, x, y)[1])


def test_a_second_batch_compiles_nothing():
    params, step, where = placed(((2, 2, 2), "row-column"))
    x, y, _ = samples(PROBLEM)
    step(params, x, y)
    compiled = []

    def listen(event: str, duration_secs: float, **_: Any):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        step(params, x + 1, y)
        step(params, *tpmlp.shard_batch(MODEL, x + 2, y, **where))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in compiled if "compile" in event]


def test_a_lowered_step_is_the_program_of_a_call():
    params, step, where = placed(((1, 3, 1), "row"))
    x, y, _ = samples(PROBLEM)
    compiled = step.lower(params, x, y).compile()
    batch = tpmlp.shard_batch(MODEL, x, y, **where)
    assert float(compiled(params, batch)[0]) == float(step(params, x, y)[0])


class OutOfMemory:
    """Stands for the jitted step of a compiler that fails with a message."""

    def __init__(self, message: str) -> None:
        self.message = message

    def lower(self, *_: Any) -> Any:
        return self

    def compile(self) -> Any:
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_does_not_fit_is_an_error_with_the_predicted_table(monkeypatch):
    _, step, where = placed(((2, 2, 2), "row-column"))
    message = "RESOURCE_EXHAUSTED: Used 93.2G of 16.0G hbm"
    monkeypatch.setattr(step, "_jitted", OutOfMemory(message))
    with pytest.raises(MemoryError) as refusal:
        step.compile(4096)
    summary = MODEL.summary(**where, batch_size=4096, loss="cross_entropy")
    for part in ("batch_size=4096", "'data': 2", "microbatches", str(summary)):
        assert part in str(refusal.value)
    assert message in str(refusal.value.__cause__)


def test_a_step_of_fit_that_does_not_fit_says_so_too():
    _, step, where = placed(((2, 2, 2), "row-column"))
    lowered = OutOfMemory("RESOURCE_EXHAUSTED: Used 93.2G of 16.0G hbm").lower()
    with pytest.raises(MemoryError, match="batch_size=30") as refusal:
        compile_lowered(lowered, step.objective, 30)
    assert str(MODEL.summary(**where, batch_size=30, loss="cross_entropy")) in str(refusal.value)


def test_another_error_of_the_compiler_is_left_alone(monkeypatch):
    _, step, _ = placed(((2, 2, 2), "row-column"))
    monkeypatch.setattr(step, "_jitted", OutOfMemory("INTERNAL: out of ideas"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of ideas"):
        step.compile(4096)


V = np.random.default_rng(4).normal(size=(30, 10))


@cache
def applied(placement):
    """Return outputs of apply, and the gradients of <V, outputs>, inside a user's jit."""
    params, _, where = placed(placement)

    def f(params, x):
        outputs = tpmlp.apply(MODEL, params, x, **where)
        return jnp.sum(outputs * V), outputs

    x = jnp.asarray(samples(PROBLEM)[0])
    (_, outputs), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, x)
    return outputs, *grads


@cache
def by_reference():
    """Return the same from the reference; dx = W_1^T g_1."""
    t = reference.trace(arrays(PROBLEM), samples(PROBLEM)[0], activation="sigmoid", cotangent=V)
    return t, t.g[1] @ arrays(PROBLEM)[0][0]


@pytest.mark.parametrize("tensor", ["outputs", "dW_1", "db_1", "dW_2", "db_2", "dx"])
@pytest.mark.parametrize("placement", ONE_LAYOUT[::2], ids=name_of)
def test_apply_and_its_derivative_equal_the_reference(placement, tensor):
    outputs, dparams, dx = applied(placement)
    t, dx_wanted = by_reference()
    got, wanted = {"outputs": outputs, "dx": dx}, {"outputs": t.z[2], "dx": dx_wanted}
    for l, (dW, db) in enumerate(tpmlp.to_numpy(MODEL, dparams), 1):
        got |= {f"dW_{l}": dW, f"db_{l}": db}
        wanted |= {f"dW_{l}": t.dW[l], f"db_{l}": t.db[l]}
    assert relative_error(got[tensor], wanted[tensor]) <= FLOAT64


@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
@pytest.mark.parametrize("num_samples", [1, 30])
def test_apply_outside_jit_gives_outputs_at_logical_shape(placement, num_samples):
    params, _, where = placed(placement)
    x = samples(PROBLEM)[0][:num_samples]
    outputs = tpmlp.apply(MODEL, params, x, **where)
    wanted = reference.forward(arrays(PROBLEM), x, activation="sigmoid")
    assert outputs.shape == (num_samples, 10)
    assert relative_error(outputs, wanted) <= FLOAT64


def test_jax_grad_through_apply_equals_the_step():
    params, step, where = placed(((2, 2, 2), "row-column"))
    x, y, _ = samples(PROBLEM)

    def loss(params):
        log_softmax = jax.nn.log_softmax(tpmlp.apply(MODEL, params, x, **where))
        return -jnp.mean(log_softmax[jnp.arange(30), y])

    assert_equal_gradients(jax.grad(loss)(params), step(params, x, y)[1])


EXACT = st.sampled_from(["relu", "gelu", "silu", "tanh", "sigmoid", "softplus", "identity"])
LOSSES = ["mse", "cross_entropy", "logistic", "output", tpmlp.cross_entropy(0.2), Cotangent()]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    placement=st.sampled_from(PLACEMENTS),
    problem=st.builds(
        Problem,
        widths=st.lists(st.integers(1, 20), min_size=2, max_size=5).map(tuple),
        activation=EXACT,
        bias=st.booleans(),
        loss=st.sampled_from(LOSSES),
        num_samples=st.integers(2, 9),
        weighted=st.booleans(),
        seed=st.integers(0, 1000),
    ),
)
def test_any_model_on_any_mesh_equals_the_reference(placement, problem):
    for tensor in expected(problem):
        assert error_of(problem, placement, tensor) <= FLOAT64, tensor
