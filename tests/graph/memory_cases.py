"""Training steps whose temporaries are arrays of a batch, of every kind that graphs are made of."""

from typing import Any, NamedTuple

import tpmlp
from tests.cases import mesh_of
from tpmlp.graph import (
    Activation,
    Concatenate,
    Dense,
    Dropout,
    Input,
    LayerNorm,
    Positions,
    Product,
    Slice,
    Softmax,
    Sum,
    TokenMean,
    Vertex,
)
from tpmlp.graph.blocks import (
    gated_mlp_block,
    language_model,
    residual_mlp_block,
    sparse_autoencoder,
    transformer_block,
)
from tpmlp.graph.structure import Repeat
from tpmlp.inspection.audit import Audit


class Step(NamedTuple):
    """A training step.

    Attributes:
        graph: name of the graph.
        sizes: of the mesh: data, x, y.
        batch_size: its samples.
        strategy: fields that are not as they are by default.
        dtype: of the parameters.
    """

    graph: str
    sizes: tuple[int, int, int]
    batch_size: int
    strategy: dict[str, Any] | None = None
    dtype: str = "float32"


def stack(block: tpmlp.Graph, times: int) -> tpmlp.Graph:
    (source,) = block.sources
    return tpmlp.Graph([source, Repeat("blocks", block, source.name, times)])


def long_skips(width: int, times: int) -> tpmlp.Graph:
    """Return a graph in which each sum reads all before it."""
    vertices, sums = [Vertex("x", Input(width)), Vertex("in", Dense(width), "x")], ["in"]
    for i in range(times):
        vertices += [
            Vertex(f"h{i}", Activation("gelu"), sums[-1]),
            Vertex(f"z{i}", Dense(width), f"h{i}"),
            Vertex(f"s{i}", Sum(), *sums, f"z{i}"),
        ]
        sums.append(f"s{i}")
    return tpmlp.Graph(vertices)


def concatenations(width: int, times: int) -> tpmlp.Graph:
    """Return a graph in which each layer reads the features of all before it."""
    vertices, read = [Vertex("x", Input(width))], ["x"]
    for i in range(times):
        vertices += [Vertex(f"c{i}", Concatenate(), *read)] if i else []
        vertices += [
            Vertex(f"z{i}", Dense(width), f"c{i}" if i else "x"),
            Vertex(f"h{i}", Activation("relu"), f"z{i}"),
        ]
        read.append(f"h{i}")
    return tpmlp.Graph(vertices)


def dropped_block(width: int, hidden: int) -> tpmlp.Graph:
    return tpmlp.Graph(
        [
            Vertex("x", Input(width)),
            Vertex("norm", LayerNorm(), "x"),
            Vertex("up", Dense(hidden), "norm"),
            Vertex("hidden", Activation("tanh"), "up"),
            Vertex("dropped", Dropout(0.1), "hidden"),
            Vertex("down", Dense(width), "dropped"),
            Vertex("out", Sum(), "x", "down"),
        ]
    )


def halves(width: int, hidden: int) -> tpmlp.Graph:
    """Return a gated layer whose halves are slices of one product."""
    return tpmlp.Graph(
        [
            Vertex("x", Input(width)),
            Vertex("both", Dense(2 * hidden), "x"),
            Vertex("gate", Slice(0, hidden), "both"),
            Vertex("up", Slice(hidden, 2 * hidden), "both"),
            Vertex("open", Activation("silu"), "gate"),
            Vertex("gated", Product(), "open", "up"),
            Vertex("down", Dense(width), "gated"),
        ]
    )


def encoder(width: int, tokens: int, num_heads: int) -> tpmlp.Graph:
    block = transformer_block(width, tokens, num_heads=num_heads, causal=False)
    return tpmlp.Graph(
        [
            Vertex("x", Input(64, tokens)),
            Vertex("embedding", Dense(width), "x"),
            Vertex("places", Positions(), "embedding"),
            Repeat("blocks", block, "places", 2),
            Vertex("norm", LayerNorm(), "blocks"),
            Vertex("mean", TokenMean(), "norm"),
            Vertex("logits", Dense(64), "mean"),
        ]
    )


def softmax_layer(width: int, hidden: int) -> tpmlp.Graph:
    return tpmlp.Graph(
        [
            Vertex("x", Input(width)),
            Vertex("z", Dense(hidden), "x"),
            Vertex("p", Softmax(), "z"),
            Vertex("out", Dense(width), "p"),
        ]
    )


