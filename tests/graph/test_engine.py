"""The engine on whole graphs: gradients are jax.grad's of the unsharded graph, on any mesh.

A failure here with every rule of test_rules.py right is one of the walk: an out-neighbour left out
or counted twice, an r_v that is stale or in the wrong orientation, a gradient of shared parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.graph.random_graphs import random_graph
from tests.graph.rows import KEY, numbers, sole
from tests.tolerances import FLOAT64
from tpmlp.graph import (
    Activation,
    Attention,
    Dense,
    Dropout,
    Embedding,
    Input,
    Positions,
    Product,
    RMSNorm,
    Sum,
    Tokens,
    Vertex,
    plain,
)
from tpmlp.graph.structure import Repeat
from tpmlp.randomness import random_words

# (data, x, y): one axis, data beside it, two axes with the longer one either way, 3 by 2.
SIZES = ((1, 5, 1), (2, 1, 3), (1, 2, 4), (1, 4, 2), (1, 3, 2), (2, 2, 2))
NUM_GRAPHS = 20


def mesh_of(sizes: tuple[int, int, int]) -> Any:
    data, x, y = sizes
    return tpmlp.make_mesh(data=data, x=x, y=y)


def plain_gradients(graph: tpmlp.Graph, w: Any) -> tuple[Any, Any]:
    """Return the outputs of a graph and the gradient of the sum of w * outputs, unsharded."""
    params, samples = numbers(graph)
    inputs: Any = samples

    def total(params: Any) -> tuple[Any, Any]:
        outputs = plain.outputs(graph, params, inputs, words=random_words(KEY))[graph.output]
        return jnp.sum(w * outputs), outputs

    (_, outputs), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return outputs, grads


def cotangent(graph: tpmlp.Graph) -> np.ndarray:
    shape = graph.shapes[graph.output]
    sizes = (n for n in (8, shape.tokens, shape.width) if n is not None)
    return np.random.default_rng(3).normal(size=tuple(sizes))


def check_gradients(
    graph: tpmlp.Graph, sizes: tuple[int, int, int], strategy: tpmlp.Strategy | None = None
) -> None:
    """Compare all gradients of a step with jax.grad of the unsharded graph."""
    mesh, w = mesh_of(sizes), cotangent(graph)
    params, samples = numbers(graph)
    placed = tpmlp.from_numpy(graph, params, mesh, strategy=strategy)
    step = tpmlp.value_and_grad(graph, loss=None, mesh=mesh, strategy=strategy)
    _, grads = step(placed, sole(samples), cotangent=w, key=KEY)
    got, (_, wanted) = tpmlp.to_numpy(graph, grads), plain_gradients(graph, w)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        error = np.abs(a - b).max() / (np.abs(b).max() or 1)
        assert error <= FLOAT64, (jax.tree_util.keystr(path), error)
    assert_padding_is_zero(graph, grads)


def assert_padding_is_zero(graph: tpmlp.Graph, grads: Any) -> None:
    """Refuse anything but 0 beyond the logical sizes."""

    def check(spec: Any, array: Any) -> None:
        padding = np.array(array)
        padding[tuple(map(slice, spec.shape))] = 0
        assert not padding.any()

    jax.tree.map(check, graph.parameters, grads)


@pytest.mark.parametrize("seed", range(NUM_GRAPHS))
def test_gradients_of_a_random_graph_are_jax_grads(seed):
    check_gradients(random_graph(seed), SIZES[seed % len(SIZES)])


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 4, 2), (1, 3, 2)])
def test_a_residual_over_one_dense_vertex_is_turned(sizes):
    graph = tpmlp.Graph(
        [
            Vertex("x", Input(11)),
            Vertex("up", Dense(11), "x"),
            Vertex("act", Activation("sigmoid"), "up"),
            Vertex("sum", Sum(), "x", "act"),
            Vertex("out", Dense(7), "sum"),
        ]
    )
    turned = [n for n in graph.place(mesh_of(sizes)).nodes if n.endswith("turned")]
    assert turned == ["act turned"]
    check_gradients(graph, sizes)


BLOCK = tpmlp.Graph(
    [
        Vertex("x", Input(32, tokens=4)),
        Vertex("norm", RMSNorm(), "x"),
        Vertex("q", Dense(32, bias=False), "norm"),
        Vertex("k", Dense(8, bias=False), "norm"),
        Vertex("v", Dense(8, bias=False), "norm"),
        Vertex("seen", Attention(num_heads=8, num_kv_heads=2, causal=True), "q", "k", "v"),
        Vertex("o", Dense(32, bias=False), "seen"),
        Vertex("mid", Sum(), "x", "o"),
        Vertex("gate", Dense(44), "mid"),
        Vertex("up", Dense(44), "mid"),
        Vertex("act", Activation("silu"), "gate"),
        Vertex("product", Product(), "act", "up"),
        Vertex("down", Dense(32), "product"),
        Vertex("drop", Dropout(0.2), "down"),
        Vertex("out", Sum(), "mid", "drop"),
    ]
)
MODEL = tpmlp.Graph(
    [
        Vertex("ids", Tokens(4, vocabulary=13)),
        Vertex("embed", Embedding(32), "ids"),
        Vertex("placed", Positions(), "embed"),
        Repeat("blocks", BLOCK, "placed", times=3),
        Vertex("norm", RMSNorm(), "blocks"),
        Vertex("logits", Dense(13, bias=False), "norm", share="embed"),
    ]
)
STRATEGIES = {
    "shard": tpmlp.Strategy(),
    "gathered": tpmlp.Strategy(keep="gathered"),
    "recompute": tpmlp.Strategy(keep="recompute"),
    "split weights": tpmlp.Strategy(shard_weights=True, keep="recompute", keep_every=1),
    "microbatches": tpmlp.Strategy(microbatches=2),
    "row": tpmlp.Strategy(layout="row"),
    "alternate": tpmlp.Strategy(layout="alternate"),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_gradients_under_a_strategy_are_jax_grads(name):
    sizes = (2, 2, 2) if name in ("gathered", "recompute", "alternate") else (2, 1, 4)
    check_gradients(MODEL, sizes, STRATEGIES[name])


def integers(model: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.integers(-2, 3, s.shape).astype(float), model.parameters)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 3, 2), (2, 2, 2)])
def test_a_chain_of_dense_vertices_is_the_mlp_bit_for_bit_and_moves_what_it_moves(sizes):
    mlp = tpmlp.MLP((11, 20, 12, 7), activation="relu")
    vertices = [Vertex("h_1", Input(11))]
    for l, width in enumerate(mlp.widths[1:], 1):
        vertices.append(Vertex(f"z_{l}", Dense(width), f"h_{l}"))
        vertices.append(Vertex(f"h_{l + 1}", Activation("relu"), f"z_{l}"))
    graph, mesh = tpmlp.Graph(vertices[:-1]), mesh_of(sizes)
    layers = integers(mlp)
    named = {f"z_{l}": {"W": W, "b": b} for l, (W, b) in enumerate(layers, 1)}
    x = np.random.default_rng(1).integers(-2, 3, (8, 11)).astype(float)
    results, counts = [], []
    for model, params in ((mlp, list(layers)), (graph, named)):
        step = tpmlp.value_and_grad(model, loss="output", mesh=mesh)
        placed = tpmlp.from_numpy(model, params, mesh)
        loss, grads = step(placed, x)
        results.append([np.asarray(loss), *jax.tree.leaves(tpmlp.to_numpy(model, grads))])
        counts.append(tpmlp.audit(step, placed, x).counts)
    for of_mlp, of_graph in zip(*results, strict=True):
        np.testing.assert_array_equal(of_mlp, of_graph)
    assert counts[0] == counts[1]
