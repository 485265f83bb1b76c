"""A compiled step holds what the schedule's peak says, within the issue's 1.15.

A failure means a copy of a buffer, or an array that outlives its task.
"""

import pytest

import tpmlp
from tpmlp.inspection.audit import Audit
from tpmlp.pipeline.summary import PipelineSummary

TARGET = 1.15

# (data, stage, x, y), schedule, microbatches, chunks, (widths, batch), and what else the strategy
# says: weights or samples take most of the memory; few and many microbatches; more inputs or
# outputs than hidden units, and no interior layer at all.
CASES = [
    ((1, 4, 2, 1), "1f1b", 8, 1, ((512,) * 17, 1024), {}),
    ((1, 4, 2, 1), "interleaved", 8, 2, ((512,) * 17, 1024), {}),
    ((2, 2, 2, 1), "zb-h2", 8, 1, ((256,) * 9, 8192), {}),
    ((1, 4, 1, 2), "zb-h1", 16, 1, ((256,) * 9, 8192), {}),
    ((1, 2, 2, 2), "1f1b", 8, 1, ((256,) * 9, 8192), {}),
    ((1, 4, 2, 1), "1f1b", 8, 1, ((512,) * 17, 4096), {"keep": "recompute"}),
    ((1, 2, 2, 2), "1f1b", 8, 1, ((512,) * 17, 1024), {"keep": "gathered"}),
    ((2, 4, 1, 1), "zb-h1", 8, 1, ((512,) * 17, 1024), {"shard_weights": True}),
    ((1, 4, 2, 1), "1f1b", 8, 1, ((784, *(128,) * 15, 10), 1024), {}),
    ((1, 8, 1, 1), "zb-h2", 8, 1, ((784, *(64,) * 9, 10), 1024), {}),
    ((1, 2, 2, 1), "1f1b", 8, 1, ((64, *(256,) * 7, 2048), 1024), {}),
    ((1, 2, 1, 1), "gpipe", 4, 1, ((16, 256, 10), 64), {}),
    # Round a ring of two, both ways are one.
    ((1, 2, 4, 1), "zb-v", 8, 1, ((512,) * 17, 4096), {}),
]


def compiled(case) -> tuple[PipelineSummary, Audit]:
    (data, stage, x, y), schedule, microbatches, chunks, (widths, batch_size), more = case
    mesh = tpmlp.make_mesh(data=data, stage=stage, x=x, y=y)
    model = tpmlp.MLP(widths)
    strategy = tpmlp.Strategy(schedule=schedule, microbatches=microbatches, chunks=chunks, **more)
    step = tpmlp.value_and_grad(model, loss="mse", mesh=mesh, strategy=strategy)
    audit = tpmlp.audit(step.compile(batch_size))
    return model.summary(mesh, batch_size=batch_size, strategy=strategy), audit


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[1]}, {case[0]}, {case[4][0][:2]}, {case[5]}"
)
def test_temporaries_are_what_the_schedule_says(case):
    summary, audit = compiled(case)
    assert 1 / TARGET <= audit.temp_bytes / summary.step.total <= TARGET
    # Whatever moves between stages is a z or a g: as many bytes as predicted.
    moved = [row for row in audit.collectives if row.kind == "ppermute" and "stage" in row.axes]
    assert sum(row.total_bytes or 0 for row in moved) == summary.messages.in_program


def test_messages_move_only_in_ticks_that_bring_a_stage_one():
    """Of GPipe on 4 stages and 8 microbatches: 10 ticks of z, and 10 of g, of 33 each."""
    summary, _ = compiled(((1, 4, 1, 1), "gpipe", 8, 1, ((16,) * 9, 64), {}))
    assert summary.num_ticks == 33
    one = 16 * 64 // 8 * 4
    assert summary.messages == (2 * 33 * one, 2 * 10 * one, 2 * 8 * one)


def test_recomputation_holds_fewer_activations_and_no_more_in_all():
    held = []
    for keep in ("shard", "recompute"):
        case = ((1, 4, 2, 1), "gpipe", 16, 1, ((256,) * 17, 4096), {"keep": keep})
        summary, audit = compiled(case)
        held.append((summary.step.activations, audit.temp_bytes))
    (kept, temporaries), (fewer, less) = held
    # 4 slots a stage, of which one is kept.
    assert fewer == kept / 4
    assert less < temporaries


def test_a_summary_says_which_stage_has_which_layers():
    model = tpmlp.MLP((7, *(10,) * 8, 5))
    strategy = tpmlp.Strategy(schedule="interleaved", chunks=2, microbatches=4)
    summary = model.summary(tpmlp.make_mesh(stage=2, x=2), batch_size=32, strategy=strategy)
    assert [s.layers for s in summary.stages] == [((1, 2, 3), (6, 7)), ((4, 5), (8, 9))]
    assert "interleaved on data=1 stage=2 x=2 y=1: 4 microbatches in 27 ticks" in str(summary)
    assert "1 .. 3, 6 .. 7" in str(summary)
