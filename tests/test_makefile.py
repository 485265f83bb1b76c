"""make's tests: a failure means that a target leaves out what it is there to run."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def recipe_of(target):
    """Return the commands that make would run."""
    return subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("marker", ["gpu", "aot"])
def test_tests_that_are_marked_have_a_target_and_are_left_out_elsewhere(marker):
    assert f" -m {marker} " in recipe_of(f"test-{marker}")
    assert f"not {marker}" in (ROOT / "pyproject.toml").read_text()


def test_test_all_collects_the_files_that_make_test_leaves_out():
    # Named beside their folder they would be left out without a word: pytest takes the folder.
    recipe = recipe_of("test-all")
    (patterns,) = re.findall('-o python_files="(.*?)"', recipe)
    files = [path.name for path in (ROOT / "tests").rglob("*.py")]
    left_out = [name for name in files if name.startswith("every_")]
    assert len(left_out) == 9
    for name in [*left_out, "test_makefile.py"]:
        assert any(fnmatch(name, pattern) for pattern in patterns.split())
