"""The global view of the kernel: value_and_grad, evaluation and apply, on whole arrays.

Here arrays span the mesh; inside the shard_map they are one device's blocks. Samples are rows on
both sides: the kernel turns them to features first where it reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec

from tpmlp.batch import (
    Batch,
    batch_shardings,
    check_features,
    fill,
    padded_shapes,
    place_batch,
)
from tpmlp.checks import check_finite
from tpmlp.kernels import backprop
from tpmlp.kernels import objective as kernel
from tpmlp.kernels.backprop import Chain
from tpmlp.layout import padded
from tpmlp.losses import Cotangent, Loss, get_loss
from tpmlp.model import MLP, Params, chain_of, param_shardings
from tpmlp.parameters import check_params, logical_layers
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
        return Evaluated(value.loss, self._penalty(params), value.correct)

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[Evaluated, Params]:
        """Compute the scalars of a batch, and the gradient of loss + R."""
        value, grads = self.map(self.gradients, (PartitionSpec(), self.param_specs))(params, batch)
        if isinstance(self.regularizer, UserPenalty):
            penalty, dR = jax.value_and_grad(partial(self._user_penalty, self.regularizer))(params)
            grads = jax.tree.map(jnp.add, grads, dR)
        else:
            penalty = self._penalty(params)
        return Evaluated(value.loss, penalty, value.correct), grads

    def gradients(self, *blocks: Any) -> tuple[kernel.Value, Any]:
        """Return scalars and gradients from one device's blocks, in microbatches."""
        if self.placement.strategy.microbatches > 1:
            return kernel.accumulate(*blocks, **self._kernel_arguments)
        result = self.run(*blocks)
        return result.value, result.grads

    def run(self, *blocks: Any) -> kernel.Pass:
        """Run the kernel on one device's blocks, the whole batch at once."""
        return kernel.value_and_grad(*blocks, **self._kernel_arguments)

    @property
    def _kernel_arguments(self) -> dict[str, Any]:
        penalty = self.regularizer if isinstance(self.regularizer, ElementwisePenalty) else None
        return {"chain": self.chain, "loss": self.loss, "penalty": penalty}

    def map(self, body: Callable[..., Any], out_specs: Specs) -> Callable[[Params, Batch], Any]:
        """Return body(layers, x, y, weight) on every device's blocks, in the kernel's types."""

        def cast(layers: Any, batch: Batch) -> Any:
            dtype = layers[0][0].dtype
            x, y, weight = batch
            if self.loss.targets == "values":
                y = y.astype(dtype)
            elif self.loss.targets == "labels":
                # The widest integer: in a narrower one a label could come round to another class.
                y = y.astype(jax.dtypes.canonicalize_dtype(jnp.int64))
            return body(layers, x.astype(dtype), y, weight.astype(dtype))

        batch_specs = Batch(*(s and s.spec for s in batch_shardings(self.placement, self.loss)))
        return jax.shard_map(
            cast,
            mesh=self.placement.mesh,
            in_specs=(self.param_specs, batch_specs),
            out_specs=out_specs,
        )

    @property
    def placement(self) -> Placement:
        """Where the model's arrays are."""
        return self.chain.placement

    @cached_property
    def param_specs(self) -> Specs:
        """PartitionSpecs in the structure of the parameters."""
        return jax.tree.map(lambda s: s.spec, param_shardings(self.model, self.placement))

    def _penalty(self, params: Params) -> jax.Array:
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
    return Objective(model, chain, meant, get_regularizer(regularizer))


def check_model(model: Any) -> None:
    """Refuse what is no model."""
    if not isinstance(model, MLP):
        raise ValueError(
            f"model must be a tpmlp.MLP: got a {type(model).__name__}. Make one with "
            "tpmlp.MLP(widths), and give it to value_and_grad; parameters go to the step."
        )


