"""verify cries wolf never, in a thousand clean runs; tests/inspection/test_faults.py has some.

`make test-all` runs this. A failure here alone is a bound that a rare draw exceeds.
"""

import pytest

from tests.inspection.test_faults import CLEAN, assert_never_a_bug

NUM_RUNS = 1000


@pytest.mark.parametrize(("sizes", "fields", "loss"), CLEAN)
def test_a_clean_run_is_never_called_a_bug(sizes, fields, loss):
    assert_never_a_bug(sizes, fields, loss, NUM_RUNS // len(CLEAN))
