"""verify says ok for the kernel, and WRONG, at the right tensor, for a kernel with a fault.

A failure here means that a green report of `make verify` says nothing.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tpmlp import activations
from tpmlp.inspection.bounds import Operation
from tpmlp.inspection.trace import _traced
from tpmlp.inspection.verify import KINDS
from tpmlp.kernels import dense

MODEL = tpmlp.MLP((9, 7, 5), activation="sigmoid")


@pytest.fixture
def mesh():
    return tpmlp.make_mesh(x=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "logistic", "output"])
def test_the_kernel_is_within_its_bounds(mesh, kind, loss):
    report = tpmlp.verify(MODEL, mesh, kind=kind, loss=loss)
    assert report.ok
    assert [check.tensor for check in report.checks if check.tensor.startswith("dW")] == [
        "dW_2",
        "dW_1",
    ]


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_every_activation_is_within_its_bounds(mesh, kind, name):
    assert tpmlp.verify(replace(MODEL, activation=name), mesh, kind=kind).ok


@pytest.fixture
def compiled_anew():
    """Forget compiled traces, before a fault is put in and after."""
    _traced.cache_clear()
    yield
    _traced.cache_clear()


def wrong_dW(g, h, run, /, **axes):
    return right_dW(g, h, run, **axes) * (1 + 1e-4)


right_dW = dense.backward_weight


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_factor_in_dW_is_found_in_dW_alone(mesh, kind, monkeypatch):
    monkeypatch.setattr(dense, "backward_weight", wrong_dW)
    report = tpmlp.verify(MODEL, mesh, kind=kind)
    assert {check.tensor for check in report.checks if not check.ok} == {"dW_1", "dW_2"}
    assert "WRONG" in str(report)


def test_a_wrong_sigma_prime_is_found_where_it_is(mesh, monkeypatch):
    sigmoid = activations.ACTIVATIONS["sigmoid"]
    broken = replace(sigmoid, sigma_prime=lambda z: sigmoid.sigma_prime(z) + 1e-5)
    monkeypatch.setitem(activations.ACTIVATIONS, "sigmoid", broken)
    report = tpmlp.verify(replace(MODEL), mesh, kind="float32")
    assert [check.tensor for check in report.checks if not check.ok] == ["sigma_prime_1"]
    # End to end everything below is wrong too: only the operation's own inputs tell them apart.
    end_to_end = tpmlp.verify(replace(MODEL), mesh, kind="float64")
    assert {"sigma_prime_1", "g_1", "dW_1"} <= {c.tensor for c in end_to_end.checks if not c.ok}


def test_nan_is_wrong():
    operation = Operation(
        tensor="z_1",
        layer=1,
        phase="forward",
        computed=jnp.full(3, jnp.nan),
        exact=np.ones(3),
        bound=np.ones(3),
    )
    assert set(operation.by_device().values()) == {np.inf}


@pytest.mark.parametrize(
    "fields",
    [
        {"compute_dtype": "bfloat16"},
        {"compute_dtype": "bfloat16", "reduce_dtype": "bfloat16"},
        {"reduce_dtype": "bfloat16"},
        {"compute_dtype": "float64"},
    ],
)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_every_type_is_within_its_bounds(mesh, fields, loss):
    report = tpmlp.verify(MODEL, mesh, kind="float32", loss=loss, strategy=tpmlp.Strategy(**fields))
    assert report.ok
    assert report.fault is None


def test_float64_in_narrower_types_is_refused(mesh):
    narrow = tpmlp.Strategy(compute_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"compute_dtype='bfloat16'.*kind='float32'"):
        tpmlp.verify(MODEL, mesh, kind="float64", strategy=narrow)


def test_integers_too_large_for_bfloat16_are_refused(mesh):
    narrow = tpmlp.Strategy(compute_dtype="bfloat16")
    with pytest.raises(ValueError, match="2\\^8, which bfloat16 holds"):
        tpmlp.verify(MODEL, mesh, kind="integers", strategy=narrow)


def test_float64_without_x64_is_refused():
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64=False"):
        tpmlp.verify(MODEL, tpmlp.make_mesh(x=1), kind="float64")


def test_an_unknown_kind_is_refused():
    kind: Any = "float16"
    with pytest.raises(ValueError, match="kind='float16'"):
        tpmlp.verify(MODEL, tpmlp.make_mesh(x=1), kind=kind)


def test_integers_that_could_round_are_refused():
    wide = tpmlp.MLP((512,) * 6)
    with pytest.raises(ValueError, match="2\\^24"):
        tpmlp.verify(wide, tpmlp.make_mesh(x=1), kind="integers")


def test_a_users_activation_is_verified_too(mesh):
    model = replace(MODEL, activation=(jnp.sin, jnp.cos))
    assert tpmlp.verify(model, mesh, kind="float64").ok
