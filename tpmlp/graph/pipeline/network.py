"""A graph on a mesh with stages as the objective's network."""

from dataclasses import dataclass, replace

import jax

from tpmlp.graph.pipeline.body import GraphOnStage
from tpmlp.graph.pipeline.placement import GraphOnStages
from tpmlp.graph.pipeline.staged import StagedGraph
from tpmlp.losses import Head
from tpmlp.pipeline.network import StageNetwork


@dataclass(frozen=True, slots=True)
class GraphPipeline(StageNetwork):
    """A graph whose blocks repeat, on a mesh with stages.

    Attributes:
        placement: where its arrays are, and its schedule.
        words: two words of random bits, for dropout; None drops nothing.
    """

    placement: GraphOnStages
    words: jax.Array | None = None

    @property
    def head(self) -> Head:
        """Where the outputs are."""
        part = self.placement.last
        return Head(num_outputs=part.output.width, axes=part.head_axes)

    def body(self, params: StagedGraph) -> GraphOnStage:
        """Return what the executor runs, inside shard_map."""
        return GraphOnStage(params, self.placement, self.words)

    def dropping(self, words: jax.Array) -> "GraphPipeline":
        """Return the network while training: what is dropped is a function of these bits."""
        return replace(self, words=words)
