"""An optax optimiser on padded, sharded parameters.

optax works on whole arrays, so its sums and norms are right on any mesh. Two things are left to
do. Its state must be split as the parameters are: compiled without being told, JAX puts all of
it on one device. And the padding must stay exactly 0, in updates and in state, whatever the
optimiser adds or divides; then it adds nothing to a norm either. An array of the state is like a
parameter when it stands at the end of the same path and its last dims have the same sizes.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tpmlp.extras import require
from tpmlp.kernels.blocks import Cut, blocks_of, parameter_cuts, run_blocks
from tpmlp.models import Model
from tpmlp.placement import ParameterSpec

Tree = Any
Params = Any
State = Any


@contextmanager
def standard_promotion() -> Iterator[None]:
    """Let optax mix types and ranks as it was written to, whatever the user has forbidden."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@dataclass(frozen=True, slots=True)
class MaskedOptimizer:
    """An optax transformation that leaves padding at 0; its methods are traced.

    Attributes:
        tx: the transformation.
        padded: ShapeDtypeStructs of the parameters as they are.
        logical: ShapeDtypeStructs of the parameters without padding.
    """

    tx: Any
    padded: Tree
    logical: Tree

    def init(self, params: Params) -> State:
        """Return the first state."""
        with standard_promotion():
            return self.mask(self.tx.init(params))

    def update(
        self, grads: Params, state: State, params: Params, value: jax.Array
    ) -> tuple[Params, State]:
        """Return what to add to the parameters, and the next state."""
        updates, state = self.update_unmasked(grads, state, params, value)
        return self.mask(updates), self.mask(state)

    def update_unmasked(
        self, grads: Params, state: State, params: Params, value: jax.Array
    ) -> tuple[Params, State]:
        """Return what the transformation says, in the parameters' types."""
        extra = {"value": value} if _takes_value(self.tx) else {}
        with standard_promotion():
            updates, state = self.tx.update(grads, state, params, **extra)
        return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state

    def map_like_params(
        self, function: Callable[[Any, Any], Any], tree: Tree, other: Tree, default: Any
    ) -> Tree:
        """Apply function(leaf, o) where a leaf is like a parameter, o that parameter's in other.

        Args:
            function: what to apply.
            tree: a state, or anything in the structure of the parameters.
            other: a tree in the structure of the parameters.
            default: function of the leaves that are like no parameter.
        """
        params = dict(jax.tree.leaves_with_path(self.padded))
        others = dict(jax.tree.leaves_with_path(other))

        def at(path: Any, leaf: Any) -> Any:
            end = path[-2:]  # (layer, W or b)
            param = params.get(end)
            if param is None or leaf.shape[-param.ndim :] != param.shape:
                return default(leaf)
            return function(leaf, others[end])

        return jax.tree.map_with_path(at, tree)

    def mask(self, tree: Tree) -> Tree:
        """Return a state, or updates, with 0 on padding."""

        def cut(leaf: Any, logical: Any) -> Any:
            return mask(leaf, logical.shape)

        return self.map_like_params(cut, tree, self.logical, lambda leaf: leaf)


def mask(array: jax.Array, logical: tuple[int, ...]) -> jax.Array:
    """Set to 0 what lies outside the logical sizes of the last dims.

    The mask is a comparison with an index: nothing is stored, and a sharded array costs no
    communication.
    """
    for dim, width in enumerate(logical, array.ndim - len(logical)):
        if width < array.shape[dim]:
            inside = lax.broadcasted_iota(jnp.int32, array.shape, dim) < width
            array = jnp.where(inside, array, jnp.zeros((), array.dtype))
    return array


