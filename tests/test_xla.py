"""The orders that XLA is given on accelerators, traced and run on CPU devices.

These devices are told that they are none, so that the steps here are those of TPUs and GPUs. What
fails here alone would fail there on the first step: a barrier refused because its arrays differ
over different mesh axes, or one that changes a value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import tpmlp
from tests.tolerances import FLOAT64
from tpmlp import reference, xla
from tpmlp.ahead import step_shapes

MODEL = tpmlp.MLP((6, 10, 9, 4), activation="tanh")
STRATEGIES = {
    "default": tpmlp.Strategy(),
    "recompute": tpmlp.Strategy(keep="recompute"),
    "ring": tpmlp.Strategy(overlap="ring"),
    "shard_weights": tpmlp.Strategy(shard_weights=True),
    "microbatches": tpmlp.Strategy(microbatches=2),
}


@pytest.fixture
def elsewhere(monkeypatch):
    """Have the package take CPU devices for others."""
    monkeypatch.setattr(xla, "on_cpu", lambda: False)


def _gradients(sizes, strategy):
    data, x, y = sizes
    mesh = tpmlp.make_mesh(data=data, x=x, y=y)
    rng = np.random.default_rng(0)
    arrays = [
        (rng.normal(size=(o, i)), rng.normal(size=o))
        for i, o in zip(MODEL.widths, MODEL.widths[1:], strict=False)
    ]
    params = tpmlp.from_numpy(MODEL, arrays, mesh, strategy=strategy)
    samples = rng.normal(size=(12, 6)), rng.normal(size=(12, 4))
    step = tpmlp.value_and_grad(MODEL, loss="mse", mesh=mesh, strategy=strategy)
    _, grads = step(params, *samples)
    _, expected = reference.value_and_grad(arrays, *samples, activation="tanh", loss="mse")
    got = tpmlp.to_numpy(MODEL, grads)
    return jax.tree.leaves(got), jax.tree.leaves(expected)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (4, 2, 1), (8, 1, 1)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_gradients_are_the_references_under_the_orders_of_accelerators(name, sizes):
    for got, expected in zip(*_gradients(sizes, STRATEGIES[name]), strict=True):
        assert np.abs(got - expected).max() <= FLOAT64 * np.abs(expected).max()


@pytest.mark.usefixtures("elsewhere")
def test_hold_leaves_every_array_the_axes_it_differs_over():
    mesh = tpmlp.make_mesh(data=2, x=2, y=2)
    seen = {}

    def body(W, z):
        held = xla.hold((W, z))
        seen["axes"] = [jax.typeof(a).manual_axis_type.varying for a in held]
        return held

    specs = PartitionSpec("x", "y"), PartitionSpec(("x", "y"), "data")
    mapped = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs))
    arrays = jnp.arange(64.0).reshape(8, 8), -jnp.arange(64.0).reshape(8, 8)
    held = mapped(*arrays)
    assert seen["axes"] == [{"x", "y"}, {"x", "y", "data"}]
    assert all((a == b).all() for a, b in zip(held, arrays, strict=True))


@pytest.mark.usefixtures("elsewhere")
def test_every_layer_of_the_backward_pass_waits_at_a_barrier():
    # Without it an accelerator's compiler merges the second gather of h_l with the first.
    step = tpmlp.value_and_grad(MODEL, loss="mse", mesh=tpmlp.make_mesh(x=8))
    params, batch = step_shapes(step.objective, 12)
    text = step.lower(params, *batch).as_text()
    assert text.count("stablehlo.optimization_barrier") >= MODEL.num_layers


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_what_is_moved_as_bits_takes_its_tangent_along(dtype):
    x = jnp.arange(6, dtype=dtype).reshape(2, 3)
    moved, tangent = jax.jvp(lambda x: xla.on_bits(jnp.transpose, x), (x,), (x + 1,))
    np.testing.assert_array_equal(moved, x.T)
    np.testing.assert_array_equal(tangent, x.T + 1)


def test_a_product_with_a_written_transpose_has_the_tangent_of_a_product():
    mesh = tpmlp.make_mesh(devices=jax.devices()[:1])
    a, b = jnp.arange(40.0).reshape(5, 8), jnp.ones((5, 3))
    run = jax.shard_map(
        lambda a: xla.product("ab,ac->bc", a, b, None),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
    )
    assert "bitcast_convert" in jax.jit(run).lower(a).as_text()
    np.testing.assert_array_equal(jax.jvp(run, (a,), (a + 1,))[1], (a + 1).T @ b)
