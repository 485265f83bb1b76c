"""A covering set of graphs, schedules and meshes; test_graphs.py has some.

`make test-all` runs this. A failure here alone is of a pair that those do not have.
"""

from typing import Any

import pytest

from tests.pipeline.graph_cases import GRAPHS, Case, check_step

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
