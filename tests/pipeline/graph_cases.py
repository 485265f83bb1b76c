"""Graphs whose blocks repeat, on meshes with stages, and what a step of one must be."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tpmlp
from tests.graph.rows import BATCH, KEY, numbers, sole
from tests.tolerances import FLOAT64
from tpmlp.graph import (
    Activation,
    Concatenate,
    Dense,
    Dropout,
    Embedding,
    Input,
    LayerNorm,
    Product,
    Repeat,
    RMSNorm,
    Slice,
    Softmax,
    Sum,
    TokenMean,
    Tokens,
    Vertex,
    gated_mlp_block,
    language_model,
    plain,
    residual_mlp_block,
    transformer_block,
)
from tpmlp.randomness import random_words

WIDTH = 9


def between(block: tpmlp.Graph, times: int) -> tpmlp.Graph:
    """Return blocks between two dense vertices, of widths that no mesh divides."""
    width = block.shapes[block.output].features
    return tpmlp.Graph(
        [
            Vertex("x", Input(7)),
            Vertex("in", Dense(width), "x"),
            Repeat("blocks", block, "in", times),
            Vertex("out", Dense(5), "blocks"),
        ]
    )


# Its output is in the other orientation than its input.
TURNING = tpmlp.Graph(
    [
        Vertex("x", Input(WIDTH)),
        Vertex("z", Dense(WIDTH), "x"),
        Vertex("h", Activation("tanh"), "z"),
    ]
)
SHARED = tpmlp.Graph(
    [
        Vertex("x", Input(WIDTH)),
        Vertex("z", Dense(WIDTH), "x"),
        Vertex("h", Activation("tanh"), "z"),
        Vertex("again", Dense(WIDTH), "h", share="z"),
        Vertex("out", Sum(), "x", "again", "h"),
    ]
)
DROPPING = tpmlp.Graph(
    [
        Vertex("x", Input(WIDTH)),
        Vertex("few", Dropout(0.3), "x"),
        Vertex("z", Dense(WIDTH), "few"),
        Vertex("h", Activation("tanh"), "z"),
        Vertex("fewer", Dropout(0.5), "h"),
        Vertex("out", Sum(), "x", "fewer"),
    ]
)
NESTED = tpmlp.Graph([Vertex("x", Input(WIDTH)), Repeat("inner", TURNING, "x", 2)])
MIXED = tpmlp.Graph(
    [
        Vertex("x", Input(WIDTH)),
        Vertex("norm", LayerNorm(), "x"),
        Vertex("up", Dense(12), "norm"),
        Vertex("odds", Softmax(), "up"),
        Vertex.from_function("wave", jnp.sin, "up", of="local"),
        Vertex("both", Product(), "odds", "wave"),
        Vertex("few", Slice(1, 8), "both"),
        Vertex("many", Concatenate(), "few", "x"),
        Vertex("down", Dense(WIDTH, bias=False), "many"),
        Vertex("out", Sum(), "x", "down"),
    ]
)
# Heads whose width all meshes here divide, as they must.
TEXT = transformer_block(48, 3, num_heads=8, num_kv_heads=4, hidden=12)


def text_model(times: int, *, owner_is_last: bool) -> tpmlp.Graph:
    """Return a language model whose table belongs to the logits, or to the embedding."""
    shares = {"logits": None, "table": "logits"} if owner_is_last else {"logits": "table"}
    return tpmlp.Graph(
        [
            Vertex("ids", Tokens(3, 11)),
            Vertex("table", Embedding(48), "ids", share=shares.get("table")),
            Repeat("blocks", TEXT, "table", times),
            Vertex("norm", RMSNorm(), "blocks"),
            Vertex("logits", Dense(11, bias=False), "norm", share=shares["logits"]),
        ]
    )


GRAPHS = {
    "residual": lambda n: between(residual_mlp_block(10, 14, activation="sigmoid"), n),
    "gated": lambda n: between(gated_mlp_block(WIDTH, 13), n),
    "turning": lambda n: between(TURNING, n),
    "shared": lambda n: between(SHARED, n),
    "nested": lambda n: between(NESTED, n),
    "mixed": lambda n: between(MIXED, n),
    "dropping": lambda n: tpmlp.Graph(
        [
            Vertex("x", Input(WIDTH)),
            Vertex("first", Dropout(0.2), "x"),
            Repeat("blocks", DROPPING, "first", n),
            Vertex("out", Dense(5), "blocks"),
            Vertex("last", Dropout(0.2), "out"),
        ]
    ),
    "bare": lambda n: tpmlp.Graph([Vertex("x", Input(WIDTH)), Repeat("blocks", TURNING, "x", n)]),
    "two sources": lambda n: tpmlp.Graph(
        [
            Vertex("a", Input(7)),
            Vertex("b", Input(WIDTH)),
            Vertex("in", Dense(WIDTH), "a"),
            Vertex("sum", Sum(), "in", "b"),
            Repeat("blocks", SHARED, "sum", n),
        ]
    ),
    "text": lambda n: text_model(n, owner_is_last=False),
    "text of the logits' table": lambda n: text_model(n, owner_is_last=True),
    "pooled text": lambda n: tpmlp.Graph(
        [
            Vertex("x", Input(48, tokens=3)),
            Repeat("blocks", TEXT, "x", n),
            Vertex("mean", TokenMean(), "blocks"),
            Vertex("out", Dense(5), "mean"),
        ]
    ),
    "language model": lambda n: language_model(
        11, 48, 3, num_blocks=n, num_heads=8, num_kv_heads=4, hidden=12
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A graph of so many blocks, on a mesh (data, stage, x, y) under a schedule."""

    graph: str
    times: int
    sizes: tuple[int, int, int, int]
    schedule: str = "1f1b"
    microbatches: int = 4
    chunks: int = 1
    keep: Any = "shard"
    layout: str = "auto"
    shard_weights: bool = False

    def __str__(self) -> str:
        of = f"{self.times} {self.graph}, m={self.microbatches}"
        split = ", split weights" if self.shard_weights else ""
        sizes = "x".join(map(str, self.sizes))
        return f"{self.schedule}, {sizes}, {of}, {self.keep}, {self.layout}{split}"

    @property
    def mesh(self) -> Any:
        """The mesh."""
        data, stage, x, y = self.sizes
        return tpmlp.make_mesh(data=data, stage=stage, x=x, y=y)

    @property
    def model(self) -> tpmlp.Graph:
        """The graph."""
        return graph_of(self.graph, self.times)

    @property
    def strategy(self) -> tpmlp.Strategy:
        """The strategy."""
        return tpmlp.Strategy(
            schedule=self.schedule,
            microbatches=self.microbatches,
            chunks=self.chunks,
            keep=self.keep,
            layout=self.layout,
            shard_weights=self.shard_weights,
        )


