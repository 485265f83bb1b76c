"""Parameters of the ends, gathered once a step, and gradients summed back to where they are."""

from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.collectives import all_gather, reduce_scatter, zeros
from tpmlp.graph import engine
from tpmlp.graph.engine import Params
from tpmlp.graph.pipeline.placement import GraphOnStages
from tpmlp.graph.pipeline.staged import StagedGraph, Tree
from tpmlp.graph.placement import GraphPlacement
from tpmlp.kernels.execution import Execution


def whole_ends(params: StagedGraph, placement: GraphOnStages) -> Tree:
    """Return the ends' parameters as their parts without stages have them."""

    def gather(owner: str, name: str, array: jax.Array) -> jax.Array:
        layouts = " -> ".join(placement.end_layouts(owner, name))
        return all_gather(layouts, array, **placement.end_axes(owner))

    return {
        owner: {name: gather(owner, name, array) for name, array in mine.items()}
        for owner, mine in params.ends.items()
    }


def no_gradients(params: Params, part: GraphPlacement, run: Execution) -> Tree:
    """Return zeros like the sums of a part's gradients."""
    partial = "+p" if run.splits_data else "+d+p"

    def zero(owner: str, name: str, array: jax.Array) -> jax.Array:
        axes = {**part.nodes[owner].axes, "p": "stage"}
        return zeros(f"{part.layout(owner, name)} {partial}", array.shape, run.accumulate, **axes)

    return {
        owner: {name: zero(owner, name, array) for name, array in mine.items()}
        for owner, mine in params.items()
    }


def reduced(grads: tuple[Params, ...], placement: GraphOnStages, run: Execution) -> StagedGraph:
    """Sum gradients over data, where W has not, and those of the ends over stages.

    Args:
        grads: sums of the first part, of all slots, of the last part.
        placement: where they are to be.
        run: types.
    """

    def over_data(grads: Params, part: GraphPlacement) -> Params:
        return grads if run.splits_data else engine.reduce_gradients(grads, part)

    first, *slots, last = grads
    ends: dict[str, Any] = {}
    for mine, end, part in (
        (first, placement.cut.first, placement.first),
        (last, placement.cut.last, placement.last),
    ):
        summed = over_data(mine, part)
        for here, owner in end.owners:
            # What both ends use has a gradient from each.
            before = ends.get(owner)
            ends[owner] = (
                summed[here] if before is None else jax.tree.map(jnp.add, before, summed[here])
            )
    stacked = [jax.tree.map(lambda a: a[None], over_data(slot, placement.block)) for slot in slots]
    return StagedGraph(_split_ends(ends, placement), tuple(stacked), placement.stages)


def _split_ends(grads: Params, placement: GraphOnStages) -> Tree:
    """Sum the ends' gradients over the stages, where they are held: `whole_ends`, transposed."""

    def scatter(owner: str, name: str, array: jax.Array) -> jax.Array:
        held, used = placement.end_layouts(owner, name)
        return reduce_scatter(f"{used} +p -> {held}", array, **placement.end_axes(owner))

    return {
        owner: {name: scatter(owner, name, array) for name, array in mine.items()}
        for owner, mine in grads.items()
    }
