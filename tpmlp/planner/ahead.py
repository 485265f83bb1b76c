"""The training step, compiled for hardware that is absent: predicted beside compiled.

The compilers for TPUs and GPUs run on any machine. They are given devices that are only described
(tpmlp.planner.topology) and the shapes of the arguments, and make the program that would run: how
much memory it needs, what it moves and what it computes meanwhile is then counted in it, and
printed beside what the summary predicts. Seconds to run it are not known from here.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tpmlp.ahead import step_shapes
from tpmlp.graph.summary import GraphSummary
from tpmlp.inspection.audit import Audit, audit
from tpmlp.kernels import cost
from tpmlp.mesh import check_axes, make_mesh, mesh_sizes
from tpmlp.models import Model
from tpmlp.objective import Objective
from tpmlp.pipeline.cost import program_collectives
from tpmlp.pipeline.placement import PipelinePlacement
from tpmlp.pipeline.summary import PipelineSummary
from tpmlp.planner.moved import Moved, compare_collectives, moved_table
from tpmlp.planner.tiles import argument_bytes
from tpmlp.planner.topology import Topology, parse_topology
from tpmlp.step import Step, value_and_grad
from tpmlp.strategy import Strategy
from tpmlp.summary import Summary
from tpmlp.table import format_bytes, text_table
from tpmlp.train.probe import make_optimizer
from tpmlp.train.run import compile_step

AnySummary = Summary | GraphSummary | PipelineSummary


@dataclass(frozen=True, kw_only=True, repr=False)
class CompiledStep:
    """A training step compiled for a topology; prints what was predicted beside what is in it.

    Attributes:
        topology: the chip, and how many of it.
        mesh: devices on each axis.
        summary: what the model predicts, as model.summary.
        predicted_argument_bytes: of parameters, the optimiser's state and a batch on one device,
            as the platform lays them out.
        predicted_temp_bytes: of what lives within the step; None where it is not predicted, as
            with an update.
        audit: what is in the compiled program.
        moved: collectives, predicted and compiled, by axes and kind; every branch of a pipeline
            counts. Empty where they are not predicted: in pipelines of a Graph.
        compile_s: seconds from tracing to the compiled program.
        compile_cpu_s: of the processor, all cores added up.
        compiled: the program. Devices that are only described cannot run it.
    """

    topology: str
    mesh: dict[str, int]
    summary: AnySummary
    predicted_argument_bytes: int
    predicted_temp_bytes: int | None
    audit: Audit
    moved: tuple[Moved, ...]
    compile_s: float
    compile_cpu_s: float
    compiled: jax.stages.Compiled = field(compare=False)

    @property
    def not_predicted(self) -> tuple[Moved, ...]:
        """What moves otherwise than predicted without a known reason."""
        return tuple(row for row in self.moved if not row.is_explained)

    def __str__(self) -> str:
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.items())
        moved = moved_table(self.moved) if self.moved else "collectives: not predicted, see .audit"
        return (
            f"one step on {axes}, compiled for {self.topology} in {self.compile_s:.1f} s; "
            "for one device:\n"
            f"{text_table(('memory', 'predicted', 'compiled'), self._memory_cells())}\n\n{moved}"
        )

    __repr__ = __str__

    def _memory_cells(self) -> Iterator[tuple[str, str, str]]:
        predicted = {
            "argument": self.predicted_argument_bytes,
            "temp": self.predicted_temp_bytes,
        }
        for name in ("argument", "output", "temp", "alias", "peak"):
            held, expected = getattr(self.audit, f"{name}_bytes"), predicted.get(name)
            yield name, "-" if expected is None else format_bytes(expected), format_bytes(held)


def compile_for(
    model: Model,
    batch_size: int,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    *,
    strategy: Strategy | None = None,
    loss: Any = "mse",
    regularizer: Any = None,
    optimizer: Any = None,
    dtype: Any = None,
) -> CompiledStep:
    """Compile a training step for devices that need not be there, and audit it.

    Mesh axes are laid along the physical dims of the topology by JAX, x and y, which move most,
    along the fastest links. libtpu may end the process where it finds a fault of its own: compile
    in another one what must not fail.

    Args:
        model: the MLP or the Graph.
        batch_size: samples of one step.
        topology: chip and sizes, as "v5p:4x4x4", "v6e:16x16", "h100:8x8" (8 nodes of 8) or "cpu:8".
        mesh: sizes of the axes data, stage, x and y. One left out is 1, x what the others leave.
        strategy: Strategy() by default.
        loss: as in tpmlp.value_and_grad.
        regularizer: likewise.
        optimizer: an optax.GradientTransformation: the step updates parameters and its state in
            place, as fit's does. None: it returns loss and gradients.
        dtype: of the parameters; float32 by default.

    Returns:
        A CompiledStep; print it.

    Raises:
        ValueError: what is wrong with an argument, before anything is compiled.
        ModuleNotFoundError: the topology's compiler is not installed; says how to install it.
        MemoryError: the program does not fit the device; shows what was predicted.

    Examples:
        >>> import tpmlp
        >>> mlp = tpmlp.MLP((64, 256, 256, 10))
        >>> step = compile_for(mlp, 128, "cpu:8", {"x": 4, "y": 2}, loss="cross_entropy")
        >>> step.audit.argument_bytes == step.predicted_argument_bytes
        True
        >>> all(row.bytes == row.predicted_bytes for row in step.moved)
        True
    """
    where = parse_topology(topology)
    sizes = _check_mesh(where, mesh)
    placed = make_mesh(
        data=sizes["data"],
        stage=sizes["stage"],
        x=sizes["x"],
        y=sizes["y"],
        devices=where.devices(),
    )
    step = value_and_grad(model, loss=loss, mesh=placed, regularizer=regularizer, strategy=strategy)
    arguments, compile_program = _program(step, batch_size, optimizer, dtype)
    began, began_cpu = time.perf_counter(), time.process_time()
    compiled = compile_program()
    compile_s, compile_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    found, summary = audit(compiled), step.objective.summary(batch_size, dtype)
    return CompiledStep(
        topology=str(where),
        mesh=sizes,
        summary=summary,
        predicted_argument_bytes=argument_bytes(arguments, where.chip.platform),
        predicted_temp_bytes=_temp_bytes(summary) if optimizer is None else None,
        audit=found,
        moved=_moved(step.objective, summary, found, batch_size, dtype),
        compile_s=compile_s,
        compile_cpu_s=compile_cpu_s,
        compiled=compiled,
    )


def _check_mesh(topology: Topology, mesh: Mapping[str, int] | None) -> dict[str, int]:
    """Return the size of every axis, or refuse those that are not the topology's devices."""
    if not isinstance(mesh, Mapping | None) or isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be sizes of mesh axes: got mesh={mesh!r}. Use for example "
            "mesh={'x': 8, 'y': 8}: the devices come from the topology."
        )
    given = dict(mesh or {})
    check_axes(given)
    sizes = mesh_sizes(topology.num_devices, **given)
    if (num_devices := prod(sizes.values())) != topology.num_devices:
        product = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh must have every device of the topology: got {product} = {num_devices}, "
            f"topology='{topology}' of {topology.num_devices} devices. Leave x out to give it "
            "what the other axes leave, or use another topology."
        )
    return sizes


