"""Summary: which stage has which layers, and what a device of a pipeline holds and sends."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.kernels.cost import total_bytes
from tpmlp.kernels.execution import execution
from tpmlp.layout import padded
from tpmlp.losses import Loss
from tpmlp.pipeline.cost import stage_collectives
from tpmlp.pipeline.memory import StepBytes, step_bytes
from tpmlp.pipeline.messages import Messages, message_bytes
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
        messages: what a device receives from other stages in a step: all stages being in step, a
            ring moves for all of them or for none.
    """

    mesh: dict[str, int]
    schedule: str
    num_ticks: int
    num_microbatches: int
    idle: float
    stages: tuple[StageSummary, ...]
    param_bytes: int
    step: StepBytes
    messages: Messages
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
            f"{format_bytes(self.messages.moved)} from other stages in a step, of which "
            f"{format_bytes(self.messages.needed)} are needed"
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
    run = execution(placement, dtype)
    rows = padded(batch_size, placement.row_blocks) // placement.row_blocks
    tensor_devices = placement.sizes["x"] * placement.sizes["y"]
    words = placement.chain.padded_widths[1] // tensor_devices * rows
    given: Any = {"batch_size": batch_size, "dtype": dtype, "loss": loss}
    return PipelineSummary(
        **of_schedule(
            placement, lambda stage: total_bytes(stage_collectives(placement, stage, **given))
        ),
        param_bytes=param_words(specs, placement.num_blocks) * jnp.dtype(dtype).itemsize,
        step=step_bytes(placement, batch_size=batch_size, dtype=dtype),
        messages=message_bytes(placement, words * run.compute.itemsize, words * run.total.itemsize),
    )


def of_schedule(
    placement: StagePlacement, received_bytes: Callable[[int], int | float | None]
) -> dict[str, Any]:
    """Return the fields of a summary that are of the mesh, the schedule and its stages.

    Args:
        placement: the model on its mesh.
        received_bytes: of a stage, as StageSummary has it.
    """
    schedule, stages = placement.schedule, placement.stages
    return {
        "mesh": placement.sizes,
        "schedule": schedule.name,
        "num_ticks": schedule.num_ticks,
        "num_microbatches": schedule.num_microbatches,
        "idle": schedule.idle,
        "stages": tuple(
            StageSummary(
                stage=stage,
                layers=tuple(
                    stages.pieces[stages.route.virtual_stage(stage, chunk)]
                    for chunk in range(schedule.num_chunks)
                ),
                peak=schedule.peaks[stage],
                received_bytes=received_bytes(stage),
            )
            for stage in range(schedule.num_stages)
        ),
    }


def param_words(specs: Any, num_blocks: int) -> int:
    """Return how many numbers of the parameters are on one device.

    Args:
        specs: what each array is.
        num_blocks: into which the mesh cuts every array, the stages over its first dim or others.
    """

    def on_device(spec: ParameterSpec) -> int:
        return prod(spec.padded(num_blocks)) // num_blocks

    return sum(map(on_device, jax.tree.leaves(specs)))


def _span(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} .. {layers[-1]}"
