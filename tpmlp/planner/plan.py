"""Plan: this model, this batch, these devices: does it fit, how fast, which mesh and strategy?

Every mesh and every strategy that may be the best on it is timed for the hardware; those that fit
are ranked by their time one after another (tpmlp.planner.timing), as collectives run where
overlap="none" and the compiler hides none of them. What it can hide at most is beside it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tpmlp.checks import check_count, check_dtype, check_positive
from tpmlp.model import MLP
from tpmlp.planner.cost import Cost, Problem, StepMemory
from tpmlp.planner.draw import draw_plan
from tpmlp.planner.search import (
    NO_BETTER,
    NO_PIPELINE,
    TOO_FEW_SAMPLES,
    TOO_LARGE,
    Found,
    all_candidates,
    describe,
    search,
)
from tpmlp.table import format_bytes, text_table


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Plan:
    """Meshes and strategies that fit, fastest first; prints as a table.

    Attributes:
        problem: what is trained on what.
        devices: how many there are.
        memory_limit: bytes of a device.
        costs: of the fastest, and after them of those that hold less, ever slower.
        left_out: how many others there were, by reason.
    """

    problem: Problem
    devices: int
    memory_limit: float
    costs: tuple[Cost, ...]
    left_out: Mapping[str, int]

    @property
    def best(self) -> Cost:
        """The fastest: run it on make_mesh(**best.mesh) with strategy=best.strategy."""
        return self.costs[0]

    @property
    def front(self) -> tuple[Cost, ...]:
        """Those than which none is both faster and smaller."""
        found: list[Cost] = []
        for cost in self.costs:
            if not found or cost.memory.peak_bytes < found[-1].memory.peak_bytes:
                found.append(cost)
        return tuple(found)

    def __str__(self) -> str:
        model, hardware = self.problem.model, self.problem.hardware
        parts = [
            f"{model.num_parameters:,} parameters, batch {self.problem.batch_size}, on "
            f"{self.devices} x {hardware.name} with {format_bytes(self.memory_limit)} each",
            self._table(),
            "step: one after another, by which they are ranked; overlapped: all that can hide "
            "hidden\n* none here is both faster and smaller",
        ]
        if self.left_out:
            why = [(count, reason) for reason, count in self.left_out.items()]
            parts.append(text_table(["left out", "why"], why))
        return "\n\n".join(parts)

    __repr__ = __str__

    def _table(self) -> str:
        front = self.front
        rows = [
            (
                f"{cost.time.step_s:.4g}",
                f"{cost.time.overlapped_s:.4g}",
                f"{cost.time.products_s:.4g}",
                f"{cost.time.collectives_s:.4g}",
                f"{cost.time.bubble_s:.4g}",
                format_bytes(cost.memory.peak_bytes),
                ("* " if cost in front else "  ") + describe(cost.mesh, cost.strategy),
            )
            for cost in self.costs
        ]
        times = ("step [s]", "overlapped", "products", "collectives", "bubble")
        return text_table([*times, "on a device", "  mesh and strategy"], rows)

    def plot(self) -> Any:
        """Return a matplotlib Figure of time against memory, with the Pareto front.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return draw_plan(self.costs, self.front, self.memory_limit)


def plan(
    model: MLP,
    batch_size: int,
    hardware: Any,
    devices: int,
    memory_limit: float | None = None,
    *,
    dtype: Any = "float32",
    compute_dtype: Any = None,
    loss: Any = "mse",
    optimizer_bytes: float = 8,
    most: int = 20,
) -> Plan:
    """Rank the meshes and strategies that fit by predicted time; no device is needed.

    Args:
        model: an MLP.
        batch_size: samples of one step.
        hardware: the name of a chip, for example "h100" or "v5p", or a Hardware.
        devices: how many there are.
        memory_limit: bytes that a step may take on a device; all that the hardware has by default,
            of which a runtime keeps a few per cent for itself.
        dtype: of the parameters.
        compute_dtype: of products, as Strategy has it; the parameters' by default. Types change
            numbers, so they are for you to choose.
        loss: the loss.
        optimizer_bytes: of the optimiser's states, for each parameter: 0 for plain SGD, 4 for
            momentum in float32, 8 for Adam in float32.
        most: how many of the fastest to list.

    Returns:
        A Plan; print it, plot it, or run its `.best`.

    Raises:
        ValueError: something that is none of these; or no mesh and strategy that fits, with the
            nearest miss and what would make it fit.

    Examples:
        >>> mlp = MLP((1024, 4096, 4096, 1024))
        >>> found = plan(mlp, 8192, "h100", devices=8, compute_dtype="bfloat16")
        >>> found.best.mesh
        {'data': 4, 'stage': 1, 'x': 2, 'y': 1}
        >>> found.best.time.step_s < plan(mlp, 8192, "a100", devices=8).best.time.step_s
        True
    """
    problem = Problem(
        model=model,
        batch_size=batch_size,
        hardware=hardware,
        dtype=dtype,
        loss=loss,
        optimizer_bytes=optimizer_bytes,
    )
    devices = check_count("devices", devices, "Use for example devices=8.")
    most = check_count("most", most, "Use for example most=20.")
    if compute_dtype is not None:
        compute_dtype = check_dtype("compute_dtype", compute_dtype)
        problem.hardware.peak_flops_per_s(compute_dtype)
    limit = problem.hardware.memory_bytes if memory_limit is None else memory_limit
    limit = float(check_positive("memory_limit", limit, "Use bytes, for example 80e9."))
    candidates = all_candidates(devices, compute_dtype)
    found = search(problem, candidates, memory_limit=limit, most=most)
    if not found.kept:
        raise ValueError(_nothing_fits(problem, devices, limit, found))
    reasons = (TOO_FEW_SAMPLES, NO_PIPELINE, TOO_LARGE, NO_BETTER)
    return Plan(
        problem=problem,
        devices=devices,
        memory_limit=limit,
        costs=tuple(
            Cost(
                mesh=one.candidate.mesh,
                strategy=one.candidate.strategy,
                time=one.time,
                memory=memory,
                traffic=problem.traffic(one.placement),
            )
            for one, memory in found.kept
        ),
        left_out={reason: found.left_out[reason] for reason in reasons if found.left_out[reason]},
    )


def _nothing_fits(problem: Problem, devices: int, limit: float, found: Found) -> str:
    """Return what to say of the nearest miss, and what would make it fit.

    There is one: a mesh with all devices on x has samples for each of them.
    """
    one, _ = found.least[0]
    memory = problem.memory(one.placement)
    state = _state_bytes(problem)
    return (
        f"memory_limit must have room for a step: got memory_limit={limit:.4g} "
        f"({format_bytes(limit)}), devices={devices}, where the nearest takes "
        f"{format_bytes(memory.peak_bytes)}, {describe(*one.candidate)}: "
        f"{_held(memory)}. Parameters, gradients and optimiser states alone are "
        f"{format_bytes(state)} and fill {math.ceil(state / limit)} such devices. Use more "
        f"devices, memory_limit={memory.peak_bytes} or more, a narrower dtype, or an "
        f"optimiser with fewer than optimizer_bytes={problem.optimizer_bytes}."
    )


def _held(memory: StepMemory) -> str:
    """Return the parts of what a device holds."""
    parts = {name.removesuffix("_bytes"): getattr(memory, name) for name in memory.__slots__}
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())


def _state_bytes(problem: Problem) -> float:
    """Return the bytes of parameters, gradients and optimiser states on all devices together."""
    each = 2 * jnp.dtype(problem.dtype).itemsize + problem.optimizer_bytes
    return problem.model.num_parameters * each