def _program(
    step: Step, batch_size: int, optimizer: Any, dtype: Any
) -> tuple[Any, Callable[[], jax.stages.Compiled]]:
    """Return the shapes of the arguments, and what compiles the program for them."""
    objective = step.objective
    params, batch, *keys = step_shapes(objective, batch_size, dtype)
    if optimizer is None:
        return (params, batch, *keys), partial(step.compile, batch_size, dtype=dtype)
    sharded = make_optimizer(
        optimizer,
        model=objective.model,
        placement=objective.placement,
        dtype=jnp.float32 if dtype is None else dtype,
        device=jax.local_devices()[0],
    )
    state = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(sharded.masked.init, params),
        sharded.state_shardings,
    )
    arguments = (params, state, batch)
    program = partial(compile_step, objective, sharded, *arguments, keys=tuple(keys))
    return (*arguments, *keys), program


def _temp_bytes(summary: AnySummary) -> int | None:
    return summary.step.total if isinstance(summary, PipelineSummary) else summary.temp_bytes


def _moved(
    objective: Objective, summary: AnySummary, found: Audit, batch_size: int, dtype: Any
) -> tuple[Moved, ...]:
    """Return collectives, predicted beside compiled; none where they are not predicted."""
    if not isinstance(summary, PipelineSummary):
        return compare_collectives(summary.collectives, found)
    if not isinstance(objective.placement, PipelinePlacement):
        return ()
    rows: list[cost.Collective] = program_collectives(
        objective.placement,
        batch_size=batch_size,
        dtype=jnp.dtype(jnp.float32 if dtype is None else dtype).name,
        loss=objective.loss,
    )
    return compare_collectives(rows, found, messages_bytes=summary.messages.in_program)