@cache
def graph_of(name: str, times: int) -> tpmlp.Graph:
    """Return a graph by its name."""
    return GRAPHS[name](times)


@cache
def expected(graph: tpmlp.Graph) -> tuple[np.ndarray, Any, Any]:
    """Return weights of the outputs, the sum of weighted outputs, and jax.grad's gradients."""
    params, samples = numbers(graph)
    inputs: Any = samples
    shape = graph.shapes[graph.output]
    sizes = tuple(n for n in (BATCH, shape.tokens, shape.width) if n is not None)
    w = np.random.default_rng(3).normal(size=sizes)

    def total(params: Any) -> jax.Array:
        words = random_words(KEY)
        return jnp.sum(w * plain.outputs(graph, params, inputs, words=words)[graph.output])

    return w, *jax.jit(jax.value_and_grad(total))(params)


def check_step(case: Case) -> Any:
    """Compare the loss and all gradients of a step with the plain graph's; return the gradients."""
    graph, mesh, strategy = case.model, case.mesh, case.strategy
    params, samples = numbers(graph)
    w, loss, wanted = expected(graph)
    step = tpmlp.value_and_grad(graph, loss=None, mesh=mesh, strategy=strategy)
    placed = tpmlp.from_numpy(graph, params, mesh, strategy=strategy)
    key = {"key": KEY} if graph.dropouts else {}
    got_loss, grads = step(placed, sole(samples), cotangent=w, **key)
    assert abs(got_loss - loss) <= FLOAT64 * np.abs(w).sum()
    got = tpmlp.to_numpy(graph, grads)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        error = np.abs(a - b).max() / (np.abs(b).max() or 1)
        assert error <= FLOAT64, (jax.tree_util.keystr(path), error)
    return grads
