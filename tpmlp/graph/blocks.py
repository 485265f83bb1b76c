"""Ready-made graphs, each a few vertices: gated and residual MLPs, transformers, autoencoders.

A block is a graph with one Input that gives the shape it reads: Repeat stacks it.
"""

from tpmlp.checks import check_count
from tpmlp.graph.graph import Graph
from tpmlp.graph.kinds import (
    Activation,
    ActivityL1,
    Attention,
    Dense,
    Dropout,
    Embedding,
    Input,
    Product,
    RMSNorm,
    Sum,
    Tokens,
)
from tpmlp.graph.structure import Repeat
from tpmlp.graph.vertex import Vertex


def gated_mlp_block(width: int, hidden: int, *, tokens: int | None = None) -> Graph:
    """Return x + W_down (silu(W_gate n) * W_up n), n = RMSNorm(x).

    References: Shazeer 2020, GLU variants improve transformer (SwiGLU).

    Examples:
        >>> gated_mlp_block(8, 32).num_parameters
        776
    """
    return Graph([Vertex("x", Input(width, tokens)), *_gated_mlp("x", width, hidden, dropout=0.0)])


def residual_mlp_block(
    width: int, hidden: int, *, activation: str = "gelu", tokens: int | None = None
) -> Graph:
    """Return x + W_2 sigma(W_1 RMSNorm(x) + b_1) + b_2."""
    return Graph(
        [
            Vertex("x", Input(width, tokens)),
            Vertex("norm", RMSNorm(), "x"),
            Vertex("up", Dense(hidden), "norm"),
            Vertex("hidden", Activation(activation), "up"),
            Vertex("down", Dense(width), "hidden"),
            Vertex("out", Sum(), "x", "down"),
        ]
    )


def transformer_block(
    width: int,
    tokens: int,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    hidden: int | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> Graph:
    """Return a pre-norm block: attention over the tokens, then a gated MLP, each beside a sum.

    Args:
        width: features of a token.
        tokens: T.
        num_heads: heads of q.
        num_kv_heads: heads of k and v; num_heads by default.
        hidden: width inside the gated MLP; 4 * width by default.
        causal: whether a token sees only itself and those before it.
        dropout: rate, of what each half adds.
    """
    check_count("num_heads", num_heads)
    kv_width = width // num_heads * (num_kv_heads or num_heads)
    attention = Attention(
        num_heads=num_heads, num_kv_heads=num_kv_heads, causal=causal, rotary=True
    )
    return Graph(
        [
            Vertex("x", Input(width, tokens)),
            Vertex("attended norm", RMSNorm(), "x"),
            Vertex("q", Dense(width, bias=False), "attended norm"),
            Vertex("k", Dense(kv_width, bias=False), "attended norm"),
            Vertex("v", Dense(kv_width, bias=False), "attended norm"),
            Vertex("attention", attention, "q", "k", "v"),
            Vertex("mixed", Dense(width, bias=False), "attention"),
            *_added("attended", "x", "mixed", dropout),
            *_gated_mlp("attended", width, hidden or 4 * width, dropout),
        ]
    )


def language_model(
    vocabulary: int,
    width: int,
    tokens: int,
    *,
    num_blocks: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    hidden: int | None = None,
    dropout: float = 0.0,
) -> Graph:
    """Return a decoder-only language model: logits of the next token at each of them.

    The table of the embedding is that of the logits. Places come in by rotating q and k.

    Args:
        vocabulary: how many ids there are.
        width: features of a token.
        tokens: T.
        num_blocks: transformer blocks.
        num_heads: heads of q.
        num_kv_heads: heads of k and v; num_heads by default.
        hidden: width inside the gated MLPs; 4 * width by default.
        dropout: rate, of what each half of a block adds.

    Examples:
        >>> language_model(50, 32, 16, num_blocks=2, num_heads=8).num_parameters
        34528
    """
    block = transformer_block(
        width,
        tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        hidden=hidden,
        dropout=dropout,
    )
    return Graph(
        [
            Vertex("ids", Tokens(tokens, vocabulary)),
            Vertex("embedding", Embedding(width), "ids"),
            Repeat("blocks", block, "embedding", num_blocks),
            Vertex("norm", RMSNorm(), "blocks"),
            Vertex("logits", Dense(vocabulary, bias=False), "norm", share="embedding"),
        ]
    )


def sparse_autoencoder(width: int, code: int, *, sparsity: float) -> Graph:
    """Return W_2 relu(W_1 x + b_1) + b_2, a wide code whose |h| is added to the objective.

    Args:
        width: features of a sample, and of its reconstruction.
        code: features of the code, more than width.
        sparsity: coefficient of the mean over samples of sum |code|.
    """
    return Graph(
        [
            Vertex("x", Input(width)),
            Vertex("encoder", Dense(code), "x"),
            Vertex("active", Activation("relu"), "encoder"),
            Vertex("code", ActivityL1(sparsity), "active"),
            Vertex("decoder", Dense(width), "code"),
        ]
    )


def _gated_mlp(x: str, width: int, hidden: int, dropout: float) -> list[Vertex]:
    return [
        Vertex("gated norm", RMSNorm(), x),
        Vertex("gate", Dense(hidden, bias=False), "gated norm"),
        Vertex("up", Dense(hidden, bias=False), "gated norm"),
        Vertex("open", Activation("silu"), "gate"),
        Vertex("gated", Product(), "open", "up"),
        Vertex("down", Dense(width, bias=False), "gated"),
        *_added("out", x, "down", dropout),
    ]


def _added(name: str, x: str, branch: str, dropout: float) -> list[Vertex]:
    """Return the sum of x and a branch, of which some is dropped."""
    if not dropout:
        return [Vertex(name, Sum(), x, branch)]
    kept = Vertex(f"{branch} kept", Dropout(dropout), branch)
    return [kept, Vertex(name, Sum(), x, kept.name)]
