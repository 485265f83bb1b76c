"""What one device holds in a step of a pipeline, by what it is for.

buffers     activations (peak + 1) K, deferred (slots + 1) K, inboxes, g that leaves with its W:
            arrays of one microbatch and layer, d/M by B/(m D); the one more of each is for what
            nobody reads
gradients   a sum for each array of the parameters, the ends whole
ends        the first and the last layer, whole
a task      z of a chunk as it was read, z and g of a chunk as they are left; messages as they
            leave, and as they came or have moved; one layer's dW and its two factors
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tpmlp.kernels.execution import execution
from tpmlp.layout import padded
from tpmlp.pipeline.placement import PipelinePlacement


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBytes:
    """Temporaries of a step on one device.

    Attributes:
        activations: z kept for B and W.
        deferred: g kept for W.
        inboxes: messages that wait, and a g that leaves with its W.
        gradients: sums over the microbatches.
        ends: the first and the last layer, gathered.
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
    compute, total = run.compute.itemsize, run.total.itemsize
    first, hidden, *_, last = placement.chain.padded_widths
    num_devices = placement.sizes["x"] * placement.sizes["y"]
    rows = padded(batch_size, placement.row_blocks) // placement.row_blocks
    words, per_chunk = hidden // num_devices * rows, max(1, stages.slots_per_chunk)
    ends = (first + last) * hidden // num_devices
    leaving = 0 if placement.schedule.splits_backward else 1
    slot = hidden * hidden // num_devices
    # Of one layer's gradient: dW and what it is a product of, both gathered.
    widest = max(first, hidden, last)
    gathered = sum(widest // placement.sizes[axis] * rows for axis in ("x", "y"))
    layer = widest * hidden // num_devices * total + gathered * compute
    kept = per_chunk * words * (2 * compute + total)
    # z and g as they leave, and as they came or have moved; g of the outputs; the samples.
    messages = (
        words * 2 * (compute + total) + (last * total + first * compute) // num_devices * rows
    )
    return StepBytes(
        activations=(plan.num_activations + 1) * per_chunk * words * compute,
        deferred=(plan.num_deferred + 1) * per_chunk * words * total,
        inboxes=words
        * ((plan.num_inbox_h + 1) * compute + (plan.num_inbox_g + 1 + leaving) * total),
        gradients=(ends + stages.num_slots * slot) * run.accumulate.itemsize,
        ends=ends * jnp.dtype(dtype).itemsize,
        task=kept + messages + layer,
    )