GRAPHS = {
    "language": language_model(512, 128, 64, num_blocks=2, num_heads=8),
    "few k and v": language_model(512, 128, 64, num_blocks=1, num_heads=8, num_kv_heads=2),
    "many heads": language_model(512, 128, 128, num_blocks=1, num_heads=32),
    "vocabulary": language_model(8192, 128, 64, num_blocks=1, num_heads=8),
    "encoder": encoder(128, 64, 8),
    "gated": stack(gated_mlp_block(256, 768), 4),
    "residual": stack(residual_mlp_block(256, 1024), 4),
    "dropout": stack(dropped_block(256, 1024), 3),
    "autoencoder": sparse_autoencoder(256, 2048, sparsity=0.1),
    "skips": long_skips(256, 8),
    "concatenations": concatenations(256, 4),
    "halves": halves(256, 512),
    "softmax": softmax_layer(256, 1024),
}
LABELS = ("language", "few k and v", "many heads", "vocabulary")

SPLIT = {"shard_weights": True}
BFLOAT16 = {"compute_dtype": "bfloat16"}
# In the suite.
STEPS = (
    Step("language", (1, 2, 2), 32, {"keep": "recompute"}),
    Step("language", (2, 4, 1), 64, {"microbatches": 2, **SPLIT}),
    Step("few k and v", (1, 8, 1), 32, BFLOAT16),
    Step("many heads", (1, 4, 1), 16),
    Step("residual", (1, 1, 1), 2048),
    Step("autoencoder", (2, 2, 2), 2048),
    Step("skips", (2, 4, 1), 4096),
    Step("dropout", (1, 4, 1), 2048, {"keep": "recompute"}),
    Step("concatenations", (1, 2, 2), 2048),
)
# In `make test-all` too.
MORE_STEPS = (
    Step("language", (1, 4, 1), 32),
    Step("gated", (1, 4, 1), 2048, {"keep": "gathered"}),
    Step("residual", (2, 2, 2), 4096, BFLOAT16),
    Step("language", (1, 1, 1), 32),
    Step("language", (1, 4, 2), 64),
    Step("language", (8, 1, 1), 64),
    Step("language", (1, 4, 1), 32, {"keep": "gathered"}),
    Step("language", (1, 4, 1), 32, {"keep": "recompute"}),
    Step("language", (1, 4, 1), 32, BFLOAT16),
    Step("language", (2, 2, 2), 32, BFLOAT16),
    Step("language", (2, 4, 1), 16, SPLIT),
    Step("language", (8, 1, 1), 32, SPLIT),
    Step("language", (1, 4, 1), 64, {"microbatches": 4}),
    Step("few k and v", (1, 8, 1), 32),
    Step("vocabulary", (1, 4, 1), 32),
    Step("vocabulary", (2, 4, 1), 32, SPLIT),
    Step("encoder", (1, 4, 1), 32),
    Step("encoder", (1, 2, 2), 32),
    Step("gated", (1, 4, 1), 2048),
    Step("gated", (1, 2, 2), 2048),
    Step("gated", (2, 4, 1), 2048, {"keep": "recompute"}),
    Step("gated", (2, 4, 1), 64, SPLIT),
    Step("gated", (1, 4, 1), 2048, BFLOAT16),
    Step("residual", (1, 8, 1), 2048),
    Step("residual", (1, 2, 2), 2048),
    Step("residual", (1, 4, 1), 2048, {"layout": "alternate"}),
    Step("residual", (1, 4, 1), 8192, {"microbatches": 4}),
    Step("residual", (1, 4, 1), 2048, None, "bfloat16"),
    Step("residual", (1, 4, 1), 32),
    Step("autoencoder", (1, 4, 1), 1024),
    Step("skips", (1, 4, 1), 2048),
    Step("skips", (1, 2, 2), 2048),
    Step("skips", (1, 8, 1), 2048, {"keep": "gathered"}),
    Step("skips", (8, 1, 1), 1024),
    Step("dropout", (1, 4, 1), 2048),
    Step("dropout", (1, 2, 2), 2048),
    Step("concatenations", (1, 4, 1), 2048),
    Step("halves", (1, 4, 1), 2048),
    Step("softmax", (1, 4, 1), 2048),
    Step("softmax", (1, 1, 1), 2048),
)


def name_of_step(step: Step) -> str:
    said = [f"{name}={value}" for name, value in (step.strategy or {}).items()]
    return "-".join([step.graph, "x".join(map(str, step.sizes)), *said, step.dtype])


def compiled_and_predicted(step: Step) -> tuple[Audit, int | None]:
    """Return the audit of a step, and its temporaries as predicted by the summary."""
    graph, mesh = GRAPHS[step.graph], mesh_of(step.sizes)
    loss = "cross_entropy" if step.graph in LABELS else "mse"
    where: Any = {"mesh": mesh, "strategy": tpmlp.Strategy(**step.strategy or {})}
    program = tpmlp.value_and_grad(graph, loss=loss, **where)
    told = graph.summary(batch_size=step.batch_size, loss=loss, dtype=step.dtype, **where)
    compiled = program.compile(step.batch_size, dtype=step.dtype)
    return tpmlp.audit(compiled), told.temp_bytes
