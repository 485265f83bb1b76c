"""Regularisers R(W): what is added to the loss, and to the gradient of every W_l once.

The built-in ones are sums over elements, so each device adds up its own block and the gradient
needs no communication. A user's function sees the logical (W_l, b_l) and is differentiated.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpmlp import reference


class Regularizer(ABC):
    """R(W), given by its value and gradient."""

    @property
    @abstractmethod
    def reference(self) -> Any:
        """The same regulariser in NumPy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ElementwisePenalty(Regularizer):
    """l2 * sum w^2 + l1 * sum |w| over the weights, and the biases if asked.

    Attributes:
        l1: coefficient of sum |w|.
        l2: coefficient of sum w^2.
        biases: whether the biases are counted too.
    """

    l1: float = 0.0
    l2: float = 0.0
    biases: bool = False

    def __post_init__(self) -> None:
        for name, value in (("l1", self.l1), ("l2", self.l2)):
            _check_number(name, value)

    @property
    def reference(self) -> Any:
        """The same regulariser in NumPy."""
        return reference.penalty(l1=self.l1, l2=self.l2, biases=self.biases)

    def value(self, w: jax.Array) -> jax.Array:
        """Return the penalty of one block."""
        return self.l2 * jnp.sum(w * w) + self.l1 * jnp.sum(jnp.abs(w))

    def gradient(self, w: jax.Array) -> jax.Array:
        """Return the derivative, elementwise; that of |w| at 0 is taken as 0."""
        return (2 * self.l2) * w + self.l1 * jnp.sign(w)


@dataclass(frozen=True, slots=True)
class UserPenalty(Regularizer):
    """A user's function of the logical layers, ((W_1, b_1), ...) -> scalar."""

    function: Callable[[Any], Any]

    def value(self, layers: Any) -> jax.Array:
        """Return R of the logical layers.

        Raises:
            ValueError: it is no floating-point scalar.
        """
        result = jnp.asarray(self.function(layers))
        if result.shape != () or not jnp.issubdtype(result.dtype, jnp.floating):
            raise ValueError(
                "regularizer must return a floating-point scalar: got shape "
                f"{result.shape}, dtype {result.dtype}. Sum over elements with jnp.sum."
            )
        return result

    @property
    def reference(self) -> Any:
        """Refuse: NumPy cannot differentiate a user's function."""
        raise ValueError(
            "regularizer has no NumPy reference: it is a user's function, differentiated by JAX. "
            "Compare with jax.grad of the unsharded model."
        )


def l2(coefficient: float, *, biases: bool = False) -> Regularizer:
    """Return R(W) = coefficient * sum_l |W_l|^2.

    Args:
        coefficient: at least 0.
        biases: whether the biases are counted too.
    """
    _check_number("coefficient", coefficient)
    return ElementwisePenalty(l2=coefficient, biases=biases)


def l1(coefficient: float, *, biases: bool = False) -> Regularizer:
    """Return R(W) = coefficient * sum_l sum |W_l|.

    Args:
        coefficient: at least 0.
        biases: whether the biases are counted too.
    """
    _check_number("coefficient", coefficient)
    return ElementwisePenalty(l1=coefficient, biases=biases)


def elastic_net(coefficient: float, ratio: float, *, biases: bool = False) -> Regularizer:
    """Return R(W) = ratio * l1(coefficient) + (1 - ratio) * l2(coefficient).

    Args:
        coefficient: at least 0.
        ratio: share of l1, in [0, 1].
        biases: whether the biases are counted too.
    """
    _check_number("coefficient", coefficient)
    _check_number("ratio", ratio, at_most=1)
    return ElementwisePenalty(l1=coefficient * ratio, l2=coefficient * (1 - ratio), biases=biases)


def get_regularizer(regularizer: object) -> Regularizer | None:
    """Return the Regularizer meant by None, a Regularizer, or a function of the layers.

    Raises:
        ValueError: none of these.
    """
    if regularizer is None or isinstance(regularizer, Regularizer):
        return regularizer
    if callable(regularizer):
        return UserPenalty(regularizer)
    raise ValueError(
        "regularizer must be None, tpmlp.l2(c), l1(c), elastic_net(c, ratio) or a function of the "
        f"layers ((W_1, b_1), ...): got regularizer={regularizer!r}."
    )


def _check_number(name: str, value: Any, *, at_most: float = math.inf) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not (0 <= value <= at_most and math.isfinite(value)):
        raise ValueError(
            f"{name} must be a finite number from 0 to {at_most}: got {name}={value!r}. "
            "Use for example 1e-4 for a coefficient, 0.5 for a ratio."
        )
