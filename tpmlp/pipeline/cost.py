"""What moves in a step of a pipeline, stage by stage; pure arithmetic on tpmlp.kernels.cost.

    F   of a layer: gather h, scatter z
    B   of a layer: gather g, scatter dh
    W   of a layer: gather g again, and h

Layer 1 has F and W, the latter with its B; layer L+1 all three, and the loss, with its F. A stage
moves these for its own layers and every microbatch, messages between stages
(tpmlp.pipeline.messages) when any stage has one, the ends and the sums over data once a step.

Under keep="gathered" W does not gather h, and under "recompute" B begins with F of the layers whose
z is not kept. Where data splits the weights, F and B gather them, and W ends with a reduce-scatter.

The compiled program has every task once a tick, as a branch that some stages take:
`program_collectives` is what is in it, which an audit can count, and `stage_collectives` what a
stage runs of it.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tpmlp.kernels.cost import (
    Collective,
    LayerShape,
    Phase,
    Types,
    backward_collectives,
    forward_collectives,
    gradient_collectives,
    loss_collectives,
)
from tpmlp.losses import Loss
from tpmlp.pipeline.chunk import keeps_h, keeps_z
from tpmlp.pipeline.placement import PipelinePlacement
from tpmlp.predict import layer_shapes, step_types


class Tasks:
    """The collectives of each task, of one microbatch.

    Attributes:
        placement: the pipeline.
        shapes: layers 1 .. K+2 of a stage.
        types: bytes of an element.
    """

    def __init__(
        self, placement: PipelinePlacement, *, batch_size: int, dtype: str, loss: Loss | None
    ) -> None:
        self.placement, self.loss, self.batch_size = placement, loss, batch_size
        self.shapes = layer_shapes(placement.chain, bias=placement.bias, batch_size=batch_size)
        self.types = replace(step_types(placement, dtype), microbatches=1)

    def layer(self, l: int, kinds: str) -> Iterator[Collective]:
        """Yield those of F, B and W, as said, of layer l of a stage."""
        shape, types = self.shapes[l - 1], self.types
        if "F" in kinds:
            yield from forward_collectives(shape, types)
        if "B" in kinds:
            yield from backward_collectives(shape, types, input_gradient=True, gathers_input=False)
            yield from forward_collectives(shape, types, "backward") if self.again(l) else ()
        if "W" in kinds:
            is_end = l in (1, len(self.shapes))
            gathers = is_end or not keeps_h(l - 1, self.placement.chain)
            yield from backward_collectives(
                shape, types, input_gradient=False, gathers_input=gathers
            )
            yield from gradient_collectives(shape, types) if types.splits_data else ()

    def again(self, l: int) -> bool:
        """Return whether B runs the forward pass of layer l: the next slot's z is not kept."""
        num_slots = self.placement.stages.slots_per_chunk
        return 1 < l <= num_slots and not keeps_z(l, self.placement.strategy, num_slots)

    def empty(self, l: int) -> Iterator[Collective]:
        """Yield those of an empty slot in the place of layer l: F and B hand on z and g, turned."""
        sizes, shape = self.placement.sizes, self.shapes[l - 1]
        if min(sizes["x"], sizes["y"]) == 1:
            return
        rows: list[tuple[Phase, str, int]] = [
            ("forward", "z", self.types.compute),
            ("backward", "g", self.types.total),
            *([("backward", "z", self.types.compute)] if self.again(l) else []),
        ]
        for phase, tensor, item_bytes in rows:
            yield Collective(
                phase=phase,
                layer=l,
                tensor=f"{tensor} turned",
                kind="all_gather",
                axes=("x", "y"),
                num_devices=sizes["x"] * sizes["y"],
                elements=shape.d_out * shape.batch,
                item_bytes=item_bytes,
            )

    def loss_rows(self) -> list[Collective]:
        """Return those of the objective: of a microbatch over the tensor axes, and over data."""
        if self.loss is None:
            return []
        return loss_collectives(
            num_outputs=self.placement.chain.padded_widths[-1],
            gathers_outputs=self.loss.targets == "any",
            gathers_targets=False,
            num_reduced=self.loss.num_reduced,
            num_sums=2,
            mean=self.loss.reduction == "mean",
            batch=self.shapes[0].batch,
            penalty=False,
            num_arrays=0,
            types=self.types,
            sizes=self.placement.sizes,
        )


