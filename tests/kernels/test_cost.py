"""The formulas of the docstrings are what the compiled step moves.

A failure of a volume means that a collective was added, dropped or merged, or runs over other axes
than kernels/cost.py says: the program or the formula is wrong.
"""

from fractions import Fraction

import numpy as np
import pytest

import tpmlp
from tests.cases import ONE_LAYOUT, PLACEMENTS, mesh_of, name_of, strategy_of
from tpmlp.kernels.cost import Collective, layer_words
from tpmlp.losses import get_loss
from tpmlp.placement import place
from tpmlp.predict import step_collectives

WIDTHS = (17, 12, 20, 10)
BATCH = 30
ITEM_BYTES = 4


def zeros(model, mesh, strategy):
    layers = [
        (np.zeros(shape, np.float32), np.zeros(shape[0], np.float32) if model.bias else None)
        for shape in model.layer_shapes
    ]
    return tpmlp.from_numpy(model, layers, mesh, strategy=strategy)


def counted(sizes, layout, loss="cross_entropy", bias=True):
    mesh, strategy = mesh_of(sizes), strategy_of(layout, len(WIDTHS) - 1)
    model = tpmlp.MLP(WIDTHS, activation="sigmoid", bias=bias)
    params = zeros(model, mesh, strategy)
    step = tpmlp.value_and_grad(
        model, loss=loss, mesh=mesh, strategy=strategy, regularizer=tpmlp.l2(0.1)
    )
    x, y = np.ones((BATCH, WIDTHS[0]), np.float32), np.zeros(BATCH, int)
    batch = tpmlp.shard_batch(model, x, y, mesh=mesh, strategy=strategy, loss=loss)
    return tpmlp.audit(step, params, *batch)


def predicted(sizes, layout, loss="cross_entropy", bias=True):
    strategy = strategy_of(layout, len(WIDTHS) - 1)
    return step_collectives(
        place(WIDTHS, mesh_of(sizes), strategy),
        bias=bias,
        batch_size=BATCH,
        loss=get_loss(loss),
        penalty=True,
    )


def volumes(rows: list[Collective]) -> dict[tuple[str, frozenset[str]], Fraction]:
    """Add up exact bytes by kind and axes."""
    total: dict[tuple[str, frozenset[str]], Fraction] = {}
    for row in rows:
        rounds = 2 if row.kind == "all_reduce" else 1
        words = Fraction(rounds * row.elements * (row.num_devices - 1), row.num_devices) * row.times
        key = row.kind, frozenset(row.axes)
        total[key] = total.get(key, Fraction()) + ITEM_BYTES * words
    return total


def audited(audit: tpmlp.Audit) -> dict[tuple[str, frozenset[str]], Fraction]:
    """Add up exact bytes by kind and axes."""
    total: dict[tuple[str, frozenset[str]], Fraction] = {}
    for row in audit.collectives:
        rounds = 2 if row.kind == "all_reduce" else 1
        assert row.count is not None
        moved = Fraction(rounds * row.payload_bytes * (row.group_size - 1), row.group_size)
        key = row.kind, frozenset(row.axes)
        total[key] = total.get(key, Fraction()) + moved * row.count
    return total


# Every mesh under one layout, and every layout on a mesh with one tensor axis and on one with two.
COUNTED = sorted({*ONE_LAYOUT, *((s, l) for s, l in PLACEMENTS if s in ((1, 8, 1), (2, 2, 2)))})


@pytest.mark.parametrize("placement", COUNTED, ids=name_of)
def test_a_step_moves_what_the_docstrings_say(placement):
    audit, rows = counted(*placement), predicted(*placement)
    assert audited(audit) == volumes(rows)
    for kind in ("all_gather", "reduce_scatter"):
        assert audit.counts.get(kind, 0) == sum(row.kind == kind for row in rows)


def user_loss(z, y):
    return z.sum() * 0.5


@pytest.mark.parametrize(
    "loss",
    ["output", "cross_entropy", tpmlp.cross_entropy(0.1), user_loss],
    ids=["output", "cross_entropy", "smoothing", "user"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_biases_move_what_the_formulas_say(loss, bias):
    where = (2, 2, 2), "column-row", loss, bias
    if loss == "output":
        mesh, strategy = mesh_of(where[0]), strategy_of(where[1], 3)
        model = tpmlp.MLP(WIDTHS, activation="sigmoid", bias=bias)
        params = zeros(model, mesh, strategy)
        step = tpmlp.value_and_grad(
            model, loss=loss, mesh=mesh, strategy=strategy, regularizer=tpmlp.l2(0.1)
        )
        audit = tpmlp.audit(step, params, np.ones((BATCH, 17), np.float32))
    else:
        audit = counted(*where)
    assert audited(audit) == volumes(predicted(*where))


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_column_layer_moves_3_d_in_and_a_row_layer_2_d_out(devices):
    share = (devices - 1) / devices
    sizes = {"d_in": 64, "d_out": 16, "input_gradient": True}
    assert layer_words(**sizes, g=devices, s=1) == pytest.approx(3 * 64 * share)
    assert layer_words(**sizes, g=1, s=devices) == pytest.approx(2 * 16 * share)


def test_auto_moves_no_more_than_any_other_layout():
    widths, mesh = (96, 8, 64, 16, 16), tpmlp.make_mesh(x=8)

    def words(layout):
        placement = place(widths, mesh, tpmlp.Strategy(layout=layout))
        rows = step_collectives(placement, bias=True, batch_size=16)
        return sum(row.words for row in rows)

    choices = ["column", "row"]
    every = [
        words((a, b, c, d)) for a in choices for b in choices for c in choices for d in choices
    ]
    assert words("auto") == min(every)
    assert max(every) > 2 * min(every)
