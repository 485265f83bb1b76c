"""What is predicted of a graph's step is what the compiled step moves, byte for byte.

A failure names the collectives that differ, by kind and axes: bytes predicted, bytes counted in the
compiled program, and what the prediction consists of.
"""

from collections import defaultdict
from fractions import Fraction
from typing import Any

import pytest

import tpmlp
from tests.graph.random_graphs import random_graph
from tests.graph.test_engine import MODEL, SIZES, STRATEGIES, mesh_of
from tpmlp.graph import (
    Activation,
    ActivityL1,
    Concatenate,
    Dense,
    Input,
    LayerNorm,
    Product,
    RMSNorm,
    Shift,
    Softmax,
    Sum,
    Vertex,
)
from tpmlp.graph.cost import step_collectives
from tpmlp.graph.structure import Repeat
from tpmlp.losses import get_loss
from tpmlp.regularizers import ElementwisePenalty

BATCH = 8
TYPES = {
    "bfloat16 products": tpmlp.Strategy(compute_dtype="bfloat16"),
    "bfloat16 sums": tpmlp.Strategy(compute_dtype="bfloat16", reduce_dtype="bfloat16"),
}
L2 = ElementwisePenalty(l2=0.1)
SHIFTED = tpmlp.Graph([Vertex("x", Input(8)), Vertex("shift", Shift(), "x")])


def compare(
    graph: tpmlp.Graph,
    sizes: tuple[int, int, int],
    strategy: tpmlp.Strategy,
    penalty: ElementwisePenalty = L2,
) -> None:
    """Add up bytes by kind and axes, predicted and compiled."""
    mesh = mesh_of(sizes)
    predicted: dict[Any, Fraction] = defaultdict(Fraction)
    rows = step_collectives(
        graph.place(mesh, strategy), batch_size=BATCH, loss=get_loss("mse"), penalty=penalty
    )
    for row in rows:
        rounds = 2 if row.kind == "all_reduce" else 1
        words = Fraction(rounds * row.elements * (row.num_devices - 1), row.num_devices) * row.times
        predicted[row.kind, frozenset(row.axes)] += words * row.item_bytes
    step = tpmlp.value_and_grad(
        graph, loss="mse", mesh=mesh, strategy=strategy, regularizer=penalty
    )
    compiled: dict[Any, Fraction] = defaultdict(Fraction)
    for row in tpmlp.audit(step.compile(BATCH)).collectives:
        assert row.count is not None
        compiled[row.kind, frozenset(row.axes)] += row.exact_bytes * row.count
    assert predicted == compiled, "".join(
        f"\n{of[0]} over {' '.join(sorted(of[1]))}: {float(predicted[of])} bytes predicted, "
        f"{float(compiled[of])} counted; predicted are "
        + ", ".join(
            f"{row.tensor} {row.phase} {row.times} * {row.elements}"
            for row in rows
            if (row.kind, frozenset(row.axes)) == of
        )
        for of in sorted(predicted | compiled, key=str)
        if predicted[of] != compiled[of]
    )


@pytest.mark.parametrize("name", STRATEGIES | TYPES)
def test_a_language_model_moves_what_is_predicted(name):
    sizes = (2, 2, 2) if name in ("gathered", "recompute", "alternate") else (2, 1, 4)
    compare(MODEL, sizes, (STRATEGIES | TYPES)[name])


@pytest.mark.parametrize("seed", range(6))
def test_a_random_graph_moves_what_is_predicted(seed):
    compare(random_graph(seed), SIZES[seed], tpmlp.Strategy())


def dense(name: str, source: str, *, bias: bool = False) -> Vertex:
    return Vertex(name, Dense(8, bias), source)


# Between h, which the branches read, and a dense vertex that reads "joined".
BRANCHES = {
    "a sum hands its g to a sum": [
        dense("a", "h"),
        dense("b", "h"),
        Vertex("inner", Sum(), "a", "b"),
        dense("c", "h"),
        Vertex("joined", Sum(), "inner", "c"),
    ],
    "a sum hands its g to a shift": [
        dense("a", "h"),
        Vertex("shifted", Shift(), "a"),
        dense("c", "h"),
        Vertex("joined", Sum(), "shifted", "c"),
    ],
    "biases of one g": [
        dense("a", "h", bias=True),
        dense("b", "h", bias=True),
        Vertex("joined", Sum(), "a", "b"),
    ],
    "r that is what it reads": [
        Vertex("same", ActivityL1(0.1), "h"),
        dense("a", "same"),
        dense("b", "h"),
        Vertex("joined", Product(), "a", "b"),
    ],
}


@pytest.mark.parametrize(
    "strategy",
    [
        tpmlp.Strategy(),
        tpmlp.Strategy(layout="row"),
        tpmlp.Strategy(microbatches=2),
        tpmlp.Strategy(shard_weights=True),
    ],
    ids=["auto", "row", "microbatches", "shard_weights"],
)
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_move_what_is_predicted(name, strategy):
    graph = tpmlp.Graph(
        [Vertex("x", Input(8)), dense("h", "x"), *BRANCHES[name], dense("last", "joined")]
    )
    compare(graph, (2, 2, 2), strategy)


@pytest.mark.parametrize("keep", ["shard", "recompute"])
def test_a_gradient_that_no_parameter_needs_moves_nothing(keep):
    """That of "side", which waits while others go back, and after which y is built again."""
    block = tpmlp.Graph([Vertex("in", Input(8)), dense("a", "in"), Vertex("out", Sum(), "a", "in")])
    vertices = [
        Vertex("y", Input(8)),
        dense("h", "y"),
        Vertex("side", Product(), "y", "y"),
        Repeat("blocks", block, "h", times=4),
        Vertex("both", Concatenate(), "blocks", "side"),
        dense("last", "both"),
    ]
    compare(tpmlp.Graph(vertices), (2, 2, 2), tpmlp.Strategy(keep=keep))


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(
    "kind",
    [Activation("tanh"), Softmax(), RMSNorm(), LayerNorm(), Sum()],
    ids=lambda kind: kind.label,
)
def test_what_vertices_compute_alike_moves_once(kind, sizes):
    """Norms have parameters of their own, and share only their sums."""
    vertices = [Vertex("x", Input(8)), dense("h", "x")]
    for side in ("left", "right"):
        vertices += [Vertex(side, kind, "h"), dense(f"{side} dense", side)]
    both = Vertex("sum", Sum(), "left dense", "right dense")
    compare(tpmlp.Graph([*vertices, both]), sizes, tpmlp.Strategy())


@pytest.mark.parametrize("biases", [False, True])
def test_a_penalty_moves_where_it_counts_a_parameter(biases):
    """Of a graph without a matrix there is a penalty only if biases, and such, are counted."""
    compare(SHIFTED, (2, 1, 4), tpmlp.Strategy(), ElementwisePenalty(l2=0.1, biases=biases))
