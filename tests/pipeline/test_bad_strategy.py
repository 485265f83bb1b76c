"""What a mesh with stages cannot do: one error each, by name, before anything is compiled."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest

import tpmlp
from tpmlp.pipeline.generators import make_schedule

# Untyped on purpose: some of these calls are wrong, and a type checker would say so.
api: Any = tpmlp

MODEL = tpmlp.MLP((3, 8, 8, 8, 5))
MESH = tpmlp.make_mesh(stage=2, x=2)
X = np.ones((4, 3), np.float32)


def step(model: Any = MODEL, mesh: Any = MESH, **strategy: Any) -> Any:
    return api.value_and_grad(model, loss="mse", mesh=mesh, strategy=api.Strategy(**strategy))


def params() -> Any:
    return MODEL.init(jax.random.key(0), MESH)


FOR_THREE = make_schedule("1f1b", 3, 4)
BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "layers": (
        lambda: step(mesh=api.make_mesh(stage=8)),
        ("num_layers=4", "stage=8", "chunks=1", "8 layers or more"),
    ),
    "layers of chunks": (
        lambda: step(schedule="interleaved", chunks=3, microbatches=2),
        ("num_layers=4", "stage=2", "chunks=3", "6 layers or more"),
    ),
    "widths": (
        lambda: step(api.MLP((3, 8, 9, 5))),
        ("widths=(3, 8, 9, 5)", "stage=2", "9 for all"),
    ),
    "microbatches of zero bubble": (
        lambda: step(schedule="zb-h1", microbatches=1),
        ("microbatches=1", "zb-h1", "1f1b"),
    ),
    "microbatches of interleaved": (
        lambda: step(schedule="interleaved", chunks=2, microbatches=3),
        ("microbatches=3", "interleaved"),
    ),
    "no chunks": (lambda: step(schedule="interleaved", microbatches=2), ("chunks=1", "1f1b")),
    "chunks of another schedule": (
        lambda: step(schedule="gpipe", chunks=2),
        ("chunks", "gpipe", "chunks=2", "interleaved"),
    ),
    "unknown schedule": (lambda: step(schedule="2f2b"), ("schedule='2f2b'", "zb-h1", "1f1b")),
    "a schedule for other stages": (
        lambda: step(schedule=FOR_THREE, microbatches=4),
        ("'1f1b' of 3 stages and 4 microbatches", "stage=2", "microbatches=4"),
    ),
    "chunks beside a schedule of one's own": (
        lambda: step(schedule=api.make_schedule("1f1b", 2, 4), microbatches=4, chunks=3),
        ("chunks=3", "'1f1b' with 1", "Leave chunks out"),
    ),
    "rings": (lambda: step(overlap="ring"), ("overlap='ring'", "stage=1")),
    "layout": (lambda: step(layout=("row",) * 4), ("layout", "one word", "'auto'")),
    "equal bits": (lambda: step(reduction="invariant"), ("reduction='invariant'", "stage=1")),
    "gradients of samples": (
        lambda: api.per_example_gradient_norms(MODEL, params(), X, X, loss="mse", mesh=MESH),
        ("gradients of one sample", "stage=2", "stage=1"),
    ),
    "a clipped sum": (
        lambda: api.clipped_gradient_sum(MODEL, params(), X, X, loss="mse", mesh=MESH, max_norm=1),
        ("gradients of one sample", "stage=2"),
    ),
    "a Hessian": (
        lambda: api.hessian_vector_product(MODEL, params(), params(), X, X, loss="mse", mesh=MESH),
        ("products with a curvature", "stage=2", "stage=1"),
    ),
    "a Gauss-Newton matrix": (
        lambda: api.gauss_newton_vector_product(
            MODEL, params(), params(), X, X, loss="mse", mesh=MESH
        ),
        ("products with a curvature", "stage=2"),
    ),
    "parameters of no stages": (
        lambda: step()(MODEL.init(jax.random.key(0), api.make_mesh(x=2)), X, X),
        ("placed for 2 stages", "of no stages", "reshard"),
    ),
    "parameters of stages": (
        lambda: step(mesh=api.make_mesh(x=2))(params(), X, X),
        ("placed for no stages", "of 2 stages with 1 chunks", "reshard"),
    ),
    "parameters of another schedule": (
        lambda: step(schedule="zb-v", microbatches=2)(params(), X, X),
        ("placed for 2 stages with 2 chunks", "with 1 chunks", "reshard"),
    ),
    "parameters of another model": (
        lambda: step(replace(MODEL, bias=False))(params(), X, X),
        ("num_layers=4, bias=False", "bias=True"),
    ),
    "a gradient through apply": (
        lambda: jax.grad(lambda p: api.apply(MODEL, p, X, mesh=MESH).sum())(params()),
        ("differentiated", "stage=2", "cotangent"),
    ),
    "an optimizer of whole layers": (
        lambda: api.fit(
            MODEL,
            (X, np.ones((4, 5), np.float32)),
            loss="mse",
            mesh=MESH,
            optimizer=optax.lamb(1e-3),
            steps=1,
            batch_size=4,
        ),
        ("elementwise", "stages", "scale_by_trust_ratio", "stage=1"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_with_name_value_and_way_out(name):
    call, words = BAD[name]
    with pytest.raises(ValueError, match=r".") as raised:
        call()
    for word in words:
        assert word in str(raised.value)
