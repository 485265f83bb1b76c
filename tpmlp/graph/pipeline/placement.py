"""A graph on a mesh with stages: which device holds what.

The three parts of a graph (tpmlp.graph.pipeline.cut) are lowered like graphs of their own. The
message is "F/s/g B/d" as the Input of a block has it; what a part gives in the other orientation is
turned. Blocks lie in slots as the layers of an MLP do (tpmlp.pipeline.placement), and the
parameters of the ends are split over the stages besides, gathered once a step.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from jax.sharding import Mesh, NamedSharding

from tpmlp.graph.pipeline.cut import Cut, End, cut_graph
from tpmlp.graph.pipeline.staged import StagedGraph, ends_of, to_slots
from tpmlp.graph.placement import GraphPlacement, check_graph_strategy, place_part
from tpmlp.graph.structure import Structure
from tpmlp.layout import partition_spec
from tpmlp.pipeline.placement import StagePlacement, check_one_word, make_schedule_for, slots_route
from tpmlp.pipeline.stages import BlockStages
from tpmlp.placement import OutputSpec
from tpmlp.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class GraphOnStages(StagePlacement):
    """A graph on a mesh with stages, under a strategy.

    Attributes:
        graph: the whole.
        cut: its parts.
        schedule: the table that a training step runs.
        stages: which blocks are where.
        first: the first part on one stage.
        block: a block.
        last: the last part.
    """

    graph: Structure
    cut: Cut
    stages: BlockStages
    first: GraphPlacement
    block: GraphPlacement
    last: GraphPlacement

    @property
    def samples(self) -> Any:
        """What the sources are, on every stage."""
        return self.first.samples

    @property
    def outputs(self) -> OutputSpec:
        """What the output vertex gives."""
        return self.last.outputs

    def named_inputs(self, x: Any) -> dict[str, Any]:
        """Return what is given for each source, by name."""
        return self.first.named_inputs(x)

    @property
    def message_axes(self) -> dict[str, str]:
        """Mesh axes of the roles of a message "F/s/g B/d", and p of the stages."""
        return {**self.block.nodes[self.cut.source].axes, "p": "stage"}

    @cached_property
    def end_parameters(self) -> dict[str, tuple[GraphPlacement, str]]:
        """By vertex outside the blocks with parameters: the part that says how they lie, its name.

        Where both parts use them the first one does, and the last one's are bound to it.
        """
        parts = ((self.last, self.cut.last), (self.first, self.cut.first))
        return {owner: (part, here) for part, end in parts for here, owner in end.owners}

    def end_layouts(self, owner: str, name: str) -> tuple[str, str]:
        """Return the layouts of a parameter of the ends: as it is held, and within a step."""
        part, here = self.end_parameters[owner]
        used = part.layout(here, name)
        first, *others = used.split(" ")
        return " ".join([f"{first}/p", *others]), used

    def end_axes(self, owner: str) -> dict[str, str]:
        """Return the mesh axes of the roles of an end's parameters."""
        part, here = self.end_parameters[owner]
        return {**part.nodes[here].axes, "p": "stage"}

    @cached_property
    def shardings(self) -> StagedGraph:
        """The sharding of every parameter, in their structure."""

        def placed(layout: str, axes: dict[str, str]) -> NamedSharding:
            return NamedSharding(self.mesh, partition_spec(layout, self.mesh, axes))

        def of_end(owner: str, name: str) -> NamedSharding:
            return placed(self.end_layouts(owner, name)[0], self.end_axes(owner))

        def of_slot(vertex: str, name: str) -> NamedSharding:
            axes = {**self.block.nodes[vertex].axes, "p": "stage"}
            return placed(f"S/p {self.block.layout(vertex, name)}", axes)

        def tree(arrays: Any, sharding: Any) -> Any:
            return {v: {name: sharding(v, name) for name in mine} for v, mine in arrays.items()}

        slot = tree(self.cut.block.arrays, of_slot)
        ends = tree(ends_of(self.graph, self.graph.arrays), of_end)
        return StagedGraph(ends, (slot,) * self.stages.num_slots, self.stages)

    def staged(self, arrays: Any) -> StagedGraph:
        """Return {vertex: {parameter: array}} of the graph in the structure that stages have."""
        return to_slots(self.graph, self.cut, arrays, self.stages)


def place_graph_stages(
    graph: Structure, mesh: Mesh, strategy: Strategy | None = None
) -> GraphOnStages:
    """Return where a graph lives on a mesh with stages.

    Raises:
        ValueError: a graph that no pipeline runs (tpmlp.graph.pipeline.cut), fewer blocks than
            stages times chunks, or a strategy that pipelines of graphs cannot have.
    """
    return _place(graph, mesh, check_graph_strategy(strategy, mesh))


@lru_cache(maxsize=64)
def _place(graph: Structure, mesh: Mesh, strategy: Strategy) -> GraphOnStages:
    check_one_word(strategy)
    _check_keep_every(strategy)
    cut, schedule = cut_graph(graph), make_schedule_for(mesh, strategy)
    stages = BlockStages(num_blocks=cut.repeat.times, route=slots_route(schedule))
    # A block is kept whole, or computed again whole: within one, nothing is.
    keep = "shard" if strategy.keep == "recompute" else strategy.keep
    within = replace(strategy, keep=keep, keep_every=None)
    first = place_part(cut.first.graph, mesh, within)
    block, last = (
        place_part(part, mesh, within, reads_message=True) for part in (cut.block, cut.last.graph)
    )
    return GraphOnStages(
        mesh=mesh,
        strategy=strategy,
        schedule=schedule,
        graph=graph,
        cut=cut,
        stages=stages,
        first=first,
        block=block,
        last=replace(last, start=block.start, bound=_shared(first, cut.first, cut.last)),
    )


def _check_keep_every(strategy: Strategy) -> None:
    """Refuse to keep fewer messages than one a block."""
    if strategy.keep_every not in (None, 1):
        raise ValueError(
            "keep_every must be 1 for a Graph on a mesh with stages, where the message to each "
            f"block is kept: got keep_every={strategy.keep_every}. Leave it out, or use stage=1."
        )


def _shared(
    first: GraphPlacement, of_first: End, of_last: End
) -> tuple[tuple[str, tuple[str, str]], ...]:
    """Return how parameters of the last part lie that the first part uses too."""
    there = {owner: first.nodes[here].axes for here, owner in of_first.owners}
    return tuple(
        (here, (there[owner]["g"], there[owner]["s"]))
        for here, owner in of_last.owners
        if owner in there
    )
