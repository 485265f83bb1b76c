"""A sharded MLP inside a flax.nnx and an equinox module: gradients, shardings, and a run of each.

A failure of a gradient here, where tests/test_outputs.py passes, is in how a library's transforms
go through apply; of a sharding, in what its optimiser or its jit does with placed arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx

import tpmlp
from experiments.examples import equinox_model, flax_model
from tests.cases import mesh_of, relative_error
from tests.tolerances import FLOAT64
from tpmlp import reference

MLP = tpmlp.MLP((64, 12, 10))
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(30, 64)), RNG.integers(0, 10, 30)


@dataclass(frozen=True, kw_only=True)
class Library:
    """How one library's module is made, differentiated and trained.

    Attributes:
        program: the example.
        make: a mesh -> the module, in float32.
        arrays: a module, or gradients in its structure -> (MLP's parameters, LayerNorm's bias).
        widened: a module -> the same in float64.
        grad: the library's own jax.grad.
        trained: (module, steps) -> the module after them.
    """

    program: Any
    make: Callable[[Any], Any]
    arrays: Callable[[Any], tuple[Any, Any]]
    widened: Callable[[Any], Any]
    grad: Callable[..., Any]
    trained: Callable[[Any, int], Any]


def double(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(np.float64) if eqx.is_inexact_array(a) else a, tree)


def flax_arrays(tree: Any) -> tuple[Any, Any]:
    layers, norm = (
        (tree["layers"], tree["norm"])
        if isinstance(tree, nnx.State)
        else (dict(enumerate(tree.layers)), {"bias": tree.norm.bias})
    )
    params = tuple((layers[l][0][...], layers[l][1][...]) for l in range(len(layers)))
    return params, norm["bias"][...]


def flax_trained(model: Any, steps: int) -> Any:
    list(flax_model.train(model, steps))
    return model


@pytest.fixture(autouse=True)
def usual_promotion():
    """Let flax and optax mix types as JAX lets users do by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


LIBRARIES = {
    "flax": Library(
        program=flax_model,
        make=lambda mesh: flax_model.Classifier(MLP, mesh, nnx.Rngs(0)),
        arrays=flax_arrays,
        widened=lambda model: nnx.merge(nnx.split(model)[0], double(nnx.split(model)[1])),
        grad=lambda *arguments: nnx.jit(nnx.grad(flax_model.loss_of))(*arguments),
        trained=flax_trained,
    ),
    "equinox": Library(
        program=equinox_model,
        make=lambda mesh: equinox_model.Classifier(MLP, mesh, jax.random.key(0)),
        arrays=lambda tree: (tree.params, tree.norm.bias),
        widened=double,
        grad=lambda *arguments: eqx.filter_jit(eqx.filter_grad(equinox_model.loss_of))(*arguments),
        trained=lambda model, steps: list(equinox_model.train(model, steps))[-1][1],
    ),
}
every_library = pytest.mark.parametrize("name", LIBRARIES)


@cache
def differentiated(name: str) -> tuple[Any, Any]:
    """Return a module in float64 and the gradients of its loss."""
    library = LIBRARIES[name]
    model = library.widened(library.make(mesh_of((2, 2, 2))))
    return model, library.grad(model, X, Y)


def assert_placed_alike(arrays: Any, params: Any) -> None:
    for a, p in zip(jax.tree.leaves(arrays), jax.tree.leaves(params), strict=True):
        assert not p.sharding.is_fully_replicated
        assert a.sharding.is_equivalent_to(p.sharding, p.ndim)


@every_library
def test_gradients_of_a_module_are_the_references_and_placed_as_its_parameters(name):
    model, grads = differentiated(name)
    params, _ = LIBRARIES[name].arrays(model)
    got, dbias = LIBRARIES[name].arrays(grads)
    x = (X - X.mean(axis=1, keepdims=True)) / np.sqrt(X.var(axis=1, keepdims=True) + EPSILON[name])
    run = reference.trace(
        tpmlp.to_numpy(MLP, params), x, Y, activation="relu", loss="cross_entropy"
    )
    for l, (dW, db) in enumerate(tpmlp.to_numpy(MLP, got), 1):
        assert relative_error(dW, run.dW[l]) <= FLOAT64
        assert relative_error(db, run.db[l]) <= FLOAT64
    # LayerNorm's bias is added to x, so its gradient is the sum of dx = W_1^T g_1.
    dx = run.g[1] @ tpmlp.to_numpy(MLP, params)[0][0]
    assert relative_error(dbias, dx.sum(axis=0)) <= FLOAT64
    assert_placed_alike(got, params)


EPSILON = {"flax": 1e-6, "equinox": 1e-5}


@every_library
def test_parameters_stay_where_they_were_put_and_padding_stays_zero_in_training(name):
    library = LIBRARIES[name]
    model = library.program.make_model()
    before, _ = library.arrays(model)
    after, _ = library.arrays(library.trained(model, 2))
    assert_placed_alike(after, before)
    for new, old in zip(*map(jax.tree.leaves, (after, before)), strict=True):
        assert (np.asarray(new) != np.asarray(old)).any()
    for (W, b), (d_out, d_in) in zip(after, model.mlp.layer_shapes, strict=True):
        assert W.shape > (d_out, d_in)
        assert not np.asarray(W)[d_out:].any()
        assert not np.asarray(W)[:, d_in:].any()
        assert not np.asarray(b)[d_out:].any()


@every_library
def test_an_example_prints_a_loss_that_falls(name, capsys):
    assert LIBRARIES[name].program.main() == 0
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 20
