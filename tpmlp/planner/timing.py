"""How long a step takes: products at the hardware's rates, collectives over its links.

    one after another   products + collectives + bubble: an upper bound, if the rates are right
    overlapped          the larger of products and collectives, of a step or, with stages, of every
                        task in its tick: a lower bound for what compilers overlap

Costs add: layers that are alike are computed once and counted. On a mesh with stages the compiled
program runs in lockstep, so a tick takes what its slowest stage does (`lockstep_s` of
tpmlp.simulate), and messages move after it. The bubble is what a step takes beyond the products and
collectives of the stage that is busy longest.

Left out: what is elementwise, the optimiser's update, launches, and reading the batch.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tpmlp.kernels.backprop import is_kept
from tpmlp.kernels.cost import (
    Collective,
    LayerShape,
    backward_collectives,
    forward_collectives,
    gradient_collectives,
)
from tpmlp.losses import Loss
from tpmlp.mesh import AXES
from tpmlp.pipeline.buffers import IDLE, KINDS, Content
from tpmlp.pipeline.cost import Tasks, of_loss, sums
from tpmlp.pipeline.placement import PipelinePlacement
from tpmlp.placement import OnMesh, Placement
from tpmlp.planner.hardware import Group, Hardware, Span, collective_s
from tpmlp.predict import layer_shapes, objective_collectives, step_types

# A collective, and how many like it there are.
Counted = tuple[Collective, int]


class Amount(NamedTuple):
    """What a part of a step takes on one device.

    Attributes:
        products_s: seconds of products.
        collectives_s: seconds of collectives.
        flops: of products.
    """

    products_s: float = 0.0
    collectives_s: float = 0.0
    flops: float = 0.0

    def plus(self, other: "Amount") -> "Amount":
        """Return the sum of both."""
        return Amount(self[0] + other[0], self[1] + other[1], self[2] + other[2])

    def times(self, count: float) -> "Amount":
        """Return so many of it."""
        return Amount(*(value * count for value in self))

    @property
    def seconds(self) -> float:
        """One after another."""
        return self.products_s + self.collectives_s

    @property
    def overlapped_s(self) -> float:
        """One behind the other."""
        return max(self.products_s, self.collectives_s)


NOTHING = Amount()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """How long a step takes, of the stage that is busy longest.

    Attributes:
        products_s: of products.
        collectives_s: of collectives, and of messages between stages.
        bubble_s: of waiting.
        overlapped_s: of a step whose collectives hide behind its products as far as they can.
        flops: of that stage's products, on one device.
    """

    products_s: float
    collectives_s: float
    bubble_s: float
    overlapped_s: float
    flops: float

    @property
    def step_s(self) -> float:
        """One after another."""
        return self.products_s + self.collectives_s + self.bubble_s


@dataclass(frozen=True, slots=True)
class Clock:
    """The rates of the hardware for the devices of a mesh.

    Attributes:
        hardware: the hardware.
        placement: on the mesh, whose neighbours are in the order data, stage, x, y.
        dtype: of products.
        groups: the levels that groups of devices are on, as far as they were asked for.
    """

    hardware: Hardware
    placement: OnMesh
    dtype: str
    groups: dict[Any, list[Group]] = field(default_factory=dict)

    def span(self, axes: Iterable[str], size: int) -> Span:
        """Return where a group of devices on mesh axes is."""
        sizes, last = self.placement.sizes, max(map(AXES.index, axes))
        stride = prod(sizes[axis] for axis in AXES[last + 1 :])
        return Span(size, stride, prod(sizes.values()))

    def collectives_s(self, rows: Iterable[Collective]) -> float:
        """Return the seconds of collectives, as often as each runs."""
        return sum(self.collective_s(row) * row.times for row in rows)

    def collective_s(self, row: Collective) -> float:
        """Return the seconds of a collective that runs once."""
        where = row.axes, row.num_devices
        if where not in self.groups:
            self.groups[where] = self.hardware.groups(self.span(*where))
        return collective_s(row.kind, row.elements * row.item_bytes, self.groups[where])

    def products(self, shape: LayerShape, count: int) -> Amount:
        """Return so many products of a layer: of W with h or g, or of g with h."""
        m, k, n = shape.d_out // shape.size("g"), shape.d_in // shape.size("s"), shape.batch
        seconds = self.hardware.product_s(m, n, k, self.dtype)
        return Amount(count * seconds, 0.0, count * 2.0 * m * n * k)


def step_time(
    placement: Any, hardware: Hardware, *, bias: bool, batch_size: int, dtype: str, loss: Loss
) -> StepTime:
    """Return how long a training step takes.

    Args:
        placement: an MLP's, on a mesh that may be only described.
        hardware: of the devices.
        bias: whether layers have biases.
        batch_size: samples of one step.
        dtype: of the parameters.
        loss: the loss.
    """
    clock = Clock(hardware, placement, placement.strategy.compute_dtype or dtype)
    if isinstance(placement, PipelinePlacement):
        tasks = Tasks(placement, batch_size=batch_size, dtype=dtype, loss=loss)
        return _StageClock(clock, placement, tasks).step_time()
    given = {"bias": bias, "batch_size": batch_size, "dtype": dtype}
    rows = chain_collectives(placement, **given, loss=loss)
    moved = sum(clock.collective_s(row) * row.times * count for row, count in rows)
    computed = _chain_products(clock, placement, bias=bias, batch_size=batch_size)
    whole = computed.plus(Amount(collectives_s=moved))
    return StepTime(
        products_s=whole.products_s,
        collectives_s=whole.collectives_s,
        bubble_s=0.0,
        overlapped_s=whole.overlapped_s,
        flops=whole.flops,
    )


def chain_collectives(
    placement: Placement, *, bias: bool, batch_size: int, dtype: str, loss: Loss | None
) -> Iterator[Counted]:
    """Yield the collectives of tpmlp.predict.step_collectives, those of like layers once.

    Args:
        placement: the layers on their mesh.
        bias: whether the layers have biases.
        batch_size: samples of one step.
        dtype: of the parameters.
        loss: the loss; None leaves its collectives out.
    """
    types = step_types(placement, dtype)
    keep = placement.strategy.keep
    shapes = layer_shapes(placement, bias=bias, batch_size=batch_size)
    for shape, again, count in _alike(placement, shapes):
        rows = forward_collectives(shape, types)
        rows += forward_collectives(shape, types, "backward") if again else []
        rows += backward_collectives(
            shape, types, input_gradient=shape.layer > 1, gathers_input=keep != "gathered"
        )
        rows += gradient_collectives(shape, types)
        yield from ((row, count) for row in rows)
    yield from ((row, 1) for row in objective_collectives(placement, shapes, types, loss=loss))


def _chain_products(clock: Clock, placement: Placement, *, bias: bool, batch_size: int) -> Amount:
    """Return the products of a step: of each layer z, dW, dh but for the first, z again."""
    total = Amount()
    shapes = layer_shapes(placement, bias=bias, batch_size=batch_size)
    for shape, again, count in _alike(placement, shapes):
        each = 2 + (shape.layer > 1) + again
        total = total.plus(clock.products(shape, each * count))
    return total.times(placement.strategy.microbatches)


def _alike(
    placement: Placement, shapes: list[LayerShape]
) -> Iterator[tuple[LayerShape, bool, int]]:
    """Yield a layer of each sort, whether its z is computed again, and how many there are."""
    num_layers, strategy = len(shapes), placement.strategy
    first: dict[Any, tuple[LayerShape, bool]] = {}
    counts: Counter[Any] = Counter()
    for l, shape in enumerate(shapes, 1):
        again = l < num_layers and not is_kept(l, num_layers, strategy)
        sort = shape.d_in, shape.d_out, shape.axes["g"], l == 1, again
        first.setdefault(sort, (shape, again))
        counts[sort] += 1
    for sort, (shape, again) in first.items():
        yield shape, again, counts[sort]


# What F, B and W of a slot take where it is filled, and where it is empty.
Slot = tuple[dict[str, Amount], dict[str, Amount]]


@dataclass(frozen=True, slots=True)
class _StageClock:
    """The tasks of a pipeline's stages.

    Attributes:
        clock: the rates.
        placement: of the layers.
        tasks: collectives of each task of a layer, of one microbatch.
    """

    clock: Clock
    placement: PipelinePlacement
    tasks: Tasks

    def step_time(self) -> StepTime:
        """Return the time of a step in lockstep."""
        m = self.placement.strategy.microbatches
        amounts = self.amounts()
        stages = range(self.placement.schedule.num_stages)
        busy = [sum_of(amounts[stage].values()).times(m) for stage in stages]
        longest = max(busy, key=lambda amount: amount.seconds)
        once = self.clock.collectives_s(self.once()) + self.messages_s()
        alone = self.lockstep_s(amounts, lambda amount: amount.seconds)
        hidden = self.lockstep_s(amounts, lambda amount: amount.overlapped_s)
        return StepTime(
            products_s=longest.products_s,
            collectives_s=longest.collectives_s + once,
            bubble_s=alone - longest.seconds,
            overlapped_s=max(hidden, once),
            flops=longest.flops,
        )

    def lockstep_s(self, amounts: Any, seconds: Any) -> float:
        """Return the sum over ticks of what the slowest stage takes."""
        shape = len(KINDS) + 1, self.placement.schedule.num_stages
        costs = np.zeros((*shape, self.placement.schedule.num_chunks))
        for stage, of_stage in enumerate(amounts):
            for (kind, chunk), amount in of_stage.items():
                costs[KINDS[kind], stage, chunk] = seconds(amount)
        plan = self.placement.buffers
        chunk = np.where(plan.kind == IDLE, 0, plan.chunk)
        each = costs[plan.kind, np.arange(shape[1])[None, :], chunk]
        return float(each.max(axis=1).sum())

    def amounts(self) -> list[dict[tuple[str, int], Amount]]:
        """Return what F, B and W of each chunk take, stage by stage, of one microbatch."""
        schedule, route = self.placement.schedule, self.placement.schedule.route
        filled = [len(layers) for layers in self.placement.stages.interior]
        slots = self.slots()
        interior = {count: _interior(slots, count) for count in set(filled)}
        found = [
            {
                (kind, chunk): amount
                for chunk in range(schedule.num_chunks)
                for kind, amount in interior[filled[route.virtual_stage(stage, chunk)]].items()
            }
            for stage in range(schedule.num_stages)
        ]
        for virtual_stage, kind, amount in self.ends():
            stage, chunk = route.place(virtual_stage)
            found[stage][kind, chunk] = found[stage][kind, chunk].plus(amount)
        return found

    def slots(self) -> list[Slot]:
        """Return what F, B and W of each slot of a chunk take, filled and empty."""
        known: dict[Any, Any] = {}
        slots = []
        for k in range(1, self.placement.stages.slots_per_chunk + 1):
            again = self.tasks.again(k + 1)
            sort = self.placement.chain.axes[k]["g"], again
            if sort not in known:
                filled = {kind: self.layer(k + 1, kind) for kind in KINDS}
                known[sort] = filled, self.empty(k + 1)
            slots.append(known[sort])
        return slots

    def layer(self, l: int, kinds: str) -> Amount:
        """Return F, B and W, as said, of layer l of a stage's chain; B may have F of it again."""
        again = "B" in kinds and self.tasks.again(l)
        computed = self.clock.products(self.tasks.shapes[l - 1], len(kinds) + again)
        moved = self.clock.collectives_s(self.tasks.layer(l, kinds))
        return computed.plus(Amount(collectives_s=moved))

    def empty(self, l: int) -> dict[str, Amount]:
        """Return what F, B and W of an empty slot take."""
        moved = dict.fromkeys(KINDS, Amount())
        for row in self.tasks.empty(l):
            kind = "F" if row.phase == "forward" else "B"
            moved[kind] = moved[kind].plus(Amount(collectives_s=self.clock.collectives_s([row])))
        return moved

    def ends(self) -> Iterator[tuple[int, str, Amount]]:
        """Yield virtual stages and tasks that have more than slots.

        The first layer's F, and W with its B; all of the last one's in F, and the loss.
        """
        last = self.placement.schedule.route.num_virtual_stages - 1
        yield 0, "F", self.layer(1, "F")
        yield 0, "B", self.layer(1, "W")
        yield last, "F", self.layer(len(self.tasks.shapes), "FBW")
        _, each = of_loss(self.tasks, range(self.placement.schedule.num_stages))
        yield last, "F", Amount(collectives_s=self.clock.collectives_s(each))

    def once(self) -> list[Collective]:
        """Return what moves once a step."""
        of_data, _ = of_loss(self.tasks, [])
        return [*of_data, *sums(self.tasks)]

    def messages_s(self) -> float:
        """Return the seconds of the messages that move in a step."""
        shape, types = self.tasks.shapes[0], self.tasks.types
        plan = self.placement.buffers
        span = self.clock.span(["stage"], self.placement.schedule.num_stages)
        sizes: dict[Content, int] = {
            "h": shape.output * types.compute,
            "g": shape.output * types.total,
        }
        return sum(
            int(ticks.sum()) * self.clock.hardware.message_s(size, span)
            for content, size in sizes.items()
            for by, ticks in plan.moves(content).items()
            if by
        )


def _interior(slots: list[Slot], filled: int) -> dict[str, Amount]:
    """Return what F, B and W of the slots of a chunk take, of which the first are filled."""
    inside = [full for full, _ in slots[:filled]] + [empty for _, empty in slots[filled:]]
    return {kind: sum_of(slot[kind] for slot in inside) for kind in KINDS}


def sum_of(amounts: Iterable[Amount], total: Amount = NOTHING) -> Amount:
    """Return the sum of amounts."""
    for amount in amounts:
        total = total.plus(amount)
    return total
