"""Every strategy on every mesh: layout x keep x overlap x split weights x microbatches.

What tests/test_strategies.py claims of few rows, of all of them; the three types, which matter to
fewer of the others, are drawn for each row. `make test-all` runs this, in well under an hour, and
goes on where it was stopped. A row that fails here alone needs three values or more to meet.
"""

import random

import pytest

from tests.pairwise import rows_of
from tests.strategies import FIELDS, KEEPS, Row, compatible
from tests.test_strategies import CLAIMS

TYPES = ("param_dtype", "compute_dtype", "reduce_dtype")
SIZES = (
    *((1, 1, 1), (1, 2, 1), (1, 3, 1), (1, 1, 7), (1, 8, 1), (1, 2, 3), (1, 4, 2)),
    *((8, 1, 1), (3, 2, 1), (2, 1, 4), (4, 2, 1), (2, 2, 2)),
)


def every_row() -> list[Row]:
    """Return all rows, each with types of its own; the same ones at every call."""
    rng = random.Random(0)
    others = {field: values for field, values in FIELDS.items() if field not in TYPES}
    fields = {**others, "sizes": SIZES, "keep": tuple(KEEPS)}
    return [
        Row(**row, **{field: rng.choice(FIELDS[field]) for field in TYPES})
        for row in rows_of(fields, compatible)
    ]


@pytest.mark.parametrize("row", every_row(), ids=str)
def test_a_strategy_is_the_reference_and_moves_what_is_predicted(row):
    for claim, check in CLAIMS.items():
        try:
            check(row)
        except AssertionError as error:
            raise AssertionError(f"{claim} of {row}: {error}") from error