def stage_collectives(
    placement: PipelinePlacement,
    stage: int,
    *,
    batch_size: int,
    dtype: str = "float32",
    loss: Loss | None = None,
) -> list[Collective]:
    """Return what a device of a stage receives in a step over its own and the data axes.

    Args:
        placement: the pipeline.
        stage: which.
        batch_size: samples of one step.
        dtype: of the parameters.
        loss: the loss; None leaves its own collectives out.
    """
    tasks = Tasks(placement, batch_size=batch_size, dtype=dtype, loss=loss)
    stages, m = placement.stages, placement.strategy.microbatches
    rows: list[Collective] = []
    for chunk in range(placement.schedule.num_chunks):
        filled = stages.count(stage, chunk)
        for k in range(1, stages.slots_per_chunk + 1):
            rows += tasks.layer(k + 1, "FBW") if k <= filled else tasks.empty(k + 1)
    rows += _ends(tasks, [stage])
    once, each = of_loss(tasks, [stage])
    moved = [replace(row, times=m) for row in (*rows, *each)]
    return [*moved, *once, *sums(tasks)]


def program_collectives(
    placement: PipelinePlacement,
    *,
    batch_size: int,
    dtype: str = "float32",
    loss: Loss | None = None,
) -> list[Collective]:
    """Return the collectives of the compiled program but messages, each branch taken every tick."""
    tasks = Tasks(placement, batch_size=batch_size, dtype=dtype, loss=loss)
    stages, ticks = placement.stages, placement.schedule.num_ticks
    everywhere = range(placement.sizes["stage"])
    rows: list[Collective] = []
    for chunk in range(placement.schedule.num_chunks):
        least = min(stages.count(stage, chunk) for stage in everywhere)
        for k in range(1, stages.slots_per_chunk + 1):
            rows += tasks.layer(k + 1, "FBW")
            # A slot that is empty somewhere is a branch, if any of the chunk is.
            rows += tasks.empty(k + 1) if least < stages.slots_per_chunk else []
    rows += _ends(tasks, everywhere)
    once, each = of_loss(tasks, everywhere)
    moved = [replace(row, times=ticks) for row in (*rows, *each)]
    return [*moved, *once, *sums(tasks)]


def _ends(tasks: Tasks, on: Any) -> Iterator[Collective]:
    """Yield those of the first and the last layer, on their own stages."""
    route = tasks.placement.schedule.route
    if route.place(0)[0] in on:
        yield from tasks.layer(1, "FW")
    if route.place(route.num_virtual_stages - 1)[0] in on:
        yield from tasks.layer(len(tasks.shapes), "FBW")


def of_loss(tasks: Tasks, on: Any) -> tuple[list[Collective], list[Collective]]:
    """Return those of the loss that run once a step, and those of each microbatch."""
    route, rows = tasks.placement.schedule.route, tasks.loss_rows()
    once = [row for row in rows if row.axes == ("data",)]
    has_loss = route.place(route.num_virtual_stages - 1)[0] in on
    return once, [row for row in rows if row not in once and has_loss]


def sums(tasks: Tasks) -> Iterator[Collective]:
    """Yield the sums of gradients over data, and what the stages share once a step."""
    placement, types, shapes = tasks.placement, tasks.types, tasks.shapes
    slots = shapes[1:-1] * placement.schedule.num_chunks
    for shape in (shapes[0], *slots, shapes[-1]):
        yield from () if types.splits_data else gradient_collectives(shape, types)
    p = placement.sizes["stage"]
    for shape in (shapes[0], shapes[-1]):
        yield from _end_rows(shape, types, p)
    yield _over_stages("loss, correct", "all_reduce", 2, types.accumulate, p)


def _end_rows(shape: LayerShape, types: Types, p: int) -> Iterator[Collective]:
    """Yield the gathers of an end's parameters over the stages, and the sums of its gradients."""
    data = shape.size("d") if types.splits_data else 1
    for name, elements in (("W", shape.W // data), ("b", shape.b // data if shape.bias else 0)):
        if elements:
            yield _over_stages(name, "all_gather", elements, types.param, p)
            yield _over_stages(f"d{name}", "reduce_scatter", elements, types.total, p)


def _over_stages(tensor: str, kind: Any, elements: int, item_bytes: int, p: int) -> Collective:
    return Collective(
        phase="backward" if tensor.startswith("d") else "forward",
        layer=0,
        tensor=tensor,
        kind=kind,
        axes=("stage",),
        num_devices=p,
        elements=elements,
        item_bytes=item_bytes,
    )
