"""make test-all: a failure means that it leaves out files which it is there to run."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_test_all_collects_the_files_that_make_test_leaves_out():
    # Named beside their folder they would be left out without a word: pytest takes the folder.
    recipe = subprocess.run(
        ["make", "-n", "test-all"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (patterns,) = re.findall('-o python_files="(.*?)"', recipe)
    files = [path.name for path in (ROOT / "tests").rglob("*.py")]
    left_out = [name for name in files if name.startswith("every_")]
    assert len(left_out) == 9
    for name in [*left_out, "test_makefile.py"]:
        assert any(fnmatch(name, pattern) for pattern in patterns.split())
