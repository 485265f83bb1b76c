"""The training step: the objective and its gradient, one compiled function of users' arrays."""

from typing import Any

import jax
from jax.sharding import Mesh

from tpmlp.ahead import compile_lowered, step_shapes
from tpmlp.batch import Batch, place_batch
from tpmlp.losses import Cotangent
from tpmlp.models import Model
from tpmlp.objective import Objective, make_objective
from tpmlp.parameters import check_params
from tpmlp.randomness import check_dropout_key, random_words
from tpmlp.strategy import Strategy

Params = Any


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
        return f"<step of {objective.model!r}, loss {objective.loss.name}, on {axes}>"

    def __call__(
        self,
        params: Params,
        x: Any,
        y: Any = None,
        weight: Any = None,
        *,
        cotangent: Any = None,
        key: Any = None,
    ) -> tuple[jax.Array, Params]:
        """Return (loss + R, gradients) at these parameters.

        Args:
            params: placed for this mesh and strategy.
            x: samples [B, d_0]; placed by shard_batch, or anything that NumPy takes. Of a Graph
                what its input is: [B, width], [B, T, width] or ids [B, T]; of one with several
                a dictionary {input: array}.
            y: targets, as the loss says; for outputs of every token with a dim T after B.
            weight: sample weights [B], or [B, T] where outputs have tokens; 1 by default.
            cotangent: v [B, d_out], for a step made with loss=None: the gradient of
                sum_i <v_i, h(W, x_i)>, that is g_{L+1} = v.
            key: from jax.random.key, for a Graph with Dropout.

        Returns:
            The loss, a scalar, and the gradients, placed as the parameters.

        Raises:
            ValueError: what is wrong with an argument, before anything is compiled.
        """
        return self._jitted(*self._checked(params, x, y, weight, cotangent, key))

    def lower(
        self,
        params: Params,
        x: Any,
        y: Any = None,
        weight: Any = None,
        *,
        cotangent: Any = None,
        key: Any = None,
    ) -> Any:
        """Return the lowered program, as jax.jit(...).lower does; arguments as in a call."""
        return self._jitted.lower(*self._checked(params, x, y, weight, cotangent, key))

    def compile(self, batch_size: int, *, dtype: Any = None) -> jax.stages.Compiled:
        """Compile for a batch size, without arrays; the mesh's devices may be only described.

        Args:
            batch_size: samples of one step.
            dtype: of the parameters; float32 by default.

        Returns:
            The compiled program, to give to tpmlp.audit. Called, it takes (params, batch), the
            batch from shard_batch, with x, values and weights in `dtype` and labels in int32; of
            a Graph with Dropout also a key.

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
        lowered = self._jitted.lower(*step_shapes(self.objective, batch_size, dtype))
        return compile_lowered(lowered, self.objective, batch_size, dtype)

    def _checked(
        self,
        params: Params,
        x: Any,
        y: Any,
        weight: Any,
        cotangent: Any,
        key: Any,
    ) -> tuple[Any, ...]:
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
        batch = place_batch(objective.placement, objective.loss, Batch(x, y, weight))
        keys = check_dropout_key(objective.model, key)
        return params, batch, *keys

    def _total(self, params: Params, batch: Batch, *keys: jax.Array) -> tuple[jax.Array, Params]:
        words = random_words(keys[0]) if keys else None
        value, grads = self.objective.value_and_grad(params, batch, words)
        return value.loss + value.penalty, grads


def value_and_grad(
    model: Model,
    *,
    loss: Any,
    mesh: Mesh,
    regularizer: Any = None,
    strategy: Strategy | None = None,
) -> Step:
    """Return the function that computes the objective and its gradient by the explicit kernel.

    Args:
        model: the MLP or the Graph.
        loss: "mse", "cross_entropy", "logistic", "output"; a Loss; a function (z [C], y) ->
            scalar of one sample; or None, and the step takes cotangent=[B, d_out].
        mesh: made by tpmlp.make_mesh.
        regularizer: None, l2(c), l1(c), elastic_net(c, ratio), or a function of the layers (of a
            Graph, of {vertex: {parameter: array}}).
        strategy: Strategy() by default.

    Returns:
        A Step: step(params, x, y, weight=None, key=None) -> (loss, grads), with `.lower`.

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
