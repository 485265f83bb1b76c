"""A chain of dense layers on a mesh with stages: which device holds what.

A stage runs a chain of its own, of the first layer, the slots of one chunk, and the last layer:
layers 1 .. K+2 of a `Placement` whose roles are the same on every stage. Most stages run the
interior 2 .. K+1 alone. What moves between stages is z of the layer below, "O/g/s B/d" as layer 1
leaves it; on a mesh with two tensor axes every layer turns the order of the axes, an empty slot
does so without a layer, and an odd number of them is turned back at the end of the chunk.

The first and the last layer belong to one stage each, and their arrays would be as large on every
other. So they are split over the stages besides, gathered once a step, and their gradients summed
back to where they are.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpmlp.layout import partition_spec
from tpmlp.pipeline.buffers import Buffers, plan_buffers
from tpmlp.pipeline.generators import make_schedule
from tpmlp.pipeline.route import Route
from tpmlp.pipeline.schedule import Schedule
from tpmlp.pipeline.staged import Pair, Staged
from tpmlp.pipeline.stages import Slots, Stages
from tpmlp.placement import OnMesh, OutputSpec, Placement, SampleSpec, place_chain
from tpmlp.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class StagePlacement(OnMesh):
    """A model on a mesh with stages, under a strategy.

    Attributes:
        schedule: the table that a training step runs.
        stages: which layers, or blocks, are where.
    """

    schedule: Schedule
    stages: Slots

    @cached_property
    def buffers(self) -> Buffers:
        """What the schedule needs of memory, and what moves when."""
        if isinstance(self.strategy.schedule, Schedule):
            return plan_buffers(self.schedule)
        return _named_buffers(*_named(self.sizes["stage"], self.strategy))


@dataclass(frozen=True, kw_only=True)
class PipelinePlacement(StagePlacement):
    """A chain of dense layers on a mesh with stages, under a strategy.

    Attributes:
        widths: logical widths d_0 .. d_{L+1}.
        bias: whether layers have a b.
        schedule: the table that a training step runs.
        stages: which layers are where.
        chain: the layers that a stage has, at most: the first, those of a chunk, the last.
    """

    widths: tuple[int, ...]
    bias: bool
    stages: Stages
    chain: Placement

    @property
    def samples(self) -> SampleSpec:
        """What the first layer is given, on every stage."""
        return self.chain.samples

    @property
    def outputs(self) -> OutputSpec:
        """What the last layer gives."""
        return self.chain.outputs

    @property
    def slot_layouts(self) -> tuple[str, str]:
        """Layouts of a slot's (W, b)."""
        W, b = self.chain.param_layouts
        return f"S/p {W}", f"S/p {b}"

    @property
    def end_layouts(self) -> tuple[str, str]:
        """Layouts of (W, b) of the first and of the last layer, as they are held."""
        return ("O/g/d/p I/s", "O/g/s/d/p") if self.splits_data else ("O/g/p I/s", "O/g/s/p")

    @property
    def words(self) -> tuple[str, ...]:
        """The role of each layer: "column" or "row"."""
        layers = range(1, self.stages.num_layers + 1)
        return tuple(self.chain.words[self.stages.in_chain(l) - 1] for l in layers)

    def spec(self, layout: str, layer: int) -> PartitionSpec:
        """Return the PartitionSpec of a layout under the roles of a layer (1-based)."""
        return self.chain.spec(layout, self.stages.in_chain(layer))

    @cached_property
    def ends_axes(self) -> tuple[dict[str, str], dict[str, str]]:
        """Mesh axes of the roles of the first and of the last layer."""
        first, *_, last = self.chain.axes
        return {**first, "p": "stage"}, {**last, "p": "stage"}

    @cached_property
    def shardings(self) -> Staged:
        """The sharding of every parameter, in their structure."""

        def pair(layouts: tuple[str, str], axes: dict[str, str]) -> Pair:
            W, b = (
                NamedSharding(self.mesh, partition_spec(layout, self.mesh, axes))
                for layout in layouts
            )
            return W, b if self.bias else None

        first, last = self.ends_axes
        per_chunk = self.stages.slots_per_chunk
        slots = [
            pair(self.slot_layouts, {**self.chain.axes[1 + k % per_chunk], "p": "stage"})
            for k in range(self.stages.num_slots)
        ]
        ends = (pair(self.end_layouts, axes) for axes in (first, last))
        return Staged((next(ends), *slots, next(ends)), self.stages)


