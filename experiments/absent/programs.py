"""What is compiled, and what is counted in it."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

import tpmlp
from experiments.absent.hardware import HARDWARE
from tpmlp.inspection.audit import Audit
from tpmlp.planner.ahead import CompiledStep
from tpmlp.planner.moved import compare_collectives
from tpmlp.strategy import Keep, Overlap
from tpmlp.summary import Summary

Row = dict[str, Any]
Result = Literal["gradients", "update"]

KEEPS: tuple[Keep, ...] = ("shard", "gathered", "recompute")
RINGS: tuple[Overlap, ...] = ("none", "ring", "bidirectional_ring")
RATE = 1e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One training step of an MLP whose layers all have one width.

    Attributes:
        hardware: a name in HARDWARE.
        layers: number of W_l.
        width: d, of every layer.
        batch: samples of a step.
        dtype: of the parameters.
        compute_dtype: of products and gathers.
        keep: as in Strategy.
        overlap: as in Strategy.
        result: the gradients; or parameters updated by plain gradient descent, in the memory of
            those that were given.
        target_s: what compiling should take at most, or None.
    """

    hardware: str
    layers: int
    width: int
    batch: int
    dtype: str = "bfloat16"
    compute_dtype: str = "bfloat16"
    keep: Keep = "shard"
    overlap: Overlap = "none"
    result: Result = "gradients"
    target_s: float | None = None

    @property
    def kept_bytes(self) -> int:
        """Bytes on one device of one array a layer, split over all devices."""
        elements = (self.layers - 1) * self.width * self.batch
        return elements * jnp.dtype(self.compute_dtype).itemsize // self._num_devices

    @property
    def model(self) -> tpmlp.MLP:
        """What is trained."""
        return tpmlp.MLP((self.width,) * (self.layers + 1))

    @property
    def strategy(self) -> tpmlp.Strategy:
        """How it is trained."""
        return tpmlp.Strategy(
            compute_dtype=self.compute_dtype, keep=self.keep, overlap=self.overlap
        )

    @property
    def _num_devices(self) -> int:
        return HARDWARE[self.hardware].num_devices

    def __str__(self) -> str:
        ring = "" if self.overlap == "none" else f", {self.overlap}"
        size = f"{self.layers} layers of {self.width}"
        return f"{size} for {self.hardware}, {self.dtype}, {self.keep}{ring}, {self.result}"


# Seconds to compile 64 layers, and 96 of 256 on CPU.
TARGETS_S = {"64 v5p": 7.0, "256 v6e": 12.0, "64 H100": 2.0, "8 CPU": 1.0}


def programs(hardware: Sequence[str], layers: Sequence[int]) -> list[Program]:
    """Return what is compiled for hardware, at numbers of layers."""
    found = [p for name in hardware for number in layers for p in _large(name, number)]
    found += [p for name in hardware for p in _rings(name)]
    return found + [p for name in hardware for p in _deep(name)]


def _deep(hardware: str) -> list[Program]:
    if hardware != "8 CPU":
        return []
    # Many CPUs have no bfloat16.
    shape: dict[str, Any] = {"layers": 96, "width": 256, "batch": 256, "dtype": "float32"}
    return [
        Program(
            hardware=hardware,
            **shape,
            compute_dtype="float32",
            keep=keep,
            target_s=TARGETS_S[hardware] if keep == "shard" else None,
        )
        for keep in KEEPS
    ]


def _large(hardware: str, layers: int) -> list[Program]:
    if hardware.startswith("8 "):
        return []
    shape = {"hardware": hardware, "layers": layers, "width": 32768, "batch": 16384}
    target_s = TARGETS_S[hardware] if layers >= 64 else None
    return [
        *(Program(**shape, keep=k, target_s=target_s if k == "shard" else None) for k in KEEPS),
        Program(**shape, result="update"),
        Program(**shape, result="update", dtype="float32"),
    ]


def _rings(hardware: str) -> list[Program]:
    if hardware not in ("8 v5p", "8 H100"):
        return []
    shape = {"hardware": hardware, "layers": 4, "width": 8192, "batch": 8192}
    return [Program(**shape, overlap=overlap) for overlap in RINGS]


def measure(program: Program) -> Row:
    """Compile a program and count what is in it."""
    step = compile_gradients(program)
    if program.result == "update":
        step = compile_update(step, program)
    return {
        **asdict(program),
        "kept_bytes": program.kept_bytes,
        "compile_s": step.compile_s,
        "compile_cpu_s": step.compile_cpu_s,
        **memory(step.audit),
        "temp_bytes_predicted": step.predicted_temp_bytes,
        **communication(step),
    }


def compile_gradients(program: Program) -> CompiledStep:
    """Compile the step of a program that returns gradients."""
    hardware = HARDWARE[program.hardware]
    return tpmlp.compile_for(
        program.model,
        program.batch,
        hardware.topology,
        {"x": hardware.x, "y": hardware.y},
        strategy=program.strategy,
        loss="mse",
        dtype=program.dtype,
    )


def compile_update(step: CompiledStep, program: Program) -> CompiledStep:
    """Compile gradient descent on the arguments that a step was compiled for.

    Not compile_for's update, which is fit's: that returns more scalars, and its compilers put
    temporaries elsewhere, up to 4 % of them.
    """
    (params, batch), _ = step.compiled.input_shardings
    mesh = params[0][0].mesh
    objective = tpmlp.value_and_grad(
        program.model, loss="mse", mesh=mesh, strategy=program.strategy
    ).objective

    def update(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        value, grads = objective.value_and_grad(params, batch)
        new = jax.tree.map(lambda w, dw: w - jnp.asarray(RATE, w.dtype) * dw, params, grads)
        return value.loss + value.penalty, new

    placed = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        step.compiled.args_info[0],
        (params, batch),
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    compiled = jax.jit(update, donate_argnums=0).lower(*placed).compile()
    compile_s, compile_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    assert isinstance(step.summary, Summary)
    found = tpmlp.audit(compiled)
    return replace(
        step,
        compiled=compiled,
        compile_s=compile_s,
        compile_cpu_s=compile_cpu_s,
        predicted_temp_bytes=None,
        audit=found,
        moved=compare_collectives(step.summary.collectives, found),
    )


def memory(audit: Audit) -> Row:
    """Return the bytes that a device holds."""
    names = ("argument", "output", "temp", "alias", "peak", "host_temp")
    return {f"{name}_bytes": getattr(audit, f"{name}_bytes") for name in names}


def communication(step: CompiledStep) -> Row:
    """Return collectives as compiled and as predicted, and those that are not what was written."""
    counts, predicted = step.audit.counts, Counter[str]()
    for row in step.moved:
        predicted[row.kind] += row.predicted_count
    axes: Counter[str] = Counter()
    for row in step.audit.collectives:
        if row.kind == "all_reduce" and row.payload_bytes >= 2**20 and row.count:
            axes[",".join(row.axes)] += row.count
    overlapping = [row for row in step.audit.collectives if row.overlaps]
    return {
        "counts": counts,
        "counts_predicted": dict(+predicted),
        "bytes": step.audit.bytes_by(),
        "bytes_predicted": sum(row.predicted_bytes for row in step.moved),
        "turned": predicted["reduce_scatter"] - counts.get("reduce_scatter", 0),
        "large_all_reduces": dict(axes),
        "permutes": counts.get("ppermute", 0),
        "permutes_overlapping": sum(r.count or 0 for r in overlapping if r.kind == "ppermute"),
    }
