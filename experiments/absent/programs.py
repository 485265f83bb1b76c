"""What is compiled, and what is counted in it."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

import tpmlp
from experiments.absent.hardware import HARDWARE
from tpmlp.inspection.audit import Audit
from tpmlp.kernels.cost import total_bytes
from tpmlp.predict import step_collectives, step_temp_bytes
from tpmlp.step import Step
from tpmlp.strategy import Keep, Overlap

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
    step = make_step(program)
    began, began_cpu = time.perf_counter(), time.process_time()
    compiled = step.compile(program.batch, dtype=program.dtype)
    if program.result == "update":
        began, began_cpu = time.perf_counter(), time.process_time()
        compiled = compile_update(step, compiled)
    compile_s, compile_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    audit, expected = tpmlp.audit(compiled), predicted(step, program)
    return {
        **asdict(program),
        "kept_bytes": program.kept_bytes,
        "compile_s": compile_s,
        "compile_cpu_s": compile_cpu_s,
        **memory(audit),
        "temp_bytes_predicted": expected["temp_bytes"],
        **communication(audit, expected),
    }


def make_step(program: Program) -> Step:
    """Return the step of a program."""
    return tpmlp.value_and_grad(
        tpmlp.MLP((program.width,) * (program.layers + 1)),
        loss="mse",
        mesh=HARDWARE[program.hardware].mesh(),
        strategy=tpmlp.Strategy(
            compute_dtype=program.compute_dtype, keep=program.keep, overlap=program.overlap
        ),
    )


def compile_update(step: Step, compiled: jax.stages.Compiled) -> jax.stages.Compiled:
    """Compile a step of gradient descent on the arguments that a step was compiled for."""

    def update(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        value, grads = step.objective.value_and_grad(params, batch)
        new = jax.tree.map(lambda w, dw: w - jnp.asarray(RATE, w.dtype) * dw, params, grads)
        return value.loss + value.penalty, new

    placed = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        compiled.args_info[0],
        compiled.input_shardings[0],
    )
    return jax.jit(update, donate_argnums=0).lower(*placed).compile()


def predicted(step: Step, program: Program) -> Row:
    """Return what tpmlp.predict expects: of each collective how many, bytes moved, bytes held."""
    rows = step_collectives(
        step.objective.placement,
        bias=True,
        batch_size=program.batch,
        dtype=program.dtype,
        loss=step.objective.loss,
    )
    counts: Counter[str] = Counter()
    for row in rows:
        hops = row.num_devices - 1 if row.kind == "ppermute" else 1
        counts[row.kind] += hops * row.times
    where, size = step.objective.placement, {"bias": True, "batch_size": program.batch}
    is_step = program.result == "gradients"
    temp_bytes = step_temp_bytes(where, **size, dtype=program.dtype) if is_step else None
    return {"counts": dict(counts), "bytes": total_bytes(rows), "temp_bytes": temp_bytes}


def memory(audit: Audit) -> Row:
    """Return the bytes that a device holds."""
    names = ("argument", "output", "temp", "alias", "peak", "host_temp")
    return {f"{name}_bytes": getattr(audit, f"{name}_bytes") for name in names}


def communication(audit: Audit, predicted: Row) -> Row:
    """Return collectives as compiled and as predicted, and those that are not what was written."""
    counts = audit.counts
    written = predicted["counts"].get("reduce_scatter", 0)
    axes: Counter[str] = Counter()
    for row in audit.collectives:
        if row.kind == "all_reduce" and row.payload_bytes >= 2**20 and row.count:
            axes[",".join(row.axes)] += row.count
    overlapping = [row for row in audit.collectives if row.overlaps]
    return {
        "counts": counts,
        "counts_predicted": predicted["counts"],
        "bytes": audit.bytes_by(),
        "bytes_predicted": predicted["bytes"],
        "turned": written - counts.get("reduce_scatter", 0),
        "large_all_reduces": dict(axes),
        "permutes": counts.get("ppermute", 0),
        "permutes_overlapping": sum(r.count or 0 for r in overlapping if r.kind == "ppermute"),
    }
