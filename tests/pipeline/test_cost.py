"""What a pipeline is said to move is in the compiled program, byte for byte.

The program has every task as a branch, once a tick: that is counted. What a stage runs of it
follows from its own layers and the microbatches.
"""

from collections import defaultdict

import pytest

import tpmlp
from tests.pipeline.test_executor import BATCH, CASES, Case
from tpmlp.kernels.cost import total_bytes
from tpmlp.losses import get_loss
from tpmlp.pipeline.cost import program_collectives, stage_collectives

# One and two tensor axes, data, chunks both ways round, empty slots, no slots; what is
# kept, and split weights.
SOME = CASES[:9:4] + CASES[11:12] + CASES[-4:]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_program_moves_what_is_predicted(case):
    check_bytes(case)


def check_bytes(case: Case) -> None:
    """Hold the bytes that are predicted to those of the compiled step, by kind and axes."""
    given = {"loss": case.loss, "mesh": case.mesh, "strategy": case.strategy}
    step = tpmlp.value_and_grad(case.model, **given)
    counted: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for row in tpmlp.audit(step.compile(BATCH, dtype="float64")).collectives:
        if row.kind != "ppermute":  # messages: tests/pipeline/test_memory.py
            counted[row.kind, row.axes] += row.total_bytes or 0
    predicted: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    placement = case.model.place(case.mesh, case.strategy)
    loss = get_loss(case.loss)
    for row in program_collectives(placement, batch_size=BATCH, dtype="float64", loss=loss):
        predicted[row.kind, row.axes] += total_bytes([row])
    assert counted
    assert {key: pytest.approx(value) for key, value in predicted.items()} == counted


def test_a_stage_moves_what_its_own_layers_move():
    """Of 8 equal layers on 4 stages, a stage in the middle moves those of two layers."""
    model = tpmlp.MLP((16,) * 9)
    strategy = tpmlp.Strategy(schedule="1f1b", microbatches=4, layout="column")
    placement = model.place(tpmlp.make_mesh(stage=4, x=2), strategy)
    rows = stage_collectives(placement, 1, batch_size=32)
    moved = total_bytes(row for row in rows if row.axes == ("x",))
    # A column layer gathers h twice and scatters dh: half of [16, 8] float32, 4 times.
    assert moved == 2 * 3 * 4 * (16 * 8 * 4) // 2
