"""Graphs that a pipeline does not run: one error each, by name, before anything is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import tpmlp
from tpmlp.graph import (
    Activation,
    ActivityL1,
    Concatenate,
    Dense,
    Input,
    Repeat,
    Sum,
    Vertex,
    language_model,
    residual_mlp_block,
)

# Untyped on purpose: some of these calls are wrong, and a type checker would say so.
api: Any = tpmlp

BLOCK = residual_mlp_block(8, 8)
MESH = tpmlp.make_mesh(stage=2)
X = np.ones((4, 8), np.float32)


def graph(*after: Vertex, block: tpmlp.Graph = BLOCK, times: int = 4) -> tpmlp.Graph:
    """Return blocks after a dense vertex, and what reads them."""
    before = [Vertex("x", Input(8)), Vertex("in", Dense(8), "x")]
    return tpmlp.Graph([*before, Repeat("blocks", block, "in", times), *after])


def step(model: Any, mesh: Any = MESH, **strategy: Any) -> Any:
    return api.value_and_grad(model, loss="output", mesh=mesh, strategy=api.Strategy(**strategy))


MODEL = graph()


def params() -> Any:
    return MODEL.init(jax.random.key(0), MESH)


BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "no blocks": (
        lambda: step(api.Graph([Vertex("x", Input(8)), Vertex("z", Dense(8), "x")])),
        ("one Repeat", "got none", "Repeat(name, block, input, times)", "stage=1"),
    ),
    "two rows of blocks": (
        lambda: step(
            api.Graph(
                [
                    Vertex("x", Input(8)),
                    Repeat("low", BLOCK, "x", 2),
                    Repeat("high", BLOCK, "low", 2),
                ]
            )
        ),
        ("one Repeat", "low, high", "stage=1"),
    ),
    "a skip from the first part": (
        lambda: step(graph(Vertex("sum", Sum(), "blocks", "in"))),
        ('vertex "sum"', 'read "blocks"', '"in"', "skip over stages", "carry it along", "stage=1"),
    ),
    "a skip from a source": (
        lambda: step(graph(Vertex("all", Concatenate(), "blocks", "x"))),
        ('vertex "all"', '"x"', "skip over stages"),
    ),
    "a source that the last part reads": (
        lambda: step(graph(Vertex("late", Input(8)), Vertex("sum", Sum(), "blocks", "late"))),
        ('vertex "sum"', '"late"', "skip over stages"),
    ),
    "a skip from inside a block": (
        lambda: step(graph(Vertex("sum", Sum(), "blocks", "blocks.0.up"))),
        ('vertex "sum"', '"blocks.0.up"', "skip over stages"),
    ),
    "a skip from a block to the output": (
        lambda: step(graph(Vertex("sum", Sum(), "blocks", "blocks.2.out"))),
        ('vertex "sum"', '"blocks.2.out"', "skip over stages"),
    ),
    "parameters of a block": (
        lambda: step(graph(Vertex("z", Dense(8), "blocks", share="blocks.1.down"))),
        ('vertex "z"', "must not share", 'share="blocks.1.down"', "stage=1"),
    ),
    "what adds to the objective": (
        lambda: step(graph(Vertex("code", ActivityL1(0.5), "blocks"))),
        ('vertex "code"', "a pipeline runs", "ActivityL1(0.5)", "stage=1"),
    ),
    "few blocks": (
        lambda: step(graph(times=2), mesh=api.make_mesh(stage=4)),
        ("Repeat", "times=2", "stage=4", "chunks=1", "times=4 or more"),
    ),
    "few blocks for chunks": (
        lambda: step(MODEL, schedule="interleaved", chunks=3, microbatches=2),
        ("Repeat", "times=4", "stage=2", "chunks=3", "times=6 or more"),
    ),
    "padding behind heads": (
        lambda: step(
            language_model(11, 16, 4, num_blocks=3, num_heads=4), mesh=api.make_mesh(stage=3, x=2)
        ),
        ('vertex "attention"', "width=16", "stage=3", "x=2", "multiple of 6"),
    ),
    "layout": (lambda: step(MODEL, layout=("row",) * 9), ("layout", "one word", "'auto'")),
    "keep every second": (
        lambda: step(MODEL, keep="recompute", keep_every=2),
        ("keep_every", "keep_every=2", "stage=1"),
    ),
    "rings": (lambda: step(MODEL, overlap="ring"), ("overlap='ring'", "for a Graph")),
    "parameters of no stages": (
        lambda: step(MODEL)(MODEL.init(jax.random.key(0), api.make_mesh(x=2)), X),
        ("placed for 2 stages", "of no stages", "reshard"),
    ),
    "parameters of stages": (
        lambda: step(MODEL, mesh=api.make_mesh(x=2))(params(), X),
        ("placed for no stages", "of 2 stages with 1 chunks", "reshard"),
    ),
    "parameters of other stages": (
        lambda: step(MODEL, mesh=api.make_mesh(stage=4))(params(), X),
        ("placed for 4 stages", "of 2 stages with 1 chunks", "reshard"),
    ),
    "parameters of another number of blocks": (
        lambda: step(graph(times=6))(params(), X),
        ("of 6 blocks", "got 4 blocks", "another model"),
    ),
    "parameters of another block": (
        lambda: step(
            graph(block=api.Graph([Vertex("x", Input(8)), Vertex("h", Activation("relu"), "x")]))
        )(params(), X),
        ("of 4 blocks", "with down, norm, up in each", "another model"),
    ),
    "trace": (
        lambda: api.trace(MODEL, params(), X, None, loss="output", mesh=MESH),
        ("trace", "stage=2", "reshard"),
    ),
    "verify": (
        lambda: api.verify(MODEL, MESH, loss="output", batch_size=4),
        ("trace", "stage=2"),
    ),
    "gradients of samples": (
        lambda: api.per_example_gradient_norms(MODEL, params(), X, None, loss="output", mesh=MESH),
        ("tpmlp.MLP for gradients of one sample", "Graph"),
    ),
    "a Hessian": (
        lambda: api.hessian_vector_product(
            MODEL, params(), params(), X, None, loss="output", mesh=MESH
        ),
        ("tpmlp.MLP for products with a curvature", "Graph"),
    ),
    "a gradient through apply": (
        lambda: jax.grad(
            lambda p: sum(a.sum() for a in jax.tree.leaves(api.apply(MODEL, p, X, mesh=MESH)))
        )(params()),
        ("differentiated", "stage=2", "cotangent"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_with_name_value_and_way_out(name):
    call, words = BAD[name]
    with pytest.raises(ValueError, match="must") as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)
