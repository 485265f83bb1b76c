"""How long a step takes on real links: products at a rate, bytes at another, nothing overlapped.

A task of a stage takes its FLOPs at the device's rate and the collectives of its stage at the
link's; the schedule does the rest (tpmlp.simulate). Tensor parallel alone is one task after another
without a bubble. Overlap would take from the collectives of all ways alike, at most all of them.
"""

from dataclasses import dataclass
from typing import Any

import tpmlp
from experiments.parallelism.ways import Way
from tpmlp.kernels.cost import Collective, total_bytes
from tpmlp.pipeline.cost import Tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A device and the link between devices.

    Attributes:
        flops_per_s: of products.
        bytes_per_s: that a device receives.
        latency_s: of each collective.
    """

    flops_per_s: float
    bytes_per_s: float
    latency_s: float

    def collectives_s(self, rows: list[Collective]) -> float:
        """Return the time of collectives, one after another."""
        times = sum(row.times for row in rows)
        return total_bytes(rows) / self.bytes_per_s + times * self.latency_s


def step_s(
    way: Way, model: tpmlp.MLP, link: Link, *, batch_size: int, microbatches: int
) -> dict[str, float]:
    """Return the seconds of a step: of an asynchronous runtime, and in lockstep."""
    if way.schedule is None:
        strategy = way.strategy(microbatches)
        summary = model.summary(way.mesh, batch_size=batch_size, strategy=strategy)
        products = 3 * 2 * batch_size * sum(a * b for a, b in model.layer_shapes) / way.x
        first = 2 * batch_size * model.widths[0] * model.widths[1] / way.x
        seconds = (products - first) / link.flops_per_s + link.collectives_s(summary.collectives)
        return {"asynchronous_s": seconds, "lockstep_s": seconds}
    return _pipeline_s(way, model, link, batch_size, microbatches)


def _pipeline_s(
    way: Way, model: tpmlp.MLP, link: Link, batch_size: int, microbatches: int
) -> dict[str, float]:
    placement: Any = model.place(way.mesh, way.strategy(microbatches))
    tasks = Tasks(placement, batch_size=batch_size, dtype="float32", loss=None)
    schedule, stages = placement.schedule, placement.stages
    rows, width = batch_size // microbatches, model.widths[1]
    chunks, flops = schedule.num_chunks, 2 * rows * width**2 / way.x

    def seconds(kind: str, stage: int) -> float:
        """Return the mean time of a task of a stage, over its chunks."""
        layers = sum(
            len(stages.pieces[stages.route.virtual_stage(stage, chunk)]) for chunk in range(chunks)
        )
        moved = link.collectives_s(list(tasks.layer(2, kind)))
        return layers / chunks * (flops / link.flops_per_s + moved)

    each = {
        f"{kind}_s": [seconds(kind, stage) for stage in range(way.stage)] for kind in ("F", "B", "W")
    }
    message = rows * width // way.x * 4
    transfer = message / link.bytes_per_s + link.latency_s
    found = tpmlp.simulate(schedule, **each, transfer_s=transfer)
    return {"asynchronous_s": found.makespan_s, "lockstep_s": found.lockstep_s}
