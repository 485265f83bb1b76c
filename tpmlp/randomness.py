"""Random bits for what a model drops while it trains: from a key, the same on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.checks import check_key
from tpmlp.graph.graph import Graph
from tpmlp.models import Model


def check_dropout_key(model: Model, key: Any) -> tuple[jax.Array, ...]:
    """Return the key that a training step takes, alone in a tuple; an empty one for no dropout.

    Raises:
        ValueError: key is missing, or is none of jax.random.
    """
    dropped = list(model.dropouts) if isinstance(model, Graph) else []
    if key is None and not dropped:
        return ()
    if key is None:
        raise ValueError(
            f'key must be given, as vertex "{dropped[0]}" drops at random: got key=None. Use '
            "key=jax.random.key(step), another for each step."
        )
    check_key(key)
    return (key,) if dropped else ()


def random_words(key: jax.Array) -> jax.Array:
    """Return two words of random bits, whatever kind of key it is."""
    return jax.random.bits(key, (2,), jnp.uint32)
