"""verify says ok for a graph, and names the tensor and the vertex of one with a fault.

A failure here means that a green report on a graph says nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of
from tests.graph.rows import KEY, ROWS, floats_of, numbers
from tests.planted import planted
from tests.test_mutants import MUTANTS
from tpmlp.graph import (
    Activation,
    ActivityL1,
    Attention,
    Concatenate,
    Dense,
    Dropout,
    Embedding,
    Input,
    LayerNorm,
    Positions,
    Product,
    RMSNorm,
    Slice,
    Softmax,
    Sum,
    TokenMean,
    Tokens,
    Vertex,
    plain,
)
from tpmlp.inspection.bounds import Roundoff, unit_roundoff
from tpmlp.inspection.running_error import Bounded, with_errors
from tpmlp.randomness import random_words

GRAPH = tpmlp.Graph(
    [
        Vertex("x", Input(11)),
        Vertex("norm", RMSNorm(), "x"),
        Vertex("up", Dense(13), "norm"),
        Vertex("gate", Dense(13), "norm"),
        Vertex("act", Activation("sigmoid"), "up"),
        Vertex("product", Product(), "act", "gate"),
        Vertex("down", Dense(11), "product"),
        Vertex("again", Dense(11), "act", share="down"),
        Vertex("side", Dense(11), "x"),
        Vertex("mid", Sum(), "x", "side", "down", "again"),
        Vertex("soft", Softmax(), "mid"),
        Vertex("cat", Concatenate(), "mid", "soft"),
        Vertex("sparse", ActivityL1(0.1), "cat"),
        Vertex("out", Dense(5), "sparse"),
    ]
)
TEXT = tpmlp.Graph(
    [
        Vertex("ids", Tokens(4, vocabulary=7)),
        Vertex("embed", Embedding(12), "ids"),
        Vertex("placed", Positions(), "embed"),
        Vertex("norm", LayerNorm(), "placed"),
        Vertex("k", Dense(6, bias=False), "norm"),
        Vertex("seen", Attention(num_heads=6, num_kv_heads=3, causal=True), "norm", "k", "k"),
        Vertex("drop", Dropout(0.2), "seen"),
        Vertex("mid", Sum(), "placed", "drop"),
        Vertex("mean", TokenMean(), "mid"),
        Vertex("out", Dense(5), "mean"),
    ]
)
INTEGERS = tpmlp.Graph(
    [
        Vertex("x", Input(11)),
        Vertex("up", Dense(13), "x"),
        Vertex("act", Activation("gelu"), "up"),
        Vertex("part", Slice(2, 13), "act"),
        Vertex("product", Product(), "part", "x"),
        Vertex("drop", Dropout(0.5), "product"),
        Vertex("mid", Sum(), "x", "drop"),
        Vertex("out", Dense(5), "mid"),
    ]
)
SIZES = (1, 2, 3)


@pytest.mark.parametrize("kind", ["float64", "float32"])
@pytest.mark.parametrize("graph", [GRAPH, TEXT], ids=["features", "tokens"])
def test_the_engine_is_within_its_bounds(graph, kind):
    report = tpmlp.verify(graph, mesh_of(SIZES), kind=kind)
    assert report.ok, report
    tensors = [check.tensor for check in report.checks]
    names = [v.name for v in graph.order if graph.shapes[v.name].width is not None]
    params = [f"d[{owner}.{name}]" for owner, mine in graph.arrays.items() for name in mine]
    shown = [f"{kind}[{name}]" for kind in "rg" for name in names]
    given = [f"r[{v.name}]" for v in graph.sources] if kind == "float32" else []
    assert sorted(tensors) == sorted({*shown, *params, "loss"} - set(given))


def test_a_graph_of_integers_is_the_reference_bit_for_bit():
    report = tpmlp.verify(INTEGERS, mesh_of((2, 2, 2)), kind="integers")
    assert report.ok
    assert {check.bound for check in report.checks} == {0.0}


@pytest.mark.parametrize(
    "fields",
    [{"keep": "gathered"}, {"compute_dtype": "bfloat16"}, {"shard_weights": True}],
    ids=str,
)
def test_a_strategy_is_within_its_bounds(fields):
    strategy = tpmlp.Strategy(**fields)
    report = tpmlp.verify(GRAPH, mesh_of((2, 1, 3)), kind="float32", strategy=strategy)
    assert report.ok, report


class Fault(NamedTuple):
    """An edit of the package, and what verify says of it."""

    file: str
    old: str
    new: str
    said: str


ELEMENTWISE, NORMS = "graph/rules/elementwise.py", "graph/rules/norms.py"
FAULTS = {
    "wrong sigma'": Fault(
        ELEMENTWISE,
        "g * node.kind.sigma.sigma_prime(read(0))",
        "g * 1.01 * node.kind.sigma.sigma_prime(read(0))",
        'g[up], backward pass of vertex "act", on all devices',
    ),
    "a gradient of RMSNorm": Fault(
        NORMS,
        "n * (products / node.width)[None]",
        "n * (products / node.padded_width)[None]",
        "g[x], backward pass",
    ),
    "a gradient of softmax": Fault(
        NORMS,
        "Gradients((r * (g - products[None]),), {})",
        "Gradients((r * g,), {})",
        'g[mid], backward pass of vertex "cat" or "soft"',
    ),
}
OF_MUTANTS = {
    "an out-neighbour left out": "g[mid], backward pass",
    "shared parameters with the gradient of one user": "d[down.W], backward pass",
    "padding counted in a mean over features": 'r[norm], forward pass of vertex "norm"',
    "an array that is not turned": 'r[mid], forward pass of vertex "mid"',
}
FAULTS |= {
    name: Fault(MUTANTS[name].file, MUTANTS[name].old, MUTANTS[name].new, said)
    for name, said in OF_MUTANTS.items()
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_where_it_is(name):
    fault = FAULTS[name]
    with planted(fault.file, fault.old, fault.new):
        report = tpmlp.verify(GRAPH, mesh_of(SIZES), kind="float32")
    assert report.verdict == "bug"
    assert fault.said in str(report.fault)


def test_a_fault_on_one_device_is_found_on_that_device():
    with planted(
        "graph/rules/elementwise.py",
        "    return Gradients((g,) * len(node.inputs), {})",
        "    at = jax.lax.axis_index('x') * 3 + jax.lax.axis_index('y')\n"
        "    return Gradients((jax.numpy.where(at == 4, 1.01 * g, g),) * len(node.inputs), {})",
    ):
        report = tpmlp.verify(GRAPH, mesh_of(SIZES), kind="float32")
    assert report.fault is not None
    # Device 4, or the one that has its block where the sum's input is turned.
    assert report.fault.devices in ((3,), (4,))


@pytest.mark.parametrize(("kind", "graph"), [("float64", GRAPH), ("integers", INTEGERS)])
def test_a_fault_makes_all_that_follows_wrong_end_to_end(kind, graph):
    """Whatever comes before it is right: the reference is another computation."""
    fault = FAULTS["wrong sigma'"]
    with planted(fault.file, fault.old, fault.new):
        report = tpmlp.verify(graph, mesh_of(SIZES), kind=kind)
    wrong = {check.tensor for check in report.checks if not check.ok}
    assert {"g[up]", "d[up.W]", "g[x]"} <= wrong
    assert not {check for check in wrong if check.startswith("r[")}
    assert not {"g[act]", "g[out]", "d[out.W]", "loss"} & wrong


def test_a_function_that_fixes_its_type_is_verified():
    rounds = Vertex.from_function(
        "rounds", lambda a: a.astype(jnp.float32) * jnp.float32(2), "x", of="local"
    )
    graph = tpmlp.Graph([Vertex("x", Input(6)), rounds, Vertex("out", Dense(3), "rounds")])
    assert tpmlp.verify(graph, mesh_of(SIZES), kind="float32").ok


def test_a_vertex_that_rounds_is_no_integer():
    with pytest.raises(ValueError, match=r'exact: got vertex "norm" \(RMSNorm\)'):
        tpmlp.verify(GRAPH, mesh_of(SIZES), kind="integers")


def _looped(h: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 2, lambda _, a: a * h, h)


def test_a_function_whose_rounding_is_not_known_is_refused_or_left_out():
    loop = Vertex.from_function("loop", _looped, "x", of="local")
    graph = tpmlp.Graph([Vertex("x", Input(6)), loop, Vertex("out", Dense(3), "loop")])
    with pytest.raises(ValueError, match='vertex "loop" must be made of operations'):
        tpmlp.verify(graph, mesh_of(SIZES), kind="float32")
    report = tpmlp.verify(graph, mesh_of(SIZES), kind="float64")
    assert report.ok
    assert "g[x]" in {check.tensor for check in report.checks}


@pytest.mark.parametrize("name", ROWS)
def test_a_running_error_bounds_what_float32_does(name):
    """On one device, without the engine: every kind both ways, and not by far too much."""
    graph = ROWS[name].graph
    narrow = jax.tree.map(_in_float32, numbers(graph))
    params, (floats, ids) = narrow[0], floats_of(narrow[1])

    def both(params: Any, floats: Any) -> Any:
        def run(params: Any, floats: Any) -> jax.Array:
            inputs = {**floats, **ids}
            return plain.outputs(graph, params, inputs, words=random_words(KEY))[graph.output]

        r, pull = jax.vjp(run, params, floats)
        return r, pull(jnp.cos(r))

    u = unit_roundoff(np.float32)
    roundoff = Roundoff(compute=u, total=u, reduce=u)
    bounding = jax.jit(lambda *args: with_errors(both, args, roundoff))
    found = bounding(*jax.tree.map(_in_float64, (params, floats)))
    computed = jax.tree.leaves(jax.jit(both)(params, floats))
    bounded = jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, Bounded))
    for a, (value, error) in zip(computed, bounded, strict=True):
        assert (np.abs(np.asarray(a, np.float64) - value) <= error).all()
        assert np.max(error) <= LOOSE * np.abs(value).max()


# A fault of one per cent of the largest entry is seen in the gradients of any kind. The widest are
# those of attention: scores up to 12 have an error of their own before they are exponents.
LOOSE = 1e-2


def _in_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _in_float64(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)
