"""Batches of a run. A failure here means that a run sees other samples than it should.

The order is compared with itself and with numbers written down once: if those change, old runs
can no longer be repeated. Refusals are tested on the name, the value and the row.
"""

from typing import Any

import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of
from tpmlp.losses import get_loss
from tpmlp.placement import place
from tpmlp.train.batches import Plan, Samples, epoch_order, read_samples

X = np.arange(33.0).reshape(11, 3)
LABELS = np.arange(11) % 5

# Orders of (seed 0, epoch 1) and (seed 7, epoch 3), 6 samples.
GOLDEN = ([2, 3, 1, 0, 4, 5], [4, 5, 1, 0, 3, 2])


def read(
    *data: Any,
    loss: Any = "cross_entropy",
    sizes: tuple[int, int, int] = (1, 1, 1),
    dtype: Any = np.float32,
) -> Samples:
    placement = place((3, 5), mesh_of(sizes))
    return read_samples("data", data, placement=placement, loss=get_loss(loss), dtype=dtype)


def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    orders = [epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (1, 2)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(epoch_order(1, 2, 50), orders[3])


def test_the_order_is_the_one_that_earlier_versions_used() -> None:
    assert epoch_order(0, 1, 6).tolist() == GOLDEN[0]
    assert epoch_order(7, 3, 6).tolist() == GOLDEN[1]


def test_an_epoch_visits_every_sample_once_and_its_last_batch_is_smaller() -> None:
    plan = Plan(seed=3, num_samples=11, batch_size=4, num_steps=7)
    steps = list(plan.steps())
    assert [(s.number, s.epoch, len(s.rows), s.ends_epoch) for s in steps] == [
        (1, 1, 4, False),
        (2, 1, 4, False),
        (3, 1, 3, True),
        (4, 2, 4, False),
        (5, 2, 4, False),
        (6, 2, 3, True),
        (7, 3, 4, False),
    ]
    for epoch in (1, 2):
        rows = np.concatenate([s.rows for s in steps if s.epoch == epoch])
        np.testing.assert_array_equal(rows, epoch_order(3, epoch, 11))


def test_a_plan_can_start_after_any_step() -> None:
    plan = Plan(seed=3, num_samples=11, batch_size=4, num_steps=9)
    whole = [(s.number, s.epoch, s.rows.tolist(), s.ends_epoch) for s in plan.steps()]
    for done in range(10):
        left = [(s.number, s.epoch, s.rows.tolist(), s.ends_epoch) for s in plan.steps(done)]
        assert left == whole[done:]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 2, 1), (1, 5, 1)])
def test_a_batch_has_the_rows_and_is_filled_up_with_weight_0(sizes: tuple[int, int, int]) -> None:
    samples = read(X, LABELS, sizes=sizes)
    rows = np.array([10, 0, 7])
    batch = samples.take(rows, 6)
    size = 8 if sizes[0] == 4 else 6
    assert batch.x.shape == (size, samples.placement.padded_widths[0])
    np.testing.assert_array_equal(np.asarray(batch.x)[:3, :3], X[rows])
    np.testing.assert_array_equal(np.asarray(batch.y)[:3], LABELS[rows])
    np.testing.assert_array_equal(np.asarray(batch.weight), [1, 1, 1] + [0] * (size - 3))
    assert (np.asarray(batch.x)[3:, :3] == X[-1]).all()
    assert not np.asarray(batch.x)[:, 3:].any()
    assert all(a.sharding == s for a, s in zip(batch, samples.shardings, strict=True))


def test_all_samples_come_in_order_with_the_sum_of_their_weights() -> None:
    weight = np.linspace(1, 2, 11)
    batches = list(read(X, LABELS, weight, dtype=np.float64).in_order(4))
    assert [b.x.shape[0] for b, _ in batches] == [4, 4, 4]
    assert [w for _, w in batches] == pytest.approx([weight[i : i + 4].sum() for i in (0, 4, 8)])
    rows = np.concatenate([np.asarray(b.x)[np.asarray(b.weight) > 0] for b, _ in batches])
    np.testing.assert_array_equal(rows, X)


