"""What one device holds in a step of a pipeline, by what it is for.

buffers     slots of the schedule, and one more for what nobody reads, of a chunk's layers: of
            activations what F keeps of a layer (z; gathered h; nothing), of deferred g, and z that
            B computed again; inboxes; g that leaves with its W. All of one microbatch, d/M by
            B/(m D) but for gathered h
gradients   a sum for each array of the parameters, the ends whole; those of slots are in the
            results from the start where no other type and no sum over data comes between
ends        the first and the last layer, whole
a task      what a chunk kept as it was read, what F and B leave; messages as they leave, and as
            they came or have moved; one layer's dW, its two factors, and W where data splits it

Results that are not there before the last tick hold the ends and dW till then, as far as they can.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax.numpy as jnp

from tpmlp.kernels.execution import Execution, execution
from tpmlp.layout import padded
from tpmlp.pipeline.chunk import keeps_h, keeps_z
from tpmlp.pipeline.placement import PipelinePlacement


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBytes:
    """Temporaries of a step on one device.

    Attributes:
        activations: what F keeps for B and W.
        deferred: what B leaves for W.
        inboxes: messages that wait, and a g that leaves with its W.
        gradients: sums over the microbatches.
        ends: the first and the last layer, gathered, where the results have no room for them.
        task: what a task reads and leaves.
    """

    activations: int
    deferred: int
    inboxes: int
    gradients: int
    ends: int
    task: int

    @property
    def total(self) -> int:
        """All of them: they are there at the same time."""
        return sum(getattr(self, name) for name in self.__slots__)


def step_bytes(placement: PipelinePlacement, *, batch_size: int, dtype: Any) -> StepBytes:
    """Return the temporaries of a training step.

    Args:
        placement: the pipeline.
        batch_size: samples.
        dtype: of the parameters.
    """
    run, plan, stages = execution(placement, dtype), placement.buffers, placement.stages
    param, compute, total = jnp.dtype(dtype).itemsize, run.compute.itemsize, run.total.itemsize
    first, hidden, *_, last = placement.chain.padded_widths
    num_devices = placement.sizes["x"] * placement.sizes["y"]
    data = placement.sizes["data"] if run.splits_data else 1
    rows = padded(batch_size, placement.row_blocks) // placement.row_blocks
    words = hidden // num_devices * rows
    kept, deferred = _of_chunk(placement, rows, compute, total)
    ends = (first + last) * hidden // num_devices // data
    slots = stages.num_slots * hidden * hidden // num_devices // data
    # z and g as they leave, and as they came or have moved; g of the outputs.
    messages = words * 2 * (compute + total) + last * total // num_devices * rows
    in_results = run.accumulate.itemsize == param and (
        run.splits_data or placement.sizes["data"] == 1
    )
    room = 0 if in_results else slots * param
    leaving = 0 if placement.schedule.splits_backward else 1
    return StepBytes(
        activations=(plan.num_activations + 1) * kept,
        deferred=(plan.num_deferred + 1) * deferred,
        inboxes=words
        * ((plan.num_inbox_h + 1) * compute + (plan.num_inbox_g + 1 + leaving) * total),
        gradients=(ends + (0 if in_results else slots)) * run.accumulate.itemsize,
        ends=max(0, ends * param - room),
        task=2 * kept
        + deferred
        + messages
        + _product(placement, rows, run, room=max(0, room - ends * param)),
    )


def _product(placement: PipelinePlacement, rows: int, run: Execution, *, room: int) -> int:
    """Return the bytes of the largest gradient of a layer beside `room`, and of its factors.

    Both factors are gathered, and W too where data splits it.
    """
    chain, sizes, largest = placement.chain, placement.sizes, 0
    for (d_in, d_out), axes in zip(pairwise(chain.padded_widths), chain.axes, strict=True):
        g, s = (sizes[axes[role]] for role in "gs")
        words = d_out // g * (d_in // s)
        factors = (d_out // g + d_in // s) * rows + (words if run.splits_data else 0)
        dW = max(0, words * run.total.itemsize - room)
        largest = max(largest, dW + factors * run.compute.itemsize)
    return largest


def _of_chunk(placement: PipelinePlacement, rows: int, compute: int, total: int) -> tuple[int, int]:
    """Return the bytes that F keeps of a chunk, and that B leaves for its W."""
    chain, sizes, num_slots = placement.chain, placement.sizes, placement.stages.slots_per_chunk
    hidden = chain.padded_widths[1]
    words = hidden // (sizes["x"] * sizes["y"]) * rows
    kept = deferred = 0
    for k in range(1, num_slots + 1):
        keeps = keeps_z(k, placement.strategy, num_slots)
        kept += words * compute if keeps else 0
        deferred += words * (total if keeps else total + compute)
        if keeps_h(k, chain):
            kept += hidden // sizes[chain.axes[k]["s"]] * rows * compute
    return kept, deferred
