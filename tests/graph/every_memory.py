"""More graphs, meshes and strategies than tests/graph/test_memory.py has; `make test-all` runs it.

A failure here alone is a kind or a strategy for which no step of the suite stands.
"""

import pytest

from tests.graph import test_memory
from tests.graph.memory_cases import MORE_STEPS, Step, name_of_step


@pytest.mark.parametrize("step", MORE_STEPS, ids=name_of_step)
def test_temporaries_are_what_was_predicted(step: Step):
    test_memory.test_temporaries_are_what_was_predicted(step)
