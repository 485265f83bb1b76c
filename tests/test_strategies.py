"""Every strategy is the reference, and moves what is predicted.

Rows are few and cover every two values that may meet (tests/pairwise.py): mesh, layout, keep,
overlap, split weights, microbatches, and three types. Each compiles one program, of which all is
asked. A tensor that fails in rows with one value in common points at that value; the collectives
alone: something is moved that the cost model does not know, or more often, or in another type.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest

from tests.cases import relative_error
from tests.pairwise import covering, pairs, pairs_of, rows_of
from tests.strategies import (
    FEW_ROWS,
    FIELDS,
    ROWS,
    TENSORS,
    Row,
    compatible,
    counts,
    outcome,
    predicted,
    volumes,
    volumes_of,
)
from tests.tolerances import FLOAT64


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Give the list that compilations within the block are added to."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def equals_the_reference(row: Row, tensor: str) -> None:
    run = outcome(row)
    got, wanted = run.tensors[tensor], run.task.expected[tensor]
    assert got.dtype == row.param_dtype
    if row.is_real:
        assert relative_error(got, wanted) <= FLOAT64
    else:
        np.testing.assert_array_equal(got, wanted)


def is_zero_where_padded(row: Row) -> None:
    run = outcome(row)
    for layer, shape in zip(run.result[1], run.task.model.layer_shapes, strict=True):
        for array in layer:
            inside = np.zeros(array.shape, bool)
            inside[tuple(slice(n) for n in shape[: array.ndim])] = True
            assert not array[~inside].any()


def moves_what_is_predicted(row: Row) -> None:
    assert volumes_of(outcome(row).audit) == volumes(predicted(row))


def communicates_as_often_as_predicted(row: Row) -> None:
    got, wanted = outcome(row).audit.counts, counts(predicted(row))
    # All-reduces may be combined.
    for kind in ("all_gather", "reduce_scatter", "ppermute"):
        assert got.get(kind, 0) == wanted.get(kind, 0)


def compiles_once(row: Row) -> None:
    run = outcome(row)
    with compilations() as compiled:
        again = run.step(run.params, **run.batch)
        run.step(run.params, **dict(zip(run.batch, run.task.samples, strict=True)))
    assert not compiled
    for got, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(run.result), strict=True):
        np.testing.assert_array_equal(got, wanted)


CLAIMS: dict[str, Callable[[Row], None]] = {
    **{t: lambda row, t=t: equals_the_reference(row, t) for t in TENSORS},
    "padding": is_zero_where_padded,
    "bytes": moves_what_is_predicted,
    "counts": communicates_as_often_as_predicted,
}
# Every claim on every row, and that of compilations on few.
CASES = [
    (row, claim)
    for row in ROWS
    for claim in (*CLAIMS, *(["compilations"] if row in FEW_ROWS else []))
]


@pytest.mark.parametrize(("row", "claim"), CASES, ids=str)
def test_a_strategy_is_the_reference_and_moves_what_is_predicted(row, claim):
    # Each claim is a function above, which asserts.
    {**CLAIMS, "compilations": compiles_once}[claim](row)


def test_the_rows_have_every_compatible_pair_of_values():
    covered = set().union(*(pairs_of({f: getattr(row, f) for f in FIELDS}) for row in ROWS))
    assert covered >= pairs(FIELDS, compatible)


def test_a_covering_has_every_pair_and_only_compatible_rows():
    fields = {"a": (1, 2, 3), "b": (1, 2, 3), "c": (1, 2, 3), "d": (1, 2, 3)}

    def increasing(a, b):
        return "d" in (a[0], b[0]) or (a[1] <= b[1] if a[0] < b[0] else b[1] <= a[1])

    rows = covering(fields, increasing)
    assert rows == covering(fields, increasing)
    assert set().union(*map(pairs_of, rows)) == pairs(fields, increasing)
    assert len(rows) < len(list(rows_of(fields, increasing)))
