"""What a step of a way takes: FLOPs, bytes and collectives, task by task, from tpmlp's formulas.

    a task         F, B or W of a stage and a microbatch
    message        from one stage to another
    tick           all messages that the program moves after a tick, needed or not

F of the last stage has the last layer's F, B and W, and B of the first stage the first layer's W,
as tpmlp.pipeline.chunk runs them. A task is the mean over its stage's chunks, as tpmlp.simulate
has one time for each stage. Bytes are of numbers of one size, which the caller chooses: formulas
for bfloat16 on simulated devices would count the float32 in which CPUs add.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tpmlp
from experiments.parallelism.ways import Way
from tpmlp.kernels.cost import Collective, total_bytes
from tpmlp.pipeline.cost import Tasks, stage_collectives

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Amount:
    """What takes time: FLOPs, bytes, and how many collectives."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.collectives + other.collectives,
        )

    def share(self, of: float) -> "Amount":
        """Return one of so many equal parts."""
        return Amount(self.flops / of, self.bytes / of, self.collectives / of)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A step of a way.

    Attributes:
        once: what is done once a step; without stages, all of it.
        schedule: of the stages; None without.
        tasks: of each kind, the mean task of each stage.
        message: a microbatch's z or g on its way to another stage.
        tick: the messages after a tick.
    """

    once: Amount
    schedule: tpmlp.Schedule | None = None
    tasks: Mapping[str, tuple[Amount, ...]] | None = None
    message: Amount = Amount()
    tick: Amount = Amount()


@lru_cache(maxsize=512)
def work(
    way: Way, model: tpmlp.MLP, *, batch_size: int, microbatches: int, item_bytes: int
) -> Work:
    """Return what a step takes.

    Args:
        way: the way to spread it.
        model: with interior widths alike.
        batch_size: samples.
        microbatches: of a pipeline.
        item_bytes: of every number that moves.
    """
    strategy = way.strategy(microbatches)
    summary = model.summary(way.mesh, batch_size=batch_size, strategy=strategy)
    if way.schedule is None:
        products = Amount(flops(model, batch_size) / way.x)
        return Work(once=products + _moved(summary.collectives, item_bytes))
    placement: Any = model.place(way.mesh, strategy)
    given: Any = {"batch_size": batch_size, "dtype": "float32", "loss": None}
    busiest = max(
        (stage_collectives(placement, stage, **given) for stage in range(way.stage)),
        key=total_bytes,
    )
    ends = [row for row in busiest if row.axes == ("stage",)]
    one = batch_size // microbatches * model.widths[1] // way.x
    moves = summary.messages.moved / FLOAT_BYTES / one / placement.schedule.num_ticks
    return Work(
        once=_moved(ends, item_bytes),
        schedule=placement.schedule,
        tasks=_Stages(
            model, placement, Tasks(placement, **given), batch_size // microbatches, item_bytes
        ).tasks(),
        message=Amount(bytes=one * item_bytes, collectives=1),
        tick=Amount(bytes=moves * one * item_bytes, collectives=moves),
    )


def flops(model: tpmlp.MLP, batch_size: int) -> float:
    """Return the FLOPs of all products of a step; the first layer has no gradient of its input."""
    kinds = ("FW" if l == 1 else "FBW" for l in range(1, len(model.widths)))
    return sum(_flops(model, l, kind, batch_size) for l, kind in enumerate(kinds, 1))


@dataclass(frozen=True, slots=True)
class _Stages:
    """The tasks of a pipeline's stages.

    Attributes:
        model: the model.
        placement: of its layers.
        costs: collectives of each task of a layer.
        rows: samples of a microbatch.
        item_bytes: of every number that moves.
    """

    model: tpmlp.MLP
    placement: Any
    costs: Tasks
    rows: int
    item_bytes: int

    def tasks(self) -> dict[str, tuple[Amount, ...]]:
        """Return the mean task of each kind and stage."""
        stages = range(self.placement.schedule.num_stages)
        return {kind: tuple(self.task(stage, kind) for stage in stages) for kind in "FBW"}

    def task(self, stage: int, kind: str) -> Amount:
        """Return the mean over the chunks of a stage."""
        chunks, stages = self.placement.schedule.num_chunks, self.placement.stages
        total = Amount()
        for chunk in range(chunks):
            for l in stages.pieces[stages.route.virtual_stage(stage, chunk)]:
                total += self.layer(l, self.kinds(l, kind))
        return total.share(chunks)

    def kinds(self, l: int, task: str) -> str:
        """Return what a task does of a layer."""
        if l == 1:
            return {"F": "F", "B": "W", "W": ""}[task]
        if l == len(self.model.widths) - 1:
            return "FBW" if task == "F" else ""
        return task

    def layer(self, l: int, kinds: str) -> Amount:
        """Return F, B and W of a layer and a microbatch, as said."""
        # A stage has layers of its own: the first, slots, which are alike, and the last.
        own = {1: 1, len(self.model.widths) - 1: len(self.costs.shapes)}.get(l, 2)
        flops = _flops(self.model, l, kinds, self.rows) / self.placement.sizes["x"]
        return Amount(flops) + _moved(self.costs.layer(own, kinds), self.item_bytes)


def _flops(model: tpmlp.MLP, l: int, kinds: str, rows: int) -> float:
    return 2 * rows * model.widths[l - 1] * model.widths[l] * len(kinds)


def _moved(rows: Iterable[Collective], item_bytes: int) -> Amount:
    """Return bytes and number of collectives, which the formulas give for float32."""
    listed = list(rows)
    scaled = float(total_bytes(listed)) / FLOAT_BYTES * item_bytes
    return Amount(bytes=scaled, collectives=sum(row.times for row in listed))
