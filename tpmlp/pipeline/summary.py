"""Summary: which stage has which layers, and what a device of a pipeline holds and sends."""

from dataclasses import dataclass, fields
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.kernels.cost import total_bytes
from tpmlp.kernels.execution import execution
from tpmlp.layout import padded
from tpmlp.losses import Loss
from tpmlp.pipeline.buffers import NOTHING
from tpmlp.pipeline.cost import stage_collectives
from tpmlp.pipeline.memory import StepBytes, step_bytes
from tpmlp.pipeline.placement import PipelinePlacement, StagePlacement
from tpmlp.placement import ParameterSpec
from tpmlp.table import format_bytes, text_table


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSummary:
    """One stage.

    Attributes:
        stage: its index.
        layers: l of its layers, or the numbers of its blocks, by chunk.
        peak: activations that it holds at most, each of a chunk and a microbatch.
        received_bytes: what a device of it receives in a step, messages from other stages left out;
            None where it is not predicted.
    """

    stage: int
    layers: tuple[tuple[int, ...], ...]
    peak: int
    received_bytes: int | float | None


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class PipelineSummary:
    """What one device of a pipeline holds, and what it sends to other stages; print it.

    Attributes:
        mesh: devices on each axis.
        schedule: its name.
        num_ticks: of a step.
        num_microbatches: of a step.
        idle: the share of slots of the schedule that are idle.
        stages: each stage.
        repeated: what they have, "layers" or "blocks".
        param_bytes: of the parameters on one device, and so of the gradients.
        step: temporaries of a step.
        message_bytes: what a device receives from other stages in a step: z and g in every tick,
            whether there are any or not, as all stages are in step.
        needed_bytes: of that what some task reads, on the stage that gets most.
    """

    mesh: dict[str, int]
    schedule: str
    num_ticks: int
    num_microbatches: int
    idle: float
    stages: tuple[StageSummary, ...]
    param_bytes: int
    step: StepBytes
    message_bytes: int
    needed_bytes: int
    repeated: str = "layers"

    def __str__(self) -> str:
        rows = [
            (
                s.stage,
                ", ".join(_span(layers) for layers in s.layers),
                s.peak,
                "?" if s.received_bytes is None else format_bytes(s.received_bytes),
            )
            for s in self.stages
        ]
        headers = ["stage", self.repeated, "peak activations", "received in a step"]
        held = [(f.name, format_bytes(getattr(self.step, f.name))) for f in fields(self.step)]
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.items())
        return (
            f"{self.schedule} on {axes}: {self.num_microbatches} microbatches in {self.num_ticks} "
            f"ticks, {self.idle:.0%} of slots idle\n"
            f"{text_table(headers, rows)}\n\n"
            f"{text_table(['temporaries', 'on one device'], [*held, ('all', self._temporaries)])}\n"
            f"parameters on one device {format_bytes(self.param_bytes)}; it receives "
            f"{format_bytes(self.message_bytes)} from other stages in a step, of which "
            f"{format_bytes(self.needed_bytes)} are needed"
        )

    __repr__ = __str__

    @property
    def _temporaries(self) -> str:
        return format_bytes(self.step.total)


def summarize_pipeline(
    placement: PipelinePlacement,
    specs: Any,
    *,
    batch_size: int,
    dtype: Any,
    loss: Loss | None = None,
) -> PipelineSummary:
    """Return what one device holds in a training step.

    Args:
        placement: the pipeline.
        specs: what each array of the parameters is.
        batch_size: samples of one step.
        dtype: of the parameters.
        loss: the loss; None leaves its own collectives out.
    """
    schedule, stages = placement.schedule, placement.stages
    run = execution(placement, dtype)
    rows = padded(batch_size, placement.row_blocks) // placement.row_blocks
    tensor_devices = placement.sizes["x"] * placement.sizes["y"]
    words = placement.chain.padded_widths[1] // tensor_devices * rows
    moved, needed = message_bytes(
        placement, words * run.compute.itemsize, words * run.total.itemsize
    )
    return PipelineSummary(
        mesh=placement.sizes,
        schedule=schedule.name,
        num_ticks=schedule.num_ticks,
        num_microbatches=schedule.num_microbatches,
        idle=schedule.idle,
        stages=tuple(
            StageSummary(
                stage=stage,
                layers=tuple(
                    stages.pieces[stages.route.virtual_stage(stage, chunk)]
                    for chunk in range(schedule.num_chunks)
                ),
                peak=schedule.peaks[stage],
                received_bytes=total_bytes(
                    stage_collectives(
                        placement, stage, batch_size=batch_size, dtype=dtype, loss=loss
                    )
                ),
            )
            for stage in range(schedule.num_stages)
        ),
        param_bytes=param_words(specs, placement) * jnp.dtype(dtype).itemsize,
        step=step_bytes(placement, batch_size=batch_size, dtype=dtype),
        message_bytes=moved,
        needed_bytes=needed,
    )


def message_bytes(placement: StagePlacement, h: int, g: int) -> tuple[int, int]:
    """Return what a device receives from other stages in a step, and what of it some task reads.

    Args:
        placement: on the mesh.
        h: bytes of a message.
        g: bytes of a gradient of one.
    """
    plan, schedule, moved, needed = placement.buffers, placement.schedule, 0, 0
    for name, size in (("h", h), ("g", g)):
        ways = (getattr(way, name) for way in (plan.from_before, plan.from_after))
        came = [(slots != NOTHING).sum(axis=0) for slots in ways]
        # Round a ring of two stages both ways are one, and the compiler makes the move once.
        moves = min(sum(bool(c.any()) for c in came), schedule.num_stages - 1)
        moved += schedule.num_ticks * moves * size
        needed += sum(int(c.max()) for c in came) * size
    return moved, needed


def param_words(specs: Any, placement: StagePlacement) -> int:
    """Return how many numbers of the parameters are on one device."""

    def on_device(spec: ParameterSpec) -> int:
        # Whether over its first dim or over others, the stages split every array.
        return prod(spec.padded(placement.num_blocks)) // placement.num_blocks

    return sum(map(on_device, jax.tree.leaves(specs)))


def _span(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} .. {layers[-1]}"
