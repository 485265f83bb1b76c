"""reduction="invariant" on every mesh that eight devices can be; tests/test_invariant.py has some.

`make test-all` runs this. A failure here alone is a mesh that no neighbour of it stands for.
"""

from itertools import product

import pytest

from tests.cases import Sizes, name_of
from tests.test_invariant import (
    ONE,
    RUNS,
    assert_same_bits,
    history,
    steps_of_small_batches,
)

POWERS = (1, 2, 4, 8)
WIDTHS = (17, 12, 20, 10)
MESHES = [(d, x, y) for d, x, y in product(POWERS, POWERS, POWERS) if 1 < d * x * y <= 8]


@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
@pytest.mark.parametrize("run", RUNS)
def test_a_whole_training_run_has_the_same_bits(run: str, sizes: Sizes) -> None:
    assert_same_bits(history(run, sizes, WIDTHS), history(run, ONE, WIDTHS))


@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_a_batch_of_a_few_samples_has_the_same_bits(sizes: Sizes) -> None:
    assert_same_bits(steps_of_small_batches(sizes), steps_of_small_batches(ONE))
