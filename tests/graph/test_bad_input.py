"""What a user may get wrong with a graph: one error that names the vertex, before any compiling."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tpmlp.graph import (
    Activation,
    ActivityL1,
    Attention,
    Dense,
    Dropout,
    Embedding,
    Input,
    Product,
    Repeat,
    RMSNorm,
    Slice,
    Sum,
    TokenMean,
    Tokens,
    Vertex,
    transformer_block,
)

X, TEXT, IDS = Vertex("x", Input(8)), Vertex("x", Input(8, tokens=4)), Vertex("x", Tokens(4, 10))


DENSE: Any = "dense"
GRAPH: Any = tpmlp.Graph([Vertex("x", Input(8)), Vertex("a", Dense(3), "x")])


def graph(*vertices: Any, **more: Any) -> tpmlp.Graph:
    return tpmlp.Graph(vertices, **more)


def function(function: Callable[..., Any], **more: Any) -> tpmlp.Graph:
    return graph(X, Vertex.from_function("odd", function, "x", **more))


def attention(**settings: Any) -> tpmlp.Graph:
    return graph(TEXT, Vertex("seen", Attention(**settings), "x", "x", "x"))


def given(value: Any) -> Any:
    """Return what a type checker would refuse."""
    return value


def fails_silently(h: jax.Array) -> jax.Array:
    raise RuntimeError


class Unhashable(list[Any]):
    def __call__(self, h: jax.Array) -> jax.Array:
        return h


BLOCK_OF_8 = graph(X, Vertex("norm", RMSNorm(), "x"), Vertex("out", Sum(), "x", "norm"))
LANGUAGE = graph(IDS, Vertex("e", Embedding(8), "x"), Vertex("z", Dense(10), "e"))


# What is wrong: (how to do it, what the error must say).
BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "cycle": (
        lambda: graph(
            X, Vertex("a", Sum(), "x", "c"), Vertex("b", Dense(8), "a"), Vertex("c", Sum(), "b")
        ),
        ("cycle", "a <- c <- b <- a"),
    ),
    "missing": (lambda: graph(X, Vertex("a", Dense(3), "y")), ('"a"', '"y"', "there are x, a")),
    "doubled": (
        lambda: graph(X, Vertex("a", Dense(3), "x"), Vertex("a", Dense(4), "x")),
        ('"a"', "2 times"),
    ),
    "unneeded": (
        lambda: graph(X, Vertex("a", Dense(3), "x"), Vertex("b", Dense(3), "x"), output="a"),
        ('"b"', 'output="a"'),
    ),
    "two outputs": (
        lambda: graph(X, Vertex("a", Dense(3), "x"), Vertex("b", Dense(3), "x")),
        ("2 vertices that nobody reads", "a, b"),
    ),
    "no such output": (lambda: graph(X, Vertex("a", Dense(3), "x"), output="c"), ('"c"',)),
    "widths": (
        lambda: graph(X, Vertex("a", Dense(3), "x"), Vertex("sum", Sum(), "x", "a")),
        ('"sum"', "[B, 8]", "[B, 3]"),
    ),
    "tokens and none": (
        lambda: graph(TEXT, Vertex("a", TokenMean(), "x"), Vertex("product", Product(), "x", "a")),
        ('"product"', "[B, 4, 8]", "[B, 8]"),
    ),
    "slice": (lambda: graph(X, Vertex("cut", Slice(2, 9), "x")), ('"cut"', "stop=9", "[B, 8]")),
    "mean of a vector": (lambda: graph(X, Vertex("mean", TokenMean(), "x")), ('"mean"', "[B, 8]")),
    "ids": (lambda: graph(IDS, Vertex("a", Dense(3), "x")), ('"a"', "[B, 4] ids", "Embedding")),
    "no ids": (lambda: graph(X, Vertex("e", Embedding(3), "x")), ('"e"', "[B, 8]", "Tokens")),
    "heads": (lambda: attention(num_heads=3), ('"seen"', "3 heads", "[B, 4, 8]")),
    "groups": (lambda: attention(num_heads=8, num_kv_heads=3), ("num_kv_heads=3", "num_heads=8")),
    "narrow k": (
        lambda: attention(num_heads=4, num_kv_heads=2),
        ('"seen"', "k and v of width 4", "[B, 4, 8]"),
    ),
    "odd heads": (lambda: attention(num_heads=8, rotary=True), ('"seen"', "even width", "1 of q")),
    "number of inputs": (
        lambda: Vertex("a", Dense(3), "x", "y"),
        ('"a"', "1 inputs", "Dense(3)", "got 2"),
    ),
    "no inputs": (lambda: Vertex("a", Sum()), ('"a"', "got none")),
    "kind": (lambda: Vertex("a", DENSE, "x"), ('"a"', "kind='dense'")),
    "share": (
        lambda: graph(
            X,
            Vertex("a", Dense(3), "x"),
            Vertex("b", Dense(4), "x", share="a"),
            Vertex("c", Dense(4), "a"),
            Vertex("d", Sum(), "b", "c"),
        ),
        ('"b"', '"a"', "(4, 8)", "(3, 8)"),
    ),
    "share of none": (
        lambda: graph(X, Vertex("a", Dense(8), "x", share="x")),
        ('"a"', "{'W': (8, 8), 'b': (8,)} and {}"),
    ),
    "function of fewer samples": (
        lambda: function(lambda x: x[:1]),
        ('"odd"', "keep the batch", "(1, 8)"),
    ),
    "function of the batch": (
        lambda: function(lambda x: x.T),
        ('"odd"', "keep the batch", "(8, 2)"),
    ),
    "function without an array": (
        lambda: function(lambda x: (x, x)),
        ('"odd"', "one array of floats"),
    ),
    "function of integers": (
        lambda: function(lambda x: x.astype(jnp.int32)),
        ('"odd"', "one array of floats"),
    ),
    "function that fails": (lambda: function(lambda x: x @ x), ('"odd"', "(2, 8)", "TypeError")),
    "local function of another width": (
        lambda: function(lambda x: x[:, :3], of="local"),
        ('"odd"', "[B, 3]", "of='gathered'"),
    ),
    "rate": (lambda: Dropout(1.0), ("rate=1.0", "[0, 1)")),
    "activation": (lambda: Activation("cube"), ("activation='cube'",)),
    "repeated shape": (
        lambda: graph(X, Repeat("deep", graph(X, Vertex("a", Dense(3), "x")), "x", 2)),
        ('"deep"', "[B, 8]", "[B, 3]"),
    ),
    "repeated name": (
        lambda: graph(
            X,
            Vertex("deep", Dense(8), "x"),
            Repeat("deep", graph(X, Vertex("a", Dense(8), "x")), "x", 2),
        ),
        ('"deep"', "twice"),
    ),
}


@pytest.mark.parametrize("wrong", BAD)
def test_a_mistake_is_one_error_that_names_the_vertex(wrong):
    make, said = BAD[wrong]
    with pytest.raises(ValueError, match="must") as raised:
        make()
    for words in said:
        assert words in str(raised.value)


MODEL = graph(
    Vertex("ids", Tokens(4, 10)),
    Vertex("embedding", Embedding(8), "ids"),
    Vertex("drop", Dropout(0.1), "embedding"),
    Vertex("logits", Dense(10), "drop"),
)
ROWS = np.zeros((2, 4), int)


def stepped(x: Any = ROWS, y: Any = ROWS, **more: Any) -> Any:
    mesh = tpmlp.make_mesh(x=2)
    params = MODEL.init(jax.random.key(0), mesh)
    step = tpmlp.value_and_grad(MODEL, loss="cross_entropy", mesh=mesh)
    return step(params, x, y, **{"key": jax.random.key(1), **more})


def placed(strategy: tpmlp.Strategy) -> Any:
    return MODEL.place(tpmlp.make_mesh(x=2), strategy)


USED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "no key": (lambda: stepped(key=None), ('"drop"', "key=None")),
    "a number for a key": (lambda: stepped(key=3), ("key=3", "jax.random.key(3)")),
    "id": (lambda: stepped(x=ROWS + 10), ("0 .. 9", "got 10", "row 0, token 0")),
    "negative id": (lambda: stepped(x=ROWS - 1), ("got -1",)),
    "floats for ids": (lambda: stepped(x=ROWS + 0.5), ("x must be integers",)),
    "tokens": (lambda: stepped(x=ROWS[:, :3]), ("T=4", "(2, 3)")),
    "targets": (lambda: stepped(y=ROWS[:, 0]), ("[B, T, ..]", "T=4", "(2,)")),
    "label": (lambda: stepped(y=ROWS + 10), ("10",)),
    "weight": (lambda: stepped(weight=np.ones((2, 3))), ("[B] or [B, T]", "(2, 3)")),
    "ring": (lambda: placed(strategy=tpmlp.Strategy(overlap="ring")), ("overlap='ring'",)),
    "invariant": (
        lambda: placed(strategy=tpmlp.Strategy(reduction="invariant")),
        ("reduction='invariant'", "Graph"),
    ),
    "words": (
        lambda: placed(strategy=tpmlp.Strategy(layout=("row",) * 3)),
        ("3 words", "embedding, logits"),
    ),
    "padding behind heads": (
        lambda: attention(num_heads=4).place(
            tpmlp.make_mesh(data=3, x=2), tpmlp.Strategy(shard_weights=True)
        ),
        ('"seen"', "6 blocks", 'width=8 of "x"', "data=3", "shard_weights"),
    ),
    "heads on a mesh": (
        lambda: attention(num_heads=4).place(tpmlp.make_mesh(x=3)),
        ('"seen"', "num_heads=4", "x=3", "multiple of 3"),
    ),
    "params": (
        lambda: tpmlp.to_numpy(MODEL, {"embedding": {}}),
        ('"embedding"', "['W']", "got []"),
    ),
    "layers": (lambda: tpmlp.to_numpy(MODEL, ((1, 2),)), ("{vertex: {parameter: array}}", "tuple")),
    "sources": (
        lambda: tpmlp.shard_batch(
            graph(X, Vertex("y", Input(8)), Vertex("sum", Sum(), "x", "y")),
            {"x": np.ones((2, 8))},
            mesh=tpmlp.make_mesh(x=2),
        ),
        ("['x', 'y']", "got ['x']"),
    ),
    "a repeated block of another width": (
        lambda: tpmlp.Graph([Vertex("q", Input(7)), Repeat("r", BLOCK_OF_8, "q", 2)]),
        ('"r"', "[B, 7]", '"q"', "[B, 8]"),
    ),
    "a repeated block of another rank": (
        lambda: tpmlp.Graph([Vertex("q", Input(8, tokens=3)), Repeat("r", BLOCK_OF_8, "q", 2)]),
        ('"r"', "[B, 3, 8]", "[B, 8]"),
    ),
    "a repeated block that reads nothing": (
        lambda: tpmlp.Graph([Vertex("q", Input(8)), Repeat("r", BLOCK_OF_8, "p", 2)]),
        ('"r"', '"p"'),
    ),
    "two repeated blocks of one name": (
        lambda: tpmlp.Graph(
            [Vertex("q", Input(8)), *(Repeat("r", BLOCK_OF_8, name, 2) for name in ("q", "r"))]
        ),
        ('"r"', "twice"),
    ),
    "a repeated list": (
        lambda: Repeat("r", given([Vertex("q", Input(8))]), "q", 2),
        ('"r"', "must be a Graph", "Vertex"),
    ),
    "a function that returns one number": (
        lambda: function(lambda x: x.sum()),
        ('vertex "odd"', "keep the batch", "()"),
    ),
    "a function that returns a Python number": (
        lambda: function(lambda x: 3.0),
        ('vertex "odd"', "keep the batch", "()"),
    ),
    "a function that fails without a word": (
        lambda: function(fails_silently),
        ('vertex "odd"', "RuntimeError"),
    ),
    "a function that has no hash": (
        lambda: function(Unhashable()),
        ('vertex "odd"', "must be hashable", "__hash__"),
    ),
    "an activation for a bias": (lambda: Dense(3, given("relu")), ("bias='relu'", "True or False")),
    "a word for causal": (
        lambda: Attention(num_heads=2, causal=given("yes")),
        ("causal='yes'", "True or False"),
    ),
    "a word for a coefficient": (lambda: ActivityL1(given("a")), ("coefficient", "'a'")),
    "no heads": (
        lambda: transformer_block(10, 4, num_heads=0),
        ("num_heads=0", "positive"),
    ),
    "no list": (lambda: tpmlp.Graph(given(5)), ("vertices", "5")),
    "no vertices": (lambda: tpmlp.Graph([]), ("at least one", "none")),
    "an output that is not there": (
        lambda: tpmlp.Graph([Vertex("q", Input(8))], output="p"),
        ('output="p"', "such as q"),
    ),
    "a vertex that is not there": (lambda: GRAPH["nope"], ("name='nope'",)),
    "a share that is no name": (
        lambda: Vertex("a", Dense(3), "x", share=given(3)),
        ('vertex "a"', "share=3"),
    ),
    "weights of tokens that are negative": (
        lambda: tpmlp.shard_batch(
            LANGUAGE,
            np.zeros((4, 4), int),
            np.zeros((4, 4), int),
            mesh=tpmlp.make_mesh(x=1),
            weight=-np.ones((4, 4)),
            loss="cross_entropy",
        ),
        ("weight=-1", "row 0"),
    ),
    "a file": (
        lambda: tpmlp.save_npz(given(GRAPH), given({}), "a.npz"),
        ("tpmlp.MLP for save_npz", "Graph"),
    ),
    "a hash": (
        lambda: tpmlp.parameter_hash(given(GRAPH), given({})),
        ("tpmlp.MLP for parameter_hash", "Graph"),
    ),
    "stages": (
        lambda: tpmlp.value_and_grad(GRAPH, loss="output", mesh=tpmlp.make_mesh(stage=2)),
        ("one Repeat", "mesh with stages", "none", "Repeat(name, block", "stage=1"),
    ),
}


@pytest.mark.parametrize("wrong", USED)
def test_a_graph_that_is_used_wrongly_says_what_to_do(wrong):
    use, said = USED[wrong]
    with pytest.raises(ValueError, match="must") as raised:
        use()
    for words in said:
        assert words in str(raised.value)
