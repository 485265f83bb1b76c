"""Two hundred random graphs; tests/graph/test_engine.py has the first twenty.

`make test-all` runs this. A failure here alone is a shape of graph that those do not have.
"""

import pytest

from tests.graph.random_graphs import random_graph
from tests.graph.test_cost import compare
from tests.graph.test_engine import NUM_GRAPHS, SIZES, check_gradients
from tpmlp.strategy import Strategy


@pytest.mark.parametrize("seed", range(NUM_GRAPHS, 200))
def test_gradients_of_a_random_graph_are_jax_grads(seed):
    check_gradients(random_graph(seed), SIZES[seed % len(SIZES)])


@pytest.mark.parametrize("seed", range(6, 40))
def test_a_random_graph_moves_what_is_predicted(seed):
    compare(random_graph(seed), SIZES[seed % len(SIZES)], Strategy())
