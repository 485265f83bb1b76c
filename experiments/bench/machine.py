"""The processor that a benchmark ran on, as far as its figures depend on it."""

import os
import platform
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def describe_machine(cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """Return model, cores and the flags that decide how fast a product is.

    Without a /proc/cpuinfo (macOS) there are no flags, and the model is what Python knows.
    """
    fields = _first_processor(cpuinfo)
    present = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": _usable_cores(),
        "flags": [flag for flag in FLAGS if flag in present],
        "matrix_units": "amx_tile" in present,
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _usable_cores() -> int:
    """Return the cores that this process may use; all of them where no system call says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    if not cpuinfo.exists():
        return {}
    first, _, _ = cpuinfo.read_text(encoding="utf-8").partition("\n\n")
    lines = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