def place_stages(
    widths: tuple[int, ...], bias: bool, mesh: Mesh, strategy: Strategy
) -> PipelinePlacement:
    """Return where a chain of dense layers lives on a mesh with stages.

    Raises:
        ValueError: interior widths that differ, fewer layers than stages times chunks, or a
            strategy that pipelines cannot have.
    """
    return _place(widths, bias, mesh, strategy)


@lru_cache(maxsize=64)
def _place(
    widths: tuple[int, ...], bias: bool, mesh: Mesh, strategy: Strategy
) -> PipelinePlacement:
    _check_strategy(strategy)
    schedule = make_schedule_for(mesh, strategy)
    if len(interior := set(widths[1:-1])) > 1:
        raise ValueError(
            "widths between the first and the last must be equal on a mesh with stages, whose "
            f"layers are one array: got widths={widths}, stage={mesh.shape['stage']}. Use for "
            f"example {max(interior)} for all of them, or stage=1."
        )
    stages = Stages(num_layers=len(widths) - 1, route=slots_route(schedule))
    whole = (widths[0], *(widths[1],) * (stages.slots_per_chunk + 1), widths[-1])
    return PipelinePlacement(
        widths=widths,
        bias=bias,
        mesh=mesh,
        strategy=strategy,
        schedule=schedule,
        stages=stages,
        chain=place_chain(whole, mesh, strategy),
    )


def make_schedule_for(mesh: Mesh, strategy: Strategy) -> Schedule:
    """Return the schedule that a strategy means on a mesh.

    Raises:
        ValueError: the schedule cannot have as few microbatches, or is one for another number of
            stages, microbatches or chunks.
    """
    schedule, num_stages = strategy.schedule, mesh.shape["stage"]
    if isinstance(schedule, str):
        return _named_schedule(*_named(num_stages, strategy))
    if strategy.chunks not in (1, schedule.num_chunks):
        raise ValueError(
            f"chunks must be those of the schedule: got chunks={strategy.chunks}, schedule "
            f"{schedule.name!r} with {schedule.num_chunks}. Leave chunks out."
        )
    wanted = (num_stages, strategy.microbatches)
    if (schedule.num_stages, schedule.num_microbatches) != wanted:
        raise ValueError(
            f"schedule must be for the stages of the mesh and the microbatches of the strategy: "
            f"got schedule {schedule.name!r} of {schedule.num_stages} stages and "
            f"{schedule.num_microbatches} microbatches, stage={num_stages}, "
            f"microbatches={strategy.microbatches}. Use a name, such as '1f1b', or make it anew."
        )
    return schedule


# A planner places one schedule on many meshes.
_named_schedule = lru_cache(maxsize=64)(make_schedule)


@lru_cache(maxsize=64)
def _named_buffers(*named: Any) -> Buffers:
    return plan_buffers(_named_schedule(*named))


def _named(num_stages: int, strategy: Strategy) -> tuple[Any, ...]:
    """Return what make_schedule is given for a strategy that names its schedule."""
    return strategy.schedule, num_stages, strategy.microbatches, strategy.chunks


def slots_route(schedule: Schedule) -> Route:
    """Return the route by which layers lie: whatever it says of when gradients leave."""
    return replace(schedule.route, splits_backward=True)


def _check_strategy(strategy: Strategy) -> None:
    """Refuse what the executor cannot do."""
    needed = {"overlap": "none", "reduction": "fast"}
    for name, value in needed.items():
        if (got := getattr(strategy, name)) != value:
            raise ValueError(
                f"{name} must be {value!r} on a mesh with stages: got {name}={got!r}. Leave {name} "
                "out, or use stage=1."
            )
    check_one_word(strategy)


def check_one_word(strategy: Strategy) -> None:
    """Refuse a layout of a word for each layer."""
    if isinstance(strategy.layout, tuple):
        raise ValueError(
            "layout must be one word on a mesh with stages, where every stage runs the same "
            f"program: got layout={strategy.layout!r}. Use 'auto', 'column', 'row' or 'alternate'."
        )
