"""Parameters of a pipeline: the first layer, slots of interior layers, the last layer.

A slot is one array for all stages, W [stages, O, I] and b [stages, O], each stage holding its own;
the first and the last layer are arrays like any others. Whatever works on trees of arrays element
by element works on these, empty slots being zeros that stay zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpmlp.pipeline.stages import Stages
from tpmlp.placement import ParameterSpec

Pair = tuple[Any, Any]


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, slots=True)
class Staged:
    """(W, b) pairs of a pipeline; gradients have the same structure.

    Attributes:
        layers: the first layer, the slots, the last layer.
        stages: which layer is where.
    """

    layers: tuple[Pair, ...]
    stages: Stages

    @property
    def first(self) -> Pair:
        """(W_1, b_1)."""
        return self.layers[0]

    @property
    def slots(self) -> tuple[Pair, ...]:
        """(W [stages, O, I], b [stages, O]) by slot."""
        return self.layers[1:-1]

    @property
    def last(self) -> Pair:
        """(W_{L+1}, b_{L+1})."""
        return self.layers[-1]

    def tree_flatten_with_keys(self) -> tuple[Any, Stages]:
        """Return the pairs with their keys, and where layers are."""
        keys = (jax.tree_util.SequenceKey(i) for i in range(len(self.layers)))
        return tuple(zip(keys, self.layers, strict=True)), self.stages

    @classmethod
    def tree_unflatten(cls, stages: Stages, layers: Sequence[Pair]) -> "Staged":
        """Return what `tree_flatten_with_keys` took apart."""
        return cls(tuple(layers), stages)


def staged_specs(layers: Sequence[Pair], stages: Stages) -> Staged:
    """Return what each array of a pipeline is, from the specs of the layers."""

    def slot(k: int, spec: ParameterSpec | None) -> ParameterSpec | None:
        if spec is None:
            return None
        kind = spec.name.partition("_")[0]
        shape, split = (stages.route.num_stages, *spec.shape), (False, *spec.split)
        return ParameterSpec(f"{kind} of slot {k}", shape, split)

    of_interior = layers[1] if stages.num_slots else (None, None)
    slots = [(slot(k, of_interior[0]), slot(k, of_interior[1])) for k in range(stages.num_slots)]
    return Staged((layers[0], *slots, layers[-1]), stages)


def to_stages(layers: Sequence[Pair], stages: Stages) -> Staged:
    """Stack layers into slots; of NumPy arrays or of traced ones, padded alike or not at all."""

    def slot(k: int, which: int) -> Any:
        like = layers[1][which]
        if like is None:
            return None
        numpy: Any = np if isinstance(like, np.ndarray) else jnp
        here = [stages.layer_in(k, stage) for stage in range(stages.route.num_stages)]
        empty = numpy.zeros_like(like)
        return numpy.stack([empty if l is None else layers[l - 1][which] for l in here])

    slots = [(slot(k, 0), slot(k, 1)) for k in range(stages.num_slots)]
    first, last = layers[0], layers[-1]
    return Staged(((first[0], first[1]), *slots, (last[0], last[1])), stages)


def to_layers(params: Staged) -> list[Pair]:
    """Return (W_l, b_l) by layer: `to_stages`, undone."""
    stages = params.stages

    def layer(l: int) -> Pair:
        slot, stage = stages.where[l]
        W, b = params.slots[slot]
        return W[stage], None if b is None else b[stage]

    return [params.first, *(layer(l) for l in range(2, stages.num_layers)), params.last]