def test_rows_of_weight_0_are_left_out() -> None:
    weight = np.ones(11)
    weight[[0, 4]] = 0
    samples = read(X, LABELS, weight)
    assert samples.num_samples == 9
    np.testing.assert_array_equal(samples.host.x[:-1], np.delete(X, [0, 4], axis=0))


def test_samples_get_the_dtype_of_the_parameters() -> None:
    samples = read(X.astype(int), X[:, [0, 0, 0, 0, 0]], loss="mse")
    assert {samples.host.x.dtype, samples.host.y.dtype, samples.host.weight.dtype} == {
        np.dtype(np.float32)
    }


def with_entry(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


VALUES = np.ones((11, 5))
REFUSALS = {
    "no y": ((X,), "cross_entropy", r"\(x, y\).*tuple of length 1"),
    "not a tuple": (X, "cross_entropy", r"\(x, y\).*ndarray"),
    "y missing": ((X, None), "cross_entropy", "y must be given"),
    "x of another width": ((X[:, :2], LABELS), "cross_entropy", r"d_0=3: got x of shape \(11, 2\)"),
    "x empty": ((X[:0], LABELS[:0]), "cross_entropy", "at least one row"),
    "x text": ((X.astype(str), LABELS), "cross_entropy", "real numbers"),
    "x NaN": ((with_entry(X, (4, 1), np.nan), LABELS), "cross_entropy", "nan in row 4"),
    "x too large": ((with_entry(X, (4, 1), 1e39), LABELS), "cross_entropy", "inf in row 4"),
    "y shorter": ((X, LABELS[:9]), "cross_entropy", r"y of shape \(9,\).*11 rows"),
    "y float": ((X, LABELS + 0.0), "cross_entropy", "integer labels.*float64"),
    "y too large": ((X, with_entry(LABELS, 2, 5)), "cross_entropy", "0 .. 4: got 5 in row 2"),
    "y negative": ((X, with_entry(LABELS, 2, -1)), "cross_entropy", "got -1 in row 2"),
    "y wraps": ((X, with_entry(LABELS, 2, 2**32)), "cross_entropy", "got 4294967296 in row 2"),
    "y of another width": ((X, VALUES[:, :4]), "mse", r"\(11, 5\).*got y of shape \(11, 4\)"),
    "y infinite": ((X, with_entry(VALUES, 3, np.inf)), "mse", "inf in row 3"),
    "y too large for float32": ((X, with_entry(VALUES, 3, -1e39)), "mse", "-inf in row 3"),
    "y neither 0 nor 1": ((X, with_entry(VALUES, (3, 0), 2)), "logistic", r"y\[3\]"),
    "weight negative": ((X, LABELS, with_entry(X[:, 0], 6, -2)), "cross_entropy", "-2.0 in row 6"),
    "weight all 0": ((X, LABELS, 0 * X[:, 0]), "cross_entropy", "not all 0"),
    "weight NaN": ((X, LABELS, with_entry(X[:, 0], 6, np.nan)), "cross_entropy", "nan in row 6"),
    "weight 2D": ((X, LABELS, X), "cross_entropy", r"\[B\]: got weight of shape \(11, 3\)"),
}


@pytest.mark.parametrize(("data", "loss", "message"), REFUSALS.values(), ids=REFUSALS)
def test_bad_data_is_refused_with_its_name_value_and_row(
    data: Any, loss: str, message: str
) -> None:
    placement = place((3, 5), tpmlp.make_mesh(x=1))
    with pytest.raises(ValueError, match=rf"(?s)^validation: .*{message}"):
        read_samples("validation", data, placement=placement, loss=get_loss(loss), dtype=np.float32)
