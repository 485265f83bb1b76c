"""On a CUDA device, what the CPU tests claim: the kernel is the reference's.

A failure means that the compiler for GPUs, not the kernel, computes something else, or that
products run in a lower precision than verify asks for.
"""

import jax
import numpy as np
import pytest

import tpmlp

pytestmark = pytest.mark.gpu

MODEL = tpmlp.MLP((17, 12, 20, 10), activation="sigmoid")


@pytest.fixture
def mesh():
    return tpmlp.make_mesh(devices=jax.devices("gpu")[:1])


@pytest.mark.parametrize("kind", ["float64", "integers", "float32"])
def test_every_tensor_is_within_its_bound(mesh, kind):
    assert tpmlp.verify(MODEL, mesh, kind=kind).ok


def test_init_draws_the_bits_that_the_cpu_draws(mesh):
    cpu = tpmlp.make_mesh(x=4, y=2, devices=jax.devices("cpu"))
    drawn = [tpmlp.to_numpy(MODEL, MODEL.init(jax.random.key(0), m)) for m in (mesh, cpu)]
    for (W, _), (W_cpu, _) in zip(*drawn, strict=True):
        np.testing.assert_array_equal(W, W_cpu)


def test_fit_learns(mesh):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 17)), rng.integers(0, 10, 64)
    result = tpmlp.fit(
        MODEL, (x, y), loss="cross_entropy", mesh=mesh, steps=300, batch_size=64, progress=False
    )
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
