"""Each row of the rule table on every mesh of the suite; tests/graph/test_rules.py has some.

`make test-all` runs this. A failure here alone is a mesh that no neighbour of it stands for.
"""

import pytest

from conftest import MESHES
from tests.cases import name_of
from tests.graph import test_rules
from tests.graph.rows import ROWS


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("sizes", [s for s in MESHES if s not in test_rules.SOME], ids=name_of)
def test_a_row_is_a_function_and_its_transpose(sizes, name):
    test_rules.test_an_output_is_that_of_the_plain_function(sizes, name)
    test_rules.test_every_gradient_is_that_of_the_plain_function(sizes, name)
    test_rules.test_backward_is_the_adjoint_of_forward(sizes, name)