@dataclass(frozen=True)
class ShardedOptimizer:
    """A MaskedOptimizer whose state is split over a mesh as the parameters are.

    Attributes:
        model: the model.
        placement: where its parameters are.
        masked: the optimiser.
    """

    model: Any
    placement: Any
    masked: MaskedOptimizer

    @cached_property
    def state_shardings(self) -> Tree:
        """Where each array of the state is: with its parameter, or whole on every device."""
        everywhere = NamedSharding(self.placement.mesh, PartitionSpec())

        def beside(leaf: Any, sharding: NamedSharding) -> NamedSharding:
            extra = leaf.ndim - len(sharding.spec)
            return NamedSharding(sharding.mesh, PartitionSpec(*(None,) * extra, *sharding.spec))

        state = jax.eval_shape(self.masked.init, self.masked.padded)
        shardings = self.model.shardings(self.placement)
        return self.masked.map_like_params(beside, state, shardings, lambda _: everywhere)

    def init(self, params: Params) -> State:
        """Return the first state, in place."""
        return jax.jit(self.masked.init, out_shardings=self.state_shardings)(params)

    def apply(
        self, grads: Params, state: State, params: Params, value: jax.Array
    ) -> tuple[Params, State]:
        """Return the next parameters and state; traced."""
        update = self._update_in_blocks if self.placement.is_invariant else self.masked.update
        updates, state = update(grads, state, params, value)
        return jax.tree.map(jnp.add, params, updates), state

    def _update_in_blocks(
        self, grads: Params, state: State, params: Params, value: jax.Array
    ) -> tuple[Params, State]:
        """Update one block after another, of one shape on every mesh (tpmlp.kernels.blocks)."""
        placed = self.model.shardings(self.placement)
        specs = jax.tree.map(lambda s: s.spec, (placed, self.state_shardings))

        def body(value: jax.Array, *trees: Any) -> Any:
            leaves, structure = jax.tree.flatten(trees)
            result = jax.tree.structure(trees[:2])
            cuts = tuple(
                (W, b if self.model.bias else None)
                for W, b in map(parameter_cuts, self.placement.axes)
            )
            # Shapes of the state are compared with those of whole parameters.
            of_state = self.masked.map_like_params(_extended, state, cuts, _uncut)
            all_cuts = jax.tree.leaves((cuts, of_state, cuts))

            def of_block(value: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
                grads, state, params = jax.tree.unflatten(structure, leaves)
                return jax.tree.leaves(self.masked.update_unmasked(grads, state, params, value))

            num_blocks = blocks_of("g", "s", axes=self.placement.axes[-1])
            results = run_blocks(
                of_block,
                [value, *leaves],
                [_uncut(value), *all_cuts],
                all_cuts[: result.num_leaves],
                num_blocks,
            )
            return jax.tree.unflatten(result, results)

        updates, state = jax.shard_map(
            body,
            mesh=self.placement.mesh,
            in_specs=(PartitionSpec(), *specs, specs[0]),
            out_specs=specs,
        )(value, grads, state, params)
        return self.masked.mask(updates), self.masked.mask(state)


def _extended(leaf: Any, cut: Cut) -> Cut:
    """Return the cut of a part of the state that is like a parameter, with dims before its own."""
    return Cut("-" * (leaf.ndim - len(cut.dims)) + cut.dims, cut.counts)


def _uncut(leaf: Any) -> Cut:
    return Cut("-" * leaf.ndim, {})


def shape_trees(model: Model, placement: Any, dtype: Any) -> tuple[Tree, Tree]:
    """Return the parameters as ShapeDtypeStructs, logical and padded."""

    def logical(spec: ParameterSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, dtype)

    def padded(spec: ParameterSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.padded(placement.num_blocks), dtype)

    specs = model.specs(placement)
    return jax.tree.map(logical, specs), jax.tree.map(padded, specs)


def _takes_value(tx: Any) -> bool:
    """Whether update can be told the objective, as some schedules and step sizes need."""
    parameters = inspect.signature(tx.update).parameters
    variadic = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return "value" in parameters or variadic


def default_optimizer() -> Any:
    """Return what fit uses when no optimiser is given: Adam, learning rate 1e-3."""
    return require("optax", extra="train", user="tpmlp.fit").adam(1e-3)
