"""Every kind of vertex, each in a graph of its own whose inputs it reads, and its numbers."""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tpmlp
from tpmlp.graph import (
    Activation,
    ActivityL1,
    Attention,
    Concatenate,
    Dense,
    Dropout,
    Embedding,
    Input,
    Kind,
    LayerNorm,
    Positions,
    Product,
    RMSNorm,
    Scale,
    Shift,
    Slice,
    Softmax,
    Sum,
    TokenMean,
    Tokens,
    plain,
)
from tpmlp.graph.kinds import Function
from tpmlp.graph.vertex import Vertex
from tpmlp.randomness import random_words

# Samples: 8 devices on the data axis have some each.
BATCH = 8
KEY = jax.random.key(7)


@dataclass(frozen=True)
class Row:
    """A kind and what it reads.

    Attributes:
        kind: the kind.
        inputs: kinds of the sources that it reads.
    """

    kind: Kind
    inputs: tuple[Kind, ...]

    @cached_property
    def graph(self) -> tpmlp.Graph:
        """The graph of the row."""
        names = [f"x{i}" for i in range(len(self.inputs))]
        sources = [Vertex(name, kind) for name, kind in zip(names, self.inputs, strict=True)]
        return tpmlp.Graph([*sources, Vertex("out", self.kind, *names)])


def _mixture(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate(
        [jnp.sin(a[:, :5]) * b[:, :5], b.sum(axis=1, keepdims=True) * a[:, :1]], axis=1
    )


# Widths that no mesh of the fixture but the one of a single device divides.
VECTOR, OTHER, TEXT = Input(11), Input(11), Input(11, tokens=3)
HEADS = Input(1680, tokens=3)  # 840 heads of 2, which any number of devices up to 8 divides
ROWS = {
    "dense": Row(Dense(13), (VECTOR,)),
    "dense without a bias": Row(Dense(13, bias=False), (TEXT,)),
    "sigmoid": Row(Activation("sigmoid"), (VECTOR,)),
    "gelu": Row(Activation("gelu"), (TEXT,)),
    "sum": Row(Sum(), (VECTOR, OTHER)),
    "product": Row(Product(), (VECTOR, OTHER, VECTOR)),
    "concatenation": Row(Concatenate(), (VECTOR, Input(5))),
    "slice": Row(Slice(2, 9), (TEXT,)),
    "scale": Row(Scale(), (VECTOR,)),
    "shift": Row(Shift(), (TEXT,)),
    "positions": Row(Positions(), (TEXT,)),
    "dropout": Row(Dropout(0.4), (TEXT,)),
    "rms norm": Row(RMSNorm(), (TEXT,)),
    "layer norm": Row(LayerNorm(), (VECTOR,)),
    "softmax": Row(Softmax(), (VECTOR,)),
    "attention": Row(Attention(num_heads=840), (HEADS, HEADS, HEADS)),
    "causal attention": Row(
        Attention(num_heads=840, causal=True, rotary=True), (HEADS, HEADS, HEADS)
    ),
    "grouped attention": Row(
        Attention(num_heads=840, num_kv_heads=4, causal=True, rotary=True),
        (HEADS, Input(8, tokens=3), Input(8, tokens=3)),
    ),
    "embedding by features": Row(Embedding(11, split="features"), (Tokens(3, 17),)),
    "embedding by vocabulary": Row(Embedding(11, split="vocabulary"), (Tokens(3, 17),)),
    "mean over tokens": Row(TokenMean(), (TEXT,)),
    "activity": Row(ActivityL1(0.1), (VECTOR,)),
    "function of all features": Row(Function(_mixture), (VECTOR, Input(7))),
    "function of local features": Row(Function(lambda a: jnp.sin(a) + 1, "local"), (TEXT,)),
}


@cache
def numbers(graph: tpmlp.Graph, seed: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
    """Return logical parameters and samples, float64."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda spec: rng.normal(size=spec.shape) / 2, graph.parameters)
    samples = {}
    for vertex in graph.sources:
        shape = graph.shapes[vertex.name]
        size = tuple(n for n in (BATCH, shape.tokens, shape.width) if n is not None)
        samples[vertex.name] = (
            rng.integers(0, shape.vocabulary, size) if shape.vocabulary else rng.normal(size=size)
        )
    return params, samples


def expected_outputs(graph: tpmlp.Graph, params: Any, samples: Any) -> jax.Array:
    """Return the outputs of the graph on one device, written plainly."""
    return plain.outputs(graph, params, samples, words=random_words(KEY))[graph.output]


def sole(samples: dict[str, Any]) -> Any:
    """Return samples as a step takes them: those of a single source as they are."""
    return samples if len(samples) > 1 else next(iter(samples.values()))


def floats_of(samples: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the samples that have derivatives, and the ids, which have none."""
    floating = {n: a for n, a in samples.items() if np.issubdtype(a.dtype, np.floating)}
    return floating, {n: a for n, a in samples.items() if n not in floating}


def directions(tree: Any, seed: int) -> Any:
    """Return random numbers in the place of every array of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda array: rng.normal(size=array.shape), tree)
