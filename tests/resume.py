"""A pytest plugin (-p tests.resume): leave out what has passed, as long as no source changes.

Tests that pass are written down, one a line, in results/tests/, in a file that is named by a hash
of all sources and versions: after any change, every test runs again.
"""

import hashlib
import json
import sys
from functools import cache
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("tpmlp", "tests", "experiments", "conftest.py", "pyproject.toml", "README.md")


@cache
def record() -> Path:
    """Return the file for the present sources."""
    digest = hashlib.sha256(f"{sys.version} {jax.__version__}".encode())
    folders = (sorted((ROOT / name).rglob("*")) or [ROOT / name] for name in SOURCES)
    for path in (path for folder in folders for path in folder):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return ROOT / "results" / "tests" / f"{digest.hexdigest()[:16]}.jsonl"


def passed_before() -> set[str]:
    """Return the ids of tests that have passed; a last line that was cut short is none."""
    lines = record().read_text().split("\n")[:-1] if record().exists() else []
    return set(map(json.loads, lines))


def pytest_report_header() -> str:
    """Say what is left out, at the top of the output."""
    return f"resume: {len(passed_before())} tests have passed ({record().relative_to(ROOT)})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed."""
    passed = passed_before()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Write results down in the process that collects them, not in the workers of xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


class Recorder:
    """Writes down every test that passes, at once."""

    def __init__(self) -> None:
        record().parent.mkdir(parents=True, exist_ok=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write down a test that passed."""
        if report.when == "call" and report.passed:
            with record().open("a") as file:
                file.write(json.dumps(report.nodeid) + "\n")
