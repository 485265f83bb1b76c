"""The mutants whose killers take long; tests/test_mutants.py has the others, and all edits.

`make test-all` runs this. A surviving mutant means what it means there.
"""

import pytest

from tests.test_mutants import MUTANTS, SLOW, kill


@pytest.mark.parametrize("name", SLOW)
def test_mutant_is_killed(name, tmp_path):
    kill(MUTANTS[name], tmp_path)
