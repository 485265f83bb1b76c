"""What the planner's tests share: hardware with round numbers, and problems on it."""

from typing import Any

import tpmlp
from tpmlp.planner.cost import Problem
from tpmlp.planner.hardware import Hardware, Level

# CPUs, so that bytes are those of this machine's compiler; one FLOP a second, one byte a second.
PLAIN = Hardware(
    name="plain",
    platform="cpu",
    flops_per_s={"bfloat16": 1.0, "float32": 1.0, "float64": 1.0},
    memory_bytes=1e9,
    memory_bytes_per_s=1e9,
    levels=(Level(name="link", devices=None, bytes_per_s=1.0, latency_s=0.0),),
)


def problem(widths: tuple[int, ...], batch_size: int, **given: Any) -> Problem:
    """Return a problem on PLAIN, of an MLP with these widths."""
    return Problem(model=tpmlp.MLP(widths), batch_size=batch_size, **{"hardware": PLAIN, **given})
