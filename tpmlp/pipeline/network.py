"""A pipeline as the objective's network (tpmlp.kernels.network), for what only looks."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.activations import Activation
from tpmlp.collectives import all_reduce, per_stage
from tpmlp.kernels.backprop import Chain
from tpmlp.kernels.network import Finished, Params, Passed, param_dtype
from tpmlp.losses import Head
from tpmlp.pipeline import one_pass
from tpmlp.pipeline.body import Body
from tpmlp.pipeline.on_stage import OnStage
from tpmlp.pipeline.placement import PipelinePlacement
from tpmlp.pipeline.staged import Staged


class StageNetwork(ABC):
    """A model on a mesh with stages.

    Attributes:
        placement: where its arrays are, and its schedule.
    """

    placement: Any

    @property
    @abstractmethod
    def head(self) -> Head:
        """Where the outputs are."""

    @abstractmethod
    def body(self, params: Any) -> Body:
        """Return what the executor runs, inside shard_map."""

    @property
    def adds(self) -> bool:
        """Nothing: it adds nothing to the objective."""
        return False

    def forward(self, params: Params, x: Any, share: jax.Array | None) -> Passed:
        """Run forward, the whole batch at once, one stage after another."""

        def back(g: jax.Array, reduce: bool) -> Finished:
            raise NotImplementedError("a pipeline's step is value_and_grad")

        return Passed(self.outputs(params, x)[0], None, back)

    @property
    def kept_specs(self) -> tuple[()]:
        """Nothing is kept."""
        return ()

    def outputs(self, params: Params, x: Any) -> tuple[jax.Array, tuple[()]]:
        """Return the outputs on every stage, of the whole batch at once; nothing is kept.

        Each stage waits for the one before: it is for looking, where nothing has to be fast.
        """
        here, route, at = self.body(params), self.placement.schedule.route, 0
        z = per_stage(here.enter(x))
        for virtual in range(route.num_virtual_stages):
            at, c = route.place(virtual)

            def run(z: jax.Array, c: int = c) -> jax.Array:
                return per_stage(here.forward(c, z)[1])

            z = lax.cond(here.stage == at, run, jnp.zeros_like, z)
            if virtual + 1 < route.num_virtual_stages:
                receiver, _ = route.place(virtual + 1)
                z = here.moved_h(z, -route.ring(at, receiver, "F"))

        def last(z: jax.Array) -> jax.Array:
            return per_stage(here.leave(z))

        rows = jax.tree.leaves(x)[0].shape[0]
        nothing = jnp.zeros_like(here.empty(rows).outputs, param_dtype(params))
        found = lax.cond(here.stage == at, last, lambda z: nothing, z)
        axes = {**self.head.axes, "p": "stage"}
        return all_reduce("C/g/s B/d +p -> C/g/s B/d", found, **axes), ()

    def gradients(self, params: Params, x: Any, kept: Any, g: jax.Array) -> Any:
        """Refuse: what was not kept cannot be gone back through."""
        raise ValueError(
            "apply must not be differentiated on a mesh with stages, where it keeps nothing: got "
            f"stage={self.placement.sizes['stage']}. Use value_and_grad(model, loss=None, ...) and "
            "step(params, x, cotangent=...)."
        )

    def reduce(self, grads: Params) -> Params:
        """Return gradients: a step has summed them."""
        return grads

    def zeros(self, params: Params, dtype: Any) -> Params:
        """Refuse: a step adds its own microbatches up."""
        raise NotImplementedError("a pipeline's step is value_and_grad")

    def at(self, first_sample: Any, num_samples: int) -> Self:
        """Return the pipeline: a pass looks at all samples; microbatches are the executor's."""
        return self

    def dropping(self, words: jax.Array) -> Self:
        """Return the pipeline while training; one that drops nothing is the same."""
        return self


@dataclass(frozen=True, slots=True)
class Pipeline(StageNetwork):
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
