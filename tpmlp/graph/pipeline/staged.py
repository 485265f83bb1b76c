"""Parameters of a graph in a pipeline: those of the ends, and slots of the blocks'.

A slot is one array for all stages, [stages, ...], for each parameter of a block, each stage holding
its own; those of the ends are arrays like any others. Whatever works on trees of arrays element by
element works on these, empty slots being zeros that stay zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpmlp.graph.pipeline.cut import Cut
from tpmlp.graph.structure import Structure
from tpmlp.pipeline.stages import BlockStages
from tpmlp.placement import ParameterSpec

Tree = dict[str, dict[str, Any]]  # {vertex: {parameter: array}}


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, slots=True)
class StagedGraph:
    """{vertex: {parameter: array}} of a pipeline; gradients have the same structure.

    Attributes:
        ends: of the vertices outside the blocks.
        slots: of a block's vertices, by slot, [stages, ...].
        stages: which block is where.
    """

    ends: Tree
    slots: tuple[Tree, ...]
    stages: BlockStages

    def tree_flatten_with_keys(self) -> tuple[Any, BlockStages]:
        """Return the trees with their keys, and where blocks are."""
        names = ("ends", "slots")
        children = ((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names)
        return tuple(children), self.stages

    @classmethod
    def tree_unflatten(cls, stages: BlockStages, children: tuple[Any, Any]) -> "StagedGraph":
        """Return what `tree_flatten_with_keys` took apart."""
        return cls(*children, stages)


def staged_graph_specs(graph: Structure, cut: Cut, specs: Tree, stages: BlockStages) -> StagedGraph:
    """Return what each array of a pipeline is, from the specs of the graph's own."""

    def slot(k: int, spec: ParameterSpec, name: str) -> ParameterSpec:
        shape, split = (stages.route.num_stages, *spec.shape), (False, *spec.split)
        return ParameterSpec(f"{name} of slot {k}", shape, split)

    slots = [
        {
            vertex: {
                name: slot(k, specs[cut.owner_in(0, vertex)][name], f"{vertex}.{name}")
                for name in arrays
            }
            for vertex, arrays in cut.block.arrays.items()
        }
        for k in range(stages.num_slots)
    ]
    return StagedGraph(ends_of(graph, specs), tuple(slots), stages)


def ends_of(graph: Structure, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is outside the blocks."""
    return {owner: mine for owner, mine in arrays.items() if owner not in graph.blocks}


def to_slots(graph: Structure, cut: Cut, arrays: Tree, stages: BlockStages) -> StagedGraph:
    """Stack blocks into slots; of NumPy arrays or of traced ones, padded alike or not at all."""

    def stack(k: int, vertex: str, name: str) -> Any:
        like = arrays[cut.owner_in(0, vertex)][name]
        numpy: Any = np if isinstance(like, np.ndarray) else jnp
        here = [stages.layer_in(k, stage) for stage in range(stages.route.num_stages)]
        empty = numpy.zeros_like(like)
        return numpy.stack(
            [empty if i is None else arrays[cut.owner_in(i, vertex)][name] for i in here]
        )

    slots = [
        {
            vertex: {name: stack(k, vertex, name) for name in mine}
            for vertex, mine in cut.block.arrays.items()
        }
        for k in range(stages.num_slots)
    ]
    return StagedGraph(ends_of(graph, arrays), tuple(slots), stages)


def to_blocks(graph: Structure, cut: Cut, params: StagedGraph) -> Tree:
    """Return {vertex: {parameter: array}} of the graph: `to_slots`, undone."""
    arrays = dict(params.ends)
    for i, (slot, stage) in params.stages.where.items():
        for vertex, mine in params.slots[slot].items():
            arrays[cut.owner_in(i, vertex)] = {name: a[stage] for name, a in mine.items()}
    return {owner: arrays[owner] for owner in graph.arrays}
