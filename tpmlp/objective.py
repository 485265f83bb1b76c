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
from tpmlp.kernels.backprop import Chain
from tpmlp.losses import Cotangent, Loss, get_loss
from tpmlp.model import MLP, Params, chain_of, param_shardings
from tpmlp.parameters import logical_layers
from tpmlp.placement import Placement
from tpmlp.regularizers import ElementwisePenalty, Regularizer, UserPenalty, get_regularizer
from tpmlp.strategy import Strategy
from tpmlp.summary import Summary

Specs = Any


class Evaluated(NamedTuple):
    """Scalars of one batch.

    Attributes:
        loss: the data loss.
        penalty: R(W).
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
        model: the MLP.
        chain: its placement and activation.
        loss: the loss.
        regularizer: R, or None.
    """

    model: MLP
    chain: Chain
    loss: Loss
    regularizer: Regularizer | None

    def evaluate(self, params: Params, batch: Batch) -> Evaluated:
        """Compute the scalars of a batch; forward only."""

        def body(layers: Any, x: Any, y: Any, weight: Any) -> kernel.Value:
            return kernel.value(layers, x, y, weight, chain=self.chain, loss=self.loss)

        value = self.map(body, PartitionSpec())(params, batch)
        return Evaluated(value.loss, self.penalty(params), value.correct)

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[Evaluated, Params]:
        """Compute the scalars of a batch, and the gradient of loss + R."""
        value, grads = self.map(self.gradients, (PartitionSpec(), self.param_specs))(params, batch)
        if isinstance(self.regularizer, UserPenalty):
            penalty, dR = jax.value_and_grad(partial(self._user_penalty, self.regularizer))(params)
            grads = jax.tree.map(jnp.add, grads, dR)
        else:
            penalty = self.penalty(params)
        return Evaluated(value.loss, penalty, value.correct), grads

    def gradients(self, *blocks: Any) -> tuple[kernel.Value, Any]:
        """Return scalars and gradients from one device's blocks, in microbatches."""
        if self.placement.strategy.microbatches > 1:
            return kernel.accumulate(*blocks, **self.kernel_arguments)
        result = self.run(*blocks)
        return result.value, result.grads

    def run(self, *blocks: Any) -> kernel.Pass:
        """Run the kernel on one device's blocks, the whole batch at once."""
        return kernel.value_and_grad(*blocks, **self.kernel_arguments)

    @property
    def kernel_arguments(self) -> dict[str, Any]:
        """Keywords of the kernel's functions."""
        penalty = self.regularizer if isinstance(self.regularizer, ElementwisePenalty) else None
        return {"chain": self.chain, "loss": self.loss, "penalty": penalty}

    def map(
        self, body: Callable[..., Any], out_specs: Specs, *, more_specs: tuple[Specs, ...] = ()
    ) -> Callable[..., Any]:
        """Return body(layers, x, y, weight, *more) on every device's blocks, in the kernel's types.

        Args:
            body: of one device's blocks.
            out_specs: PartitionSpecs of what it returns.
            more_specs: PartitionSpecs of what follows (params, batch).
        """

        def cast(layers: Any, batch: Batch, *more: Any) -> Any:
            dtype = layers[0][0].dtype
            x, y, weight = batch
            if self.loss.targets == "values":
                y = y.astype(dtype)
            elif self.loss.targets == "labels":
                # The widest integer: in a narrower one a label could come round to another class.
                y = y.astype(jax.dtypes.canonicalize_dtype(jnp.int64))
            return body(layers, x.astype(dtype), y, weight.astype(dtype), *more)

        batch_specs = Batch(*(s and s.spec for s in batch_shardings(self.placement, self.loss)))
        return jax.shard_map(
            cast,
            mesh=self.placement.mesh,
            in_specs=(self.param_specs, batch_specs, *more_specs),
            out_specs=out_specs,
        )

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
    def placement(self) -> Placement:
        """Where the model's arrays are."""
        return self.chain.placement

    @cached_property
    def param_specs(self) -> Specs:
        """PartitionSpecs in the structure of the parameters."""
        return jax.tree.map(lambda s: s.spec, param_shardings(self.model, self.placement))

    def penalty(self, params: Params) -> jax.Array:
        """Compute R(W)."""
        regularizer = self.regularizer
        if isinstance(regularizer, UserPenalty):
            return self._user_penalty(regularizer, params)
        if not isinstance(regularizer, ElementwisePenalty):
            return jnp.zeros((), params[0][0].dtype)
        body = partial(kernel.penalty_value, chain=self.chain, penalty=regularizer)
        return jax.shard_map(
            body,
            mesh=self.placement.mesh,
            in_specs=(self.param_specs,),
            out_specs=PartitionSpec(),
        )(params)

    def _user_penalty(self, penalty: UserPenalty, params: Params) -> jax.Array:
        return penalty.value(logical_layers(self.model, params))


def make_objective(
    model: MLP,
    *,
    loss: Any,
    mesh: Mesh,
    regularizer: Any = None,
    strategy: Strategy | None = None,
) -> Objective:
    """Return the Objective that the public functions share; arguments as in value_and_grad."""
    check_model(model)
    chain = chain_of(model, mesh, strategy)
    meant = Cotangent() if loss is None else get_loss(loss)
    penalty = get_regularizer(regularizer)
    if isinstance(penalty, UserPenalty) and chain.placement.is_invariant:
        raise ValueError(
            "regularizer must be tpmlp.l2, l1 or elastic_net with reduction='invariant', because a "
            f"function's own sums are cut as the mesh is: got {penalty.function!r}. Use one of "
            "these, or reduction='fast'."
        )
    return Objective(model, chain, meant, penalty)


def check_model(model: Any) -> None:
    """Refuse what is no model."""
    if not isinstance(model, MLP):
        raise ValueError(
            f"model must be a tpmlp.MLP: got a {type(model).__name__}. Make one with "
            "tpmlp.MLP(widths), and give it to value_and_grad; parameters go to the step."
        )
