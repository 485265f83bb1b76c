"""The objective of the public functions: a model, a mesh, a loss and R, on whole arrays.

Here arrays span the mesh; inside the shard_map they are one device's blocks. Samples are rows on
both sides: the kernel turns them to features first where it reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tpmlp.batch import Batch, batch_shardings
from tpmlp.kernels import objective as kernel
from tpmlp.kernels.network import Network, param_dtype
from tpmlp.losses import Cotangent, Loss, get_loss
from tpmlp.models import Model, check_model
from tpmlp.parameters import logical_params
from tpmlp.pipeline import executor
from tpmlp.pipeline.network import StageNetwork
from tpmlp.regularizers import ElementwisePenalty, Regularizer, UserPenalty, get_regularizer
from tpmlp.strategy import Strategy
from tpmlp.summary import Summary

Specs = Any
Params = Any


class Evaluated(NamedTuple):
    """Scalars of one batch.

    Attributes:
        loss: the data loss.
        penalty: R(W), and what vertices of a Graph add to the objective.
        correct: the weighted share of right predictions, NaN where the loss has none.
    """

    loss: jax.Array
    penalty: jax.Array
    correct: jax.Array


@dataclass(frozen=True)
class Objective:
    """A model, a mesh, a loss and a regulariser, as functions of placed arrays.

    These are traced: call them under jit, with parameters and batches that are placed.

    Attributes:
        model: the model.
        network: it on its mesh.
        loss: the loss.
        regularizer: R, or None.
    """

    model: Any
    network: Any
    loss: Loss
    regularizer: Regularizer | None

    def evaluate(self, params: Params, batch: Batch) -> Evaluated:
        """Compute the scalars of a batch; forward only, and nothing is dropped."""

        def body(network: Network, *blocks: Any) -> kernel.Value:
            return kernel.value(*blocks, network=network, loss=self.loss)

        value = self.map(body, PartitionSpec())(params, batch)
        return self._evaluated(value, self.penalty(params))

    def value_and_grad(
        self, params: Params, batch: Batch, words: jax.Array | None = None
    ) -> tuple[Evaluated, Params]:
        """Compute the scalars of a batch, and the gradient of loss + R.

        Args:
            params: placed.
            batch: placed.
            words: two words of random bits, for what is dropped; None drops nothing.
        """
        run = self.map(self.gradients, (PartitionSpec(), self.param_specs))
        value, grads = run(params, batch, words=words)
        if isinstance(self.regularizer, UserPenalty):
            penalty, dR = jax.value_and_grad(partial(self._user_penalty, self.regularizer))(params)
            grads = jax.tree.map(jnp.add, grads, dR)
        else:
            penalty = self.penalty(params)
        return self._evaluated(value, penalty), grads

    def gradients(self, network: Network, *blocks: Any) -> tuple[kernel.Value, Any]:
        """Return scalars and gradients from one device's blocks, in microbatches."""
        if isinstance(network, StageNetwork):
            return executor.value_and_grad(*blocks, network=network, **self.kernel_arguments)
        if self.placement.strategy.microbatches > 1:
            return kernel.accumulate(*blocks, network=network, **self.kernel_arguments)
        result = self.run(network, *blocks)
        return result.value, result.grads

    def run(self, network: Network, *blocks: Any) -> kernel.Pass:
        """Run the kernel on one device's blocks, the whole batch at once."""
        return kernel.value_and_grad(*blocks, network=network, **self.kernel_arguments)

    @property
    def kernel_arguments(self) -> dict[str, Any]:
        """Keywords of the kernel's functions."""
        penalty = self.regularizer if isinstance(self.regularizer, ElementwisePenalty) else None
        return {"loss": self.loss, "penalty": penalty}

    def _evaluated(self, value: kernel.Value, penalty: jax.Array) -> Evaluated:
        added = penalty if value.activity is None else penalty + value.activity
        return Evaluated(value.loss, added, value.correct)

    def map(
        self, body: Callable[..., Any], out_specs: Specs, *, more_specs: tuple[Specs, ...] = ()
    ) -> Callable[..., Any]:
        """Return body(network, params, x, y, weight, *more) on every device's blocks.

        They are in the kernel's types. The function returned takes (params, batch, *more), and
        words=, random bits for what is dropped.

        Args:
            body: of one device's blocks.
            out_specs: PartitionSpecs of what it returns.
            more_specs: PartitionSpecs of what follows (params, batch).
        """

        def cast(params: Any, batch: Batch, words: Any, *more: Any) -> Any:
            dtype = param_dtype(params)
            x, y, weight = batch
            if self.loss.targets == "values":
                y = y.astype(dtype)
            elif self.loss.targets == "labels":
                # The widest integer: in a narrower one a label could come round to another class.
                y = y.astype(jax.dtypes.canonicalize_dtype(jnp.int64))
            x = jax.tree.map(lambda spec, a: a if spec.vocabulary else a.astype(dtype), specs, x)
            network = self.network if words is None else self.network.dropping(words)
            return body(network, params, x, y, weight.astype(dtype), *more)

        specs = self.placement.samples
        placed = batch_shardings(self.placement, self.loss)
        batch_specs = jax.tree.map(lambda sharding: sharding.spec, placed)

        def mapped(params: Params, batch: Batch, *more: Any, words: Any = None) -> Any:
            return jax.shard_map(
                cast,
                mesh=self.placement.mesh,
                in_specs=(self.param_specs, batch_specs, PartitionSpec(), *more_specs),
                out_specs=out_specs,
            )(params, batch, words, *more)

        return mapped

    def summary(self, batch_size: int, dtype: Any = None) -> Summary:
        """Return what one device is predicted to move and hold in a step."""
        return self.model.summary(
            self.placement.mesh,
            batch_size=batch_size,
            strategy=self.placement.strategy,
            loss=self.loss,
            regularizer=self.regularizer,
            dtype=dtype,
        )

    @property
    def placement(self) -> Any:
        """Where the model's arrays are."""
        return self.network.placement

    @cached_property
    def param_specs(self) -> Specs:
        """PartitionSpecs in the structure of the parameters."""
        return jax.tree.map(lambda s: s.spec, self.model.shardings(self.placement))

    def penalty(self, params: Params) -> jax.Array:
        """Compute R(W)."""
        regularizer = self.regularizer
        if isinstance(regularizer, UserPenalty):
            return self._user_penalty(regularizer, params)
        if not isinstance(regularizer, ElementwisePenalty):
            return jnp.zeros((), param_dtype(params))
        body = partial(kernel.penalty_value, network=self.network, penalty=regularizer)
        return jax.shard_map(
            body,
            mesh=self.placement.mesh,
            in_specs=(self.param_specs,),
            out_specs=PartitionSpec(),
        )(params)

    def _user_penalty(self, penalty: UserPenalty, params: Params) -> jax.Array:
        return penalty.value(logical_params(self.model, params))


def make_objective(
    model: Model,
    *,
    loss: Any,
    mesh: Mesh,
    regularizer: Any = None,
    strategy: Strategy | None = None,
) -> Objective:
    """Return the Objective that the public functions share; arguments as in value_and_grad."""
    check_model(model)
    network = model.network(model.place(mesh, strategy))
    meant = Cotangent() if loss is None else get_loss(loss)
    penalty = get_regularizer(regularizer)
    if isinstance(penalty, UserPenalty) and network.placement.is_invariant:
        raise ValueError(
            "regularizer must be tpmlp.l2, l1 or elastic_net with reduction='invariant', because a "
            f"function's own sums are cut as the mesh is: got {penalty.function!r}. Use one of "
            "these, or reduction='fast'."
        )
    return Objective(model, network, meant, penalty)
