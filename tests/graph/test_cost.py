"""What is predicted of a graph's step is what the compiled step moves, byte for byte."""

from collections import defaultdict
from fractions import Fraction

import pytest

import tpmlp
from tests.graph.random_graphs import random_graph
from tests.graph.test_engine import MODEL, SIZES, STRATEGIES, mesh_of
from tpmlp.graph.cost import step_collectives
from tpmlp.losses import get_loss

BATCH = 8
TYPES = {
    "bfloat16 products": tpmlp.Strategy(compute_dtype="bfloat16"),
    "bfloat16 sums": tpmlp.Strategy(compute_dtype="bfloat16", reduce_dtype="bfloat16"),
}


def compare(graph: tpmlp.Graph, sizes: tuple[int, int, int], strategy: tpmlp.Strategy) -> None:
    """Add up bytes by kind and axes, predicted and compiled."""
    mesh = mesh_of(sizes)
    predicted: dict = defaultdict(Fraction)
    rows = step_collectives(
        graph.place(mesh, strategy), batch_size=BATCH, loss=get_loss("mse"), penalty=True
    )
    for row in rows:
        rounds = 2 if row.kind == "all_reduce" else 1
        words = Fraction(rounds * row.elements * (row.num_devices - 1), row.num_devices) * row.times
        predicted[row.kind, frozenset(row.axes)] += words * row.item_bytes
    step = tpmlp.value_and_grad(
        graph, loss="mse", mesh=mesh, strategy=strategy, regularizer=tpmlp.l2(0.1)
    )
    compiled: dict = defaultdict(Fraction)
    for row in tpmlp.audit(step.compile(BATCH)).collectives:
        assert row.count is not None
        compiled[row.kind, frozenset(row.axes)] += row.exact_bytes * row.count
    assert predicted == compiled


@pytest.mark.parametrize("name", STRATEGIES | TYPES)
def test_a_language_model_moves_what_is_predicted(name):
    sizes = (2, 2, 2) if name in ("gathered", "recompute", "alternate") else (2, 1, 4)
    compare(MODEL, sizes, (STRATEGIES | TYPES)[name])


@pytest.mark.parametrize("seed", range(6))
def test_a_random_graph_moves_what_is_predicted(seed):
    compare(random_graph(seed), SIZES[seed], tpmlp.Strategy())
