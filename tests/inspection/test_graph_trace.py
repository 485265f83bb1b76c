"""The trace of a graph is the unsharded graph's, vertex by vertex, and stays split d/M a device.

A failure of an array means that the trace shows something the step did not compute.
"""

from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of, name_of
from tests.graph.rows import KEY, numbers
from tests.tolerances import FLOAT64
from tpmlp.graph import Activation, Dense, Dropout, Embedding, Input, Sum, Tokens, Vertex, plain
from tpmlp.inspection.graph_trace import GraphTrace
from tpmlp.randomness import random_words

SIZES = [(1, 3, 2), (2, 2, 2), (1, 5, 1)]
GRAPH = tpmlp.Graph(
    [
        Vertex("ids", Tokens(3, vocabulary=7)),
        Vertex("embed", Embedding(11), "ids"),
        Vertex("x", Input(11, tokens=3)),
        Vertex("both", Sum(), "embed", "x"),
        Vertex("up", Dense(13), "both"),
        Vertex("act", Activation("sigmoid"), "up"),
        Vertex("drop", Dropout(0.3), "act"),
        Vertex("down", Dense(11), "drop"),
        Vertex("mid", Sum(), "both", "down"),
        Vertex("out", Dense(5), "mid"),
    ]
)
FEATURES = [vertex.name for vertex in GRAPH.order if vertex.name != "ids"]


@cache
def traced(sizes: tuple[int, int, int]) -> GraphTrace:
    mesh = mesh_of(sizes)
    params, samples = numbers(GRAPH)
    placed = tpmlp.from_numpy(GRAPH, params, mesh)
    return tpmlp.trace(GRAPH, placed, samples, loss="output", mesh=mesh, key=KEY)


@cache
def expected() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return r and g of every vertex on one device, where the loss is the sum of the outputs."""
    params, samples = numbers(GRAPH)
    inputs: Any = samples
    zeros = {
        name: jnp.zeros((len(inputs["x"]), 3, GRAPH.shapes[name].features)) for name in FEATURES
    }

    def total(added: Any) -> tuple[Any, Any]:
        r = plain.outputs(GRAPH, params, inputs, words=random_words(KEY), added=added)
        return jnp.sum(r["out"]), r

    g, r = jax.grad(total, has_aux=True)(zeros)
    return r, g


@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
@pytest.mark.parametrize("name", ["r", "g"])
def test_every_array_is_that_of_the_unsharded_graph(sizes, name):
    run, arrays = traced(sizes), dict(zip("rg", expected(), strict=True))[name]
    assert list(getattr(run, name)) == [v.name for v in GRAPH.order if v.name in arrays]
    for vertex, wanted in arrays.items():
        error = np.abs(run.logical(name, vertex) - wanted).max()
        assert error <= FLOAT64 * np.abs(wanted).max(), vertex


@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
def test_loss_and_gradients_are_those_of_the_step(sizes):
    run, mesh = traced(sizes), mesh_of(sizes)
    params, samples = numbers(GRAPH)
    placed = tpmlp.from_numpy(GRAPH, params, mesh)
    loss, grads = tpmlp.value_and_grad(GRAPH, loss="output", mesh=mesh)(placed, samples, key=KEY)
    assert run.loss == pytest.approx(float(loss), rel=FLOAT64)
    for a, b in zip(jax.tree.leaves(run.grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT64, atol=FLOAT64 * np.abs(b).max())


@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
def test_every_array_is_split_d_over_m_a_device(sizes):
    run, num_devices = traced(sizes), prod(sizes)
    for array in [run.r[name] for name in FEATURES] + list(run.g.values()):
        shards = array.addressable_shards
        assert {shard.data.size for shard in shards} == {array.size // num_devices}


@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
def test_padding_is_exactly_zero(sizes):
    run = traced(sizes)
    for arrays in (run.r, run.g):
        for vertex in FEATURES:
            assert not np.asarray(arrays[vertex])[..., GRAPH.shapes[vertex].features :].any()


def test_a_summary_has_the_norms_of_what_a_vertex_holds():
    run = traced((1, 3, 2))
    r, g = expected()
    grads = tpmlp.to_numpy(GRAPH, run.grads)
    for row in run.summary().vertices:
        if row.vertex == "ids":
            assert row.r_norm is None
            assert row.g_norm is None
            continue
        assert row.r_norm == pytest.approx(np.linalg.norm(r[row.vertex]))
        assert row.g_norm == pytest.approx(np.linalg.norm(g[row.vertex]))
        mine = [np.ravel(dw) for dw in grads.get(row.vertex, {}).values()]
        assert (row.dW_norm is None) == (not mine)
        if mine:
            assert row.dW_norm == pytest.approx(np.linalg.norm(np.concatenate(mine)))


def test_a_picture_has_a_panel_for_r_and_g_and_a_column_a_vertex():
    figure = traced((1, 3, 2)).plot()
    panels = [axes for axes in figure.axes if axes.get_ylabel().startswith("$\\log")]
    assert [panel.collections[0].get_array().shape[1] for panel in panels] == [len(FEATURES)] * 2
    labels = [tick.get_text() for tick in panels[-1].get_xticklabels()]
    assert labels == FEATURES


@pytest.mark.parametrize(
    ("name", "vertex", "said"),
    [
        ("g", "ids", "name='g', vertex='ids'"),
        ("r", "dwon", "name='r', vertex='dwon'"),
        ("z", "up", "name='z', vertex='up'"),
    ],
)
def test_an_array_that_is_not_there_is_refused_by_name(name, vertex, said):
    with pytest.raises(ValueError, match=said):
        traced((1, 3, 2)).logical(name, vertex)


def test_a_missing_key_is_refused():
    params, samples = numbers(GRAPH)
    mesh = mesh_of((1, 3, 2))
    placed = tpmlp.from_numpy(GRAPH, params, mesh)
    with pytest.raises(ValueError, match='key must be given, as vertex "drop"'):
        tpmlp.trace(GRAPH, placed, samples, loss="output", mesh=mesh)
