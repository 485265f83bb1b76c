"""A pipeline as the objective's network (tpmlp.kernels.network), for what only looks."""

from typing import Any, NamedTuple

import jax

from tpmlp.activations import Activation
from tpmlp.kernels.backprop import Chain
from tpmlp.kernels.network import Finished, Passed
from tpmlp.losses import Head
from tpmlp.pipeline import one_pass
from tpmlp.pipeline.on_stage import OnStage
from tpmlp.pipeline.placement import PipelinePlacement
from tpmlp.pipeline.staged import Staged


class Pipeline(NamedTuple):
    """A chain of dense layers on a mesh with stages.

    Attributes:
        placement: where its arrays are, and its schedule.
        activation: sigma and sigma'.
    """

    placement: PipelinePlacement
    activation: Activation

    @property
    def chain(self) -> Chain:
        """The layers that a stage has at most."""
        return Chain(self.placement.chain, self.activation)

    @property
    def head(self) -> Head:
        """Where z_{L+1} is."""
        return self.chain.head

    @property
    def adds(self) -> bool:
        """Nothing: it adds nothing to the objective."""
        return False

    def body(self, params: Staged) -> OnStage:
        """Return what the executor runs, inside shard_map."""
        return OnStage(params, self.placement, self.chain)

    def forward(self, params: Staged, x: jax.Array, share: jax.Array | None) -> Passed:
        """Run forward, the whole batch at once, one stage after another, and back when asked to."""
        here = self.body(params)
        passed = one_pass.forward(x, here)

        def back(g: jax.Array, reduce: bool) -> Finished:
            assert reduce, "a pass sums its own gradients; microbatches are the executor's"
            return one_pass.backward(x, passed, g, here)

        return Passed(passed.outputs, None, back)

    @property
    def kept_specs(self) -> tuple[()]:
        """Nothing is kept."""
        return ()

    def outputs(self, params: Staged, x: jax.Array) -> tuple[jax.Array, tuple[()]]:
        """Return z_{L+1} on every stage, of the whole batch at once; nothing is kept."""
        return self.forward(params, x, None).outputs, ()

    def gradients(self, params: Staged, x: jax.Array, kept: Any, g: jax.Array) -> Any:
        """Refuse: what was not kept cannot be gone back through."""
        raise ValueError(
            "apply must not be differentiated on a mesh with stages, where it keeps nothing: got "
            f"stage={self.placement.sizes['stage']}. Use value_and_grad(model, loss=None, ...) and "
            "step(params, x, cotangent=...)."
        )

    def reduce(self, grads: Staged) -> Staged:
        """Return gradients: a step has summed them."""
        return grads

    def zeros(self, params: Staged, dtype: Any) -> Staged:
        """Refuse: a step adds its own microbatches up."""
        raise NotImplementedError("a pipeline's step is value_and_grad")

    def at(self, first_sample: Any, num_samples: int) -> "Pipeline":
        """Return the pipeline: all samples are alike to it."""
        return self

    def dropping(self, words: jax.Array) -> "Pipeline":
        """Return the pipeline: it drops nothing."""
        return self
