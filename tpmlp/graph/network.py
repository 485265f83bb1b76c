"""A graph as the objective's network (tpmlp.kernels.network): the engine, its key and its part."""

from typing import Any, NamedTuple

import jax

from tpmlp.collectives import block_index, zeros
from tpmlp.graph import engine
from tpmlp.graph.kinds import ActivityL1
from tpmlp.graph.placement import GraphPlacement
from tpmlp.graph.rules import Given
from tpmlp.kernels.execution import execution
from tpmlp.kernels.network import Finished, Params, Passed, param_dtype
from tpmlp.losses import Head


class GraphNetwork(NamedTuple):
    """A graph on its mesh.

    Attributes:
        placement: where its arrays are.
        words: two words of random bits, for dropout; None drops nothing.
        part: which of this device's samples is the first of a pass, and how many it has in all;
            None where a pass takes all of them.
    """

    placement: GraphPlacement
    words: jax.Array | None = None
    part: tuple[Any, int] | None = None

    @property
    def head(self) -> Head:
        """Where the outputs are."""
        output = self.placement.output
        return Head(num_outputs=output.width, axes=self.placement.head_axes)

    @property
    def adds(self) -> bool:
        """Whether a vertex adds to the objective."""
        return any(isinstance(node.kind, ActivityL1) for node in self.placement.program)

    def forward(self, params: Params, x: Any, share: jax.Array | None) -> Passed:
        """Run forward, and backward when asked to; the arrays of a trace are (r, g)."""
        placement = self.placement
        inputs, given = self._given(params, x, share)
        passed = engine.forward(params, inputs, given, placement)

        def back(g: jax.Array, reduce: bool) -> Finished:
            result = engine.backward(
                params, inputs, passed.kept, g, given, placement, reduce=reduce
            )
            return Finished(result.grads, (passed.values, result.g))

        return Passed(passed.output, passed.activity, back)

    @property
    def kept_specs(self) -> Any:
        """PartitionSpecs of what is kept by node, and of residues."""
        return engine.kept_specs(self.placement)

    def outputs(self, params: Params, x: Any) -> tuple[jax.Array, Any]:
        """Return the outputs and what is kept."""
        inputs, given = self._given(params, x, None)
        passed = engine.forward(params, inputs, given, self.placement)
        return passed.output, passed.kept

    def gradients(self, params: Params, x: Any, kept: Any, g: jax.Array) -> tuple[Params, Any]:
        """Return gradients by the parameters and by the inputs, laid out as these; None by ids."""
        inputs, given = self._given(params, x, None)
        result = engine.backward(params, inputs, kept, g, given, self.placement)
        grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), result.grads, params)
        dx = {
            name: result.inputs[name].T.reshape(array.shape).astype(array.dtype)
            if name in result.inputs
            else None
            for name, array in inputs.items()
        }
        return grads, dx if len(dx) > 1 else next(iter(dx.values()))

    def reduce(self, grads: Params) -> Params:
        """Sum gradients over the data axis that are not."""
        return engine.reduce_gradients(grads, self.placement)

    def zeros(self, params: Params, dtype: Any) -> Params:
        """Return the gradients of no samples."""
        placement = self.placement

        def zero(owner: str, name: str, array: jax.Array) -> jax.Array:
            layout = placement.layout(owner, name)
            layout = layout if placement.splits_data else f"{layout} +d"
            return zeros(layout, array.shape, dtype, **placement.nodes[owner].axes)

        return {
            owner: {name: zero(owner, name, array) for name, array in arrays.items()}
            for owner, arrays in params.items()
        }

    def at(self, first_sample: Any, num_samples: int) -> "GraphNetwork":
        """Return the network for the part of a device's samples that begins with that one."""
        return self._replace(part=(first_sample, num_samples))

    def dropping(self, words: jax.Array) -> "GraphNetwork":
        """Return the network while training: what is dropped is a function of these bits."""
        return self._replace(words=words)

    def _given(
        self, params: Params, x: Any, share: jax.Array | None
    ) -> tuple[dict[str, jax.Array], Given]:
        """Return the inputs by source, and what a pass is given beside them."""
        inputs = self.placement.named_inputs(x)
        first = self._number_of_first(inputs)
        run = execution(self.placement, param_dtype(params))
        return inputs, Given(run, self.placement.sizes, self.words, first, share)

    def _number_of_first(self, inputs: dict[str, jax.Array]) -> Any:
        """Return the number of the first sample of a pass in the whole batch."""
        first, num_samples = self.part or (0, next(iter(inputs.values())).shape[0])
        return block_index("B/d", d="data") * num_samples + first
