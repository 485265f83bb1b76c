"""A part of a graph that reads a message, on one device's blocks: the engine, a step at a time."""

from typing import NamedTuple

import jax

from tpmlp.graph import engine
from tpmlp.graph.engine import Arrays, Backward, Forward, Kept, Params
from tpmlp.graph.placement import GraphPlacement
from tpmlp.graph.rules import Given


class Part(NamedTuple):
    """A part of a graph that reads a message "F/s/g B/d": a block, or the last part.

    Attributes:
        params: its parameters.
        placement: it on a stage.
        given: what its passes are given.
    """

    params: Params
    placement: GraphPlacement
    given: Given

    @property
    def source(self) -> str:
        """The name of what it reads."""
        return self.placement.graph.sources[0].name

    def forward(self, z: jax.Array) -> Forward:
        """Run it; the message is kept too where the way back reads it."""
        passed = engine.forward(self.params, {self.source: z.T}, self.given, self.placement)
        if self.source not in engine.read_names(self.placement):
            return passed
        kept = passed.kept
        return passed._replace(kept=kept._replace(values={**kept.values, self.source: z}))

    def backward(self, kept: Kept, g: jax.Array) -> Backward:
        """Go back to the message; g is of the output."""
        return engine.backward_inputs(self.params, {}, kept, g, self.given, self.placement)

    def gradients(self, kept: Kept, g: Arrays) -> Params:
        """Return those of the parameters, from g by vertex; summed over data that splits them."""
        reduce = self.given.run.splits_data
        return engine.parameter_gradients(
            self.params, {}, kept, g, self.given, self.placement, reduce=reduce
        )
