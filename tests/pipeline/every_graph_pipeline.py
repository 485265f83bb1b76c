"""A covering set of graphs, schedules and meshes; test_graphs.py has some.

`make test-all` runs this. A failure here alone is of a pair that those do not have.
"""

from typing import Any

import jax
import numpy as np
import optax
import pytest

import tpmlp
from tests.pipeline.graph_cases import GRAPHS, Case, check_step
from tpmlp.graph import language_model

# (data, stage, x, y) and schedules with the chunks and microbatches that they need.
SIZES = ((1, 2, 2, 2), (1, 4, 2, 1), (2, 2, 1, 2), (1, 3, 1, 2), (1, 2, 4, 1), (2, 4, 1, 1))
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"schedule": "gpipe", "microbatches": 2},
    {"schedule": "1f1b", "microbatches": 4},
    {"schedule": "interleaved", "microbatches": 4, "chunks": 2},
    {"schedule": "zb-h1", "microbatches": 4},
    {"schedule": "zb-h2", "microbatches": 4},
    {"schedule": "zb-v", "microbatches": 4},
)
FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"keep": "recompute"},
    {"keep": "gathered"},
    {"layout": "row"},
    {"layout": "column"},
)


def case(number: int, graph: str, sizes: tuple[int, int, int, int]) -> Case:
    """Return a case; schedules and other fields go round at different paces."""
    schedule = SCHEDULES[number % len(SCHEDULES)]
    if schedule["schedule"] == "interleaved" and sizes[1] == 3:
        schedule = {**schedule, "microbatches": 3}
    if sizes[0] * schedule["microbatches"] > 8:
        schedule = {**schedule, "microbatches": 4}
    chunks = 2 if schedule["schedule"] in ("interleaved", "zb-v") else 1
    return Case(
        graph=graph,
        times=sizes[1] * chunks + number % 3,
        sizes=sizes,
        shard_weights=sizes[0] > 1 and number % 2 == 0,
        **schedule,
        **FIELDS[number % len(FIELDS)],
    )


CASES = [
    case(i + j * (len(SIZES) + 1), graph, sizes)
    for j, graph in enumerate(GRAPHS)
    for i, sizes in enumerate(SIZES)
]


@pytest.mark.parametrize("of", CASES, ids=str)
def test_a_step_is_the_plain_graphs(of):
    check_step(of)


def test_a_language_model_trains_as_without_stages():
    graph = language_model(11, 8, 4, num_blocks=2, num_heads=2, hidden=8)
    ids = np.random.default_rng(0).integers(0, 11, (16, 5))
    runs = []
    for mesh, strategy in (
        (tpmlp.make_mesh(stage=2, x=2), tpmlp.Strategy(microbatches=4)),
        (tpmlp.make_mesh(x=1), None),
    ):
        result = tpmlp.fit(
            graph,
            (ids[:, :-1], ids[:, 1:]),
            loss="cross_entropy",
            mesh=mesh,
            strategy=strategy,
            optimizer=optax.adam(1e-2),
            steps=4,
            batch_size=8,
            params=graph.init(jax.random.key(0), mesh, strategy=strategy, dtype="float64"),
        )
        history = [row["loss"] for row in result.history]
        runs.append((history, tpmlp.to_numpy(graph, result.params)))
    (history, staged), (wanted, plain) = runs
    assert history == pytest.approx(wanted, rel=1e-11)
    assert history[-1] < history[0]
    for a, b in zip(jax.tree.leaves(staged), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
