"""The global norm is that of the logical arrays, on every mesh, and scalars are all that moves.

A failure of a number means that padding or a copy was counted, or that R was left out; of the
audit, that an array is gathered to be summed.
"""

from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest

import tpmlp
from tests.cases import (
    FEW_PLACEMENTS,
    ONE_LAYOUT,
    Problem,
    Sizes,
    arrays,
    mesh_of,
    name_of,
    relative_error,
    samples,
    strategy_of,
)
from tests.strategies import QUICKLY
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.train.optimizer import standard_promotion

PROBLEM = Problem(widths=(17, 12, 10))
INTEGERS = Problem(widths=(17, 12, 10), integers=True)
MODEL = PROBLEM.model


def logical_square(layers: Any) -> float:
    return float(sum(np.square(a).sum() for layer in layers for a in layer))


@cache
def with_r() -> Any:
    """Return the reference's gradient of loss + R."""
    x, y, _ = samples(PROBLEM)
    return reference.value_and_grad(
        arrays(PROBLEM), x, y, activation="sigmoid", loss="cross_entropy",
        regularizer=reference.l2(0.1),
    )[1]  # fmt: skip


@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
def test_the_norm_of_a_steps_gradients_has_r_in_it_once(placement):
    where = {"mesh": mesh_of(placement[0]), "strategy": strategy_of(placement[1], 2)}
    step = tpmlp.value_and_grad(MODEL, loss="cross_entropy", regularizer=tpmlp.l2(0.1), **where)

    def run(params: Any, x: Any, y: Any) -> jax.Array:
        return tpmlp.global_norm(MODEL, step(params, x, y)[1], **where)

    params = tpmlp.from_numpy(MODEL, arrays(PROBLEM), **where)
    norm = jax.jit(run, compiler_options=QUICKLY)(params, *samples(PROBLEM)[:2])
    assert relative_error(norm, logical_square(with_r()) ** 0.5) <= FLOAT64


@pytest.mark.parametrize("placement", ONE_LAYOUT, ids=name_of)
def test_clipped_gradients_have_the_norm_of_the_bound_and_the_same_direction(placement):
    where = {"mesh": mesh_of(placement[0]), "strategy": strategy_of(placement[1], 2)}
    grads, norm = tpmlp.from_numpy(MODEL, with_r(), **where), logical_square(with_r()) ** 0.5
    clipped, before = tpmlp.clip_by_global_norm(MODEL, grads, norm / 3, **where)
    assert relative_error(before, norm) <= FLOAT64
    for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(grads), strict=True):
        assert relative_error(a, np.asarray(b) / 3) <= FLOAT64
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)


def test_the_norm_is_optaxs_and_that_of_the_logical_arrays_bit_for_bit(mesh):
    for split in {False, mesh.shape["data"] > 1}:
        where = {"mesh": mesh, "strategy": tpmlp.Strategy(shard_weights=split)}

        def norms(grads: Any, where: Any = where) -> Any:
            with standard_promotion():
                # optax is right too: padding is 0, and XLA counts a copy once.
                return tpmlp.global_norm(MODEL, grads, **where), optax.tree.norm(grads)

        grads = tpmlp.from_numpy(MODEL, arrays(INTEGERS), **where)
        got = jax.jit(norms, compiler_options=QUICKLY)(grads)
        wanted = np.sqrt(np.float32(logical_square(arrays(INTEGERS))))
        assert list(map(float, got)) == [float(wanted)] * 2


@pytest.mark.parametrize("sizes", [(1, 5, 1), (2, 2, 2), (8, 1, 1)], ids=name_of)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_one_scalar_is_all_that_moves(sizes: Sizes, split: bool):
    where = {"mesh": mesh_of(sizes), "strategy": tpmlp.Strategy(shard_weights=split)}
    grads = tpmlp.from_numpy(MODEL, arrays(PROBLEM), **where)
    rows = tpmlp.audit(
        jax.jit(lambda grads: tpmlp.clip_by_global_norm(MODEL, grads, 0.5, **where)), grads
    ).collectives
    axes = {axis for axis, size in zip(("data", "x", "y"), sizes, strict=True) if size > 1}
    axes -= set() if split else {"data"}
    p = np.prod([dict(mesh_of(sizes).shape)[axis] for axis in axes])
    found = [(row.kind, set(row.axes), row.bytes, row.count) for row in rows]
    assert found == ([("all_reduce", axes, 2 * 8 * (p - 1) / p, 1)] if axes else [])


@pytest.mark.parametrize("sizes", [(1, 5, 1), (2, 2, 2)], ids=name_of)
def test_optaxs_clipping_moves_scalars_alone(sizes: Sizes):
    grads = tpmlp.from_numpy(MODEL, arrays(PROBLEM), mesh_of(sizes))
    clip = optax.clip_by_global_norm(0.5)
    rows = tpmlp.audit(jax.jit(lambda g: clip.update(g, clip.init(g))[0]), grads).collectives
    assert {row.kind for row in rows} == {"all_reduce"}
    num_arrays = len(jax.tree.leaves(grads))
    assert sum(row.bytes * (row.count or 0) for row in rows) <= num_arrays * 2 * 8


def test_gradients_shorter_than_the_bound_and_of_zero_stay_as_they_are():
    mesh = mesh_of((1, 2, 2))
    for numbers in (arrays(PROBLEM), jax.tree.map(np.zeros_like, arrays(PROBLEM))):
        grads = tpmlp.from_numpy(MODEL, numbers, mesh)
        clipped, _ = tpmlp.clip_by_global_norm(MODEL, grads, 100, mesh=mesh)
        for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(grads), strict=True):
            assert np.asarray(a).tolist() == np.asarray(b).tolist()


def test_the_sum_of_bfloat16_is_in_float32():
    mesh, model = mesh_of((1, 2, 2)), tpmlp.MLP((64, 64), bias=False)
    W = np.full((64, 64), 1.0)
    W[0, 0] = 3.0
    grads = tpmlp.from_numpy(model, [(W.astype("bfloat16"), None)], mesh)
    norm = tpmlp.global_norm(model, grads, mesh=mesh)
    # 4104 has more bits than bfloat16.
    assert np.asarray(norm) == np.sqrt(np.float32(4104))