class Step:
    """A compiled training objective: step(params, x, y, weight=None) -> (loss, grads).

    Made by tpmlp.value_and_grad.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._jitted = jax.jit(self._total)

    def __repr__(self) -> str:
        objective = self.objective
        axes = ", ".join(f"{name}={size}" for name, size in objective.placement.sizes.items())
        return f"<step of {objective.model}, loss {objective.loss.name}, on {axes}>"

    def __call__(
        self, params: Params, x: Any, y: Any = None, weight: Any = None, *, cotangent: Any = None
    ) -> tuple[jax.Array, Params]:
        """Return (loss + R, gradients) at these parameters.

        Args:
            params: placed for this mesh and strategy.
            x: samples [B, d_0]; placed by shard_batch, or anything that NumPy takes.
            y: targets, as the loss says.
            weight: sample weights [B]; 1 by default.
            cotangent: v [B, d_out], for a step made with loss=None: the gradient of
                sum_i <v_i, h(W, x_i)>, that is g_{L+1} = v.

        Returns:
            The loss, a scalar, and the gradients, placed as the parameters.

        Raises:
            ValueError: what is wrong with an argument, before anything is compiled.
        """
        return self._jitted(*self._checked(params, x, y, weight, cotangent))

    def lower(
        self, params: Params, x: Any, y: Any = None, weight: Any = None, *, cotangent: Any = None
    ) -> Any:
        """Return the lowered program, as jax.jit(...).lower does; arguments as in a call."""
        return self._jitted.lower(*self._checked(params, x, y, weight, cotangent))

    def compile(self, batch_size: int, *, dtype: Any = None) -> jax.stages.Compiled:
        """Compile for a batch size, without arrays; the mesh's devices may be only described.

        Args:
            batch_size: samples of one step.
            dtype: of the parameters; float32 by default.

        Returns:
            The compiled program, to give to tpmlp.audit. Called, it takes (params, batch), the
            batch from shard_batch, with x, values and weights in `dtype` and labels in int32.

        Raises:
            ValueError: batch_size is not positive; the loss is a user's, whose targets have no
                known shape (use `lower`).
            MemoryError: the program does not fit the device; shows what was predicted.

        Examples:
            >>> import tpmlp
            >>> mesh = tpmlp.make_mesh(x=8)
            >>> step = value_and_grad(tpmlp.MLP((64, 256, 10)), loss="cross_entropy", mesh=mesh)
            >>> tpmlp.audit(step.compile(128)).counts["all_gather"]
            3
        """
        summary = self._summary(batch_size, dtype)
        params, batch = self.shapes(batch_size, dtype)
        try:
            return self._jitted.lower(params, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(
                f"the step must fit the memory of a device: got batch_size={batch_size} on "
                f"{self.objective.placement.sizes}, and the compiler ran out. Use more devices, "
                "keep='recompute', microbatches, shard_weights or a smaller type. Predicted:\n"
                f"{summary}"
            ) from error

    def _summary(self, batch_size: int, dtype: Any) -> Summary:
        objective = self.objective
        return objective.model.summary(
            objective.placement.mesh,
            batch_size=batch_size,
            strategy=objective.placement.strategy,
            loss=objective.loss,
            regularizer=objective.regularizer,
            dtype=dtype,
        )

    def shapes(self, batch_size: int, dtype: Any = None) -> tuple[Any, Batch]:
        """Return parameters and a batch as ShapeDtypeStructs with shardings."""
        objective, dtype = self.objective, jnp.dtype(jnp.float32 if dtype is None else dtype)
        placement = objective.placement
        shapes = padded_shapes(placement, objective.loss, batch_size)
        dtypes = Batch(dtype, jnp.int32 if objective.loss.targets == "labels" else dtype, dtype)
        placed = batch_shardings(placement, objective.loss)
        batch = Batch(
            *(
                None if s is None else jax.ShapeDtypeStruct(shape, d, sharding=s)
                for shape, d, s in zip(shapes, dtypes, placed, strict=True)
            )
        )
        params = tuple(
            tuple(
                None if s is None else jax.ShapeDtypeStruct(shape, dtype, sharding=s)
                for shape, s in zip(placement.layer_shapes(l), layer, strict=True)
            )
            for l, layer in enumerate(param_shardings(objective.model, placement), 1)
        )
        return params, batch

    def _checked(
        self, params: Params, x: Any, y: Any, weight: Any, cotangent: Any
    ) -> tuple[Params, Batch]:
        objective = self.objective
        takes_cotangent = isinstance(objective.loss, Cotangent)
        if takes_cotangent != (cotangent is not None) or (takes_cotangent and y is not None):
            loss = None if takes_cotangent else objective.loss.name
            raise ValueError(
                f"cotangent must be given, and y not, exactly when the step has loss=None: got "
                f"loss={loss!r}, y {'given' if y is not None else 'None'}, cotangent "
                f"{'given' if cotangent is not None else 'None'}."
            )
        params = check_params(objective.model, params, objective.placement)
        y = cotangent if takes_cotangent else y
        return params, place_batch(objective.placement, objective.loss, Batch(x, y, weight))

    def _total(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        value, grads = self.objective.value_and_grad(params, batch)
        return value.loss + value.penalty, grads


def value_and_grad(
    model: MLP,
    *,
    loss: Any,
    mesh: Mesh,
    regularizer: Any = None,
    strategy: Strategy | None = None,
) -> Step:
    """Return the function that computes the objective and its gradient by the explicit kernel.

    Args:
        model: the MLP.
        loss: "mse", "cross_entropy", "logistic", "output"; a Loss; a function (z [C], y) ->
            scalar of one sample; or None, and the step takes cotangent=[B, d_out].
        mesh: made by tpmlp.make_mesh.
        regularizer: None, l2(c), l1(c), elastic_net(c, ratio), or a function of the layers.
        strategy: Strategy() by default.

    Returns:
        A Step: step(params, x, y, weight=None) -> (loss, grads), with `.lower`.

    Raises:
        ValueError: an unknown loss, regulariser or layout, or one that the mesh cannot have.

    Examples:
        >>> import jax, numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(x=4, y=2)
        >>> mlp = tpmlp.MLP((3, 10, 2), activation="identity", bias=False)
        >>> ones = [(np.ones((10, 3), np.float32), None), (np.ones((2, 10), np.float32), None)]
        >>> params = tpmlp.from_numpy(mlp, ones, mesh)
        >>> step = value_and_grad(mlp, loss="output", mesh=mesh)
        >>> loss, grads = step(params, np.ones((1, 3)))
        >>> float(loss), tpmlp.to_numpy(mlp, grads)[0][0][0]
        (60.0, array([2., 2., 2.], dtype=float32))
    """
    return Step(
        make_objective(model, loss=loss, mesh=mesh, regularizer=regularizer, strategy=strategy)
    )


def apply(
    model: MLP, params: Params, x: Any, *, mesh: Mesh, strategy: Strategy | None = None
) -> jax.Array:
    """Return the outputs h(W, x) at logical width.

    Differentiable by jax.grad, in params and in x: the derivative is the explicit backward pass,
    not a derivative of the forward pass.

    Args:
        model: the MLP.
        params: placed for this mesh and strategy.
        x: samples [B, d_0].
        mesh: the mesh.
        strategy: Strategy() by default.

    Returns:
        Outputs [B, d_out].

    Raises:
        ValueError: parameters of another model, mesh or layout; x of a wrong shape or dtype, or
            with a NaN or an infinity.
    """
    check_model(model)
    chain = chain_of(model, mesh, strategy)
    params = check_params(model, params, chain.placement)
    x = check_features(x, chain.placement.widths[0])
    if not isinstance(x, Tracer):
        check_finite("x", np.asarray(x))
    return _apply(model, chain)(params, x)


@lru_cache(maxsize=16)
def _apply(model: MLP, chain: Chain) -> Callable[[Params, jax.Array], jax.Array]:
    placement = chain.placement
    outputs = _outputs(model, chain)

    def run(params: Params, x: jax.Array) -> jax.Array:
        rows = padded(x.shape[0], placement.row_blocks)
        x_whole = fill(x.astype(params[0][0].dtype), (rows, placement.padded_widths[0]), jnp)
        return outputs(params, x_whole)[: x.shape[0], : placement.widths[-1]]

    return jax.jit(run)


def _outputs(model: MLP, chain: Chain) -> Callable[[Params, jax.Array], jax.Array]:
    """Return padded outputs as a function of padded arrays, with the kernel's own derivative."""
    placement = chain.placement
    num_layers = model.num_layers
    params = jax.tree.map(lambda s: s.spec, param_shardings(model, placement))
    x = placement.spec("B/d I/s/g", 1)
    kept = [backprop.is_kept(l, num_layers, placement.strategy) for l in range(1, num_layers)]
    z = [placement.spec("O/g/s B/d", l) if is_kept else None for l, is_kept in enumerate(kept, 1)]
    rows = placement.spec("B/d O/g/s", num_layers)
    shard_map = partial(jax.shard_map, mesh=placement.mesh)

    def forward_body(layers: Any, x: jax.Array) -> Any:
        passed = backprop.forward(layers, x, chain)
        return passed.z[-1].T, backprop.keep(passed, chain).z

    def backward_body(layers: Any, x: jax.Array, z: Any, g: jax.Array) -> Any:
        kept = backprop.Kept(z, [None] * num_layers)
        result = backprop.backward(layers, x, kept, g.T, chain)
        grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), result.grads, layers)
        return grads, result.dx.T.astype(x.dtype)

    forward = shard_map(forward_body, in_specs=(params, x), out_specs=(rows, z))
    backward = shard_map(backward_body, in_specs=(params, x, z, rows), out_specs=(params, x))

    @jax.custom_vjp
    def outputs(params: Params, x: jax.Array) -> jax.Array:
        return forward(params, x)[0]

    def outputs_fwd(params: Params, x: jax.Array) -> Any:
        out, z = forward(params, x)
        return out, (params, x, z)

    def outputs_bwd(kept: Any, g: jax.Array) -> Any:
        params, x, z = kept
        return backward(params, x, z, g)

    outputs.defvjp(outputs_fwd, outputs_bwd)
    return outputs
