"""A graph whose blocks repeat computes in a pipeline what it computes without one.

A failure of all cases is one of how a graph is cut or of B and W; of one mesh, of an orientation;
of blocks that stages do not divide, of empty slots; of text, of tokens or of a table that both ends
use. With test_executor.py failing too, see there.
"""

from typing import Any

import jax
import numpy as np
import pytest

import tpmlp
from tests.pipeline.graph_cases import Case, between, check_step
from tests.tolerances import BFLOAT16_ROUNDOFF, FLOAT64
from tpmlp.graph import (
    Activation,
    Dense,
    Input,
    Repeat,
    Sum,
    Vertex,
    residual_mlp_block,
)

# Of compiled temporaries, as for MLPs (test_memory.py).
PREDICTED = 1.15

# Every schedule; stages of 2, 3 and 4; one and two tensor axes, data beside them; blocks that the
# stages divide and do not. every_graph_pipeline.py has more.
CASES = [
    Case(graph="residual", times=2, sizes=(1, 2, 1, 1)),
    Case(graph="residual", times=5, sizes=(1, 2, 2, 2), schedule="gpipe"),
    Case(graph="turning", times=5, sizes=(1, 2, 2, 2), schedule="interleaved", chunks=2),
    Case(graph="two sources", times=2, sizes=(2, 2, 1, 2), schedule="zb-h1", shard_weights=True),
    Case(graph="shared", times=3, sizes=(1, 2, 2, 1), schedule="zb-h2", keep="recompute"),
    Case(graph="mixed", times=4, sizes=(1, 2, 2, 2), schedule="zb-v", keep="gathered"),
    Case(graph="bare", times=9, sizes=(1, 4, 1, 2), schedule="zb-v", layout="column"),
    Case(graph="dropping", times=4, sizes=(2, 3, 1, 1), microbatches=2),
    Case(graph="text", times=3, sizes=(1, 2, 2, 2), schedule="zb-h1", microbatches=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_plain_graphs(case):
    check_step(case)


UNEVEN = Case(graph="residual", times=3, sizes=(1, 2, 2, 1), microbatches=2)


def test_gradients_of_padding_and_of_empty_slots_are_zero():
    grads = check_step(UNEVEN)
    specs = UNEVEN.model.specs(grads)
    for spec, array in zip(jax.tree.leaves(specs), jax.tree.leaves(grads), strict=True):
        padding = np.array(array)
        padding[tuple(map(slice, spec.shape))] = 0
        assert not padding.any(), spec.name
    assert grads.stages.layer_in(1, 1) is None
    for array in jax.tree.leaves(grads.slots[1]):
        assert np.asarray(array)[0].any()
        assert not np.asarray(array)[1].any()


EXACT = tpmlp.Graph(
    [
        Vertex("x", Input(6)),
        Vertex("up", Dense(8), "x"),
        Vertex("h", Activation("relu"), "up"),
        Vertex("down", Dense(6), "h"),
        Vertex("out", Sum(), "x", "down"),
    ]
)


def test_a_step_on_integers_is_that_without_stages_bit_for_bit():
    graph, rng = between(EXACT, 3), np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.integers(-1, 2, s.shape).astype(float), graph.parameters)
    x = rng.integers(-2, 3, (8, 7)).astype(float)
    results = []
    for mesh, microbatches in (
        (tpmlp.make_mesh(stage=2, x=2, y=2), 4),
        (tpmlp.make_mesh(x=1), 1),
    ):
        strategy = tpmlp.Strategy(microbatches=microbatches)
        placed = tpmlp.from_numpy(graph, params, mesh, strategy=strategy)
        step = tpmlp.value_and_grad(graph, loss="output", mesh=mesh, strategy=strategy)
        loss, grads = step(placed, x)
        results.append([np.asarray(loss), *jax.tree.leaves(tpmlp.to_numpy(graph, grads))])
    for staged, whole in zip(*results, strict=True):
        np.testing.assert_array_equal(staged, whole)


def test_parameters_are_the_same_on_every_mesh_and_go_from_one_to_another():
    key, graph, whole = jax.random.key(3), UNEVEN.model, tpmlp.make_mesh(x=4)
    staged = graph.init(key, UNEVEN.mesh, strategy=UNEVEN.strategy)
    plain = graph.init(key, whole)
    to = {"mesh": tpmlp.make_mesh(data=2, stage=3), "strategy": tpmlp.Strategy(microbatches=2)}
    moved = [
        staged,
        tpmlp.reshard(graph, plain, UNEVEN.mesh, strategy=UNEVEN.strategy),
        tpmlp.reshard(graph, staged, whole),
        tpmlp.reshard(graph, staged, **to),
    ]
    wanted = tpmlp.to_numpy(graph, plain)
    for params in moved:
        jax.tree.map(np.testing.assert_array_equal, tpmlp.to_numpy(graph, params), wanted)


def test_looking_norms_and_padded_batches_are_those_without_stages():
    graph, rng = UNEVEN.model, np.random.default_rng(1)
    params = graph.init(jax.random.key(0), UNEVEN.mesh, strategy=UNEVEN.strategy, dtype="float64")
    # 2 microbatches do not divide 11 samples.
    x, y, weight = rng.normal(size=(11, 7)), rng.normal(size=(11, 5)), rng.uniform(0.5, 2, 11)
    seen = []
    for mesh, strategy in ((UNEVEN.mesh, UNEVEN.strategy), (tpmlp.make_mesh(x=2), None)):
        given: dict[str, Any] = {"mesh": mesh, "strategy": strategy}
        here = tpmlp.reshard(graph, params, **given)
        regularizer = tpmlp.elastic_net(0.1, 0.5)
        step = tpmlp.value_and_grad(graph, loss="mse", regularizer=regularizer, **given)
        loss, grads = step(here, x, y, weight)
        evaluation = tpmlp.evaluate(graph, here, (x, y), loss="mse", **given)
        outputs = tpmlp.predict(graph, here, x, batch_size=4, **given)
        norm = tpmlp.global_norm(graph, grads, **given)
        seen.append([loss, evaluation.loss, norm, np.asarray(outputs)])
    for a, b in zip(*seen, strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT64, atol=FLOAT64)


def test_products_in_bfloat16_are_those_without_stages():
    """Microbatches on one stage, in the same types: what is rounded is the same."""
    graph, rng = between(EXACT, 3), np.random.default_rng(1)
    x, y = rng.normal(size=(8, 7)), rng.normal(size=(8, 5))
    strategy = tpmlp.Strategy(microbatches=2, compute_dtype="bfloat16")
    losses = []
    for mesh in (UNEVEN.mesh, tpmlp.make_mesh(x=2)):
        params = graph.init(jax.random.key(0), mesh, strategy=strategy, dtype="float64")
        step = tpmlp.value_and_grad(graph, loss="mse", mesh=mesh, strategy=strategy)
        losses.append(float(step(params, x, y)[0]))
    assert losses[0] == pytest.approx(losses[1], rel=BFLOAT16_ROUNDOFF)


def test_a_summary_tells_blocks_messages_and_what_a_compiled_step_holds():
    block, width = residual_mlp_block(256, 512), 256
    graph = tpmlp.Graph(
        [
            Vertex("x", Input(width)),
            Vertex("in", Dense(width), "x"),
            Repeat("blocks", block, "in", 3),
            Vertex("out", Dense(width), "blocks"),
        ]
    )
    mesh, strategy = tpmlp.make_mesh(stage=2, x=2), tpmlp.Strategy(microbatches=4)
    summary = graph.summary(mesh, batch_size=1024, strategy=strategy)
    step = tpmlp.value_and_grad(graph, loss="mse", mesh=mesh, strategy=strategy)
    audit = tpmlp.audit(step.compile(1024))
    assert 1 / PREDICTED <= audit.temp_bytes / summary.step.total <= PREDICTED
    moved = [row for row in audit.collectives if row.kind == "ppermute" and "stage" in row.axes]
    assert sum(row.total_bytes or 0 for row in moved) == summary.messages.in_program
    assert [row.layers for row in summary.stages] == [((0, 1),), ((2,),)]
    assert "blocks" in str(summary)
