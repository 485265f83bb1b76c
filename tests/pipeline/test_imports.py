"""Schedules are data: a failure means that looking at one takes JAX."""

import subprocess
import sys
from pathlib import Path

import tpmlp.pipeline


def test_no_module_of_a_schedule_imports_jax():
    folder = Path(tpmlp.pipeline.__file__).parent
    # Without tpmlp/__init__.py, which imports everything.
    names = ["route", "schedule", "generators", "simulate", "buffers", "draw"]
    program = (
        "import sys, types\n"
        "package = types.ModuleType('tpmlp')\n"
        f"package.__path__ = [{str(folder.parent)!r}]\n"
        "sys.modules['tpmlp'] = package\n"
        f"import {', '.join(f'tpmlp.pipeline.{name}' for name in names)}\n"
        "print('jax' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "False"
