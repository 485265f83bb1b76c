"""Graphs: vertices of any kind, forward in their order and backward in reverse, sharded."""

from tpmlp.graph.graph import Graph
from tpmlp.graph.kinds import (
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
)
from tpmlp.graph.structure import Repeat
from tpmlp.graph.vertex import Vertex

__all__ = [
    "Activation",
    "ActivityL1",
    "Attention",
    "Concatenate",
    "Dense",
    "Dropout",
    "Embedding",
    "Graph",
    "Input",
    "Kind",
    "LayerNorm",
    "Positions",
    "Product",
    "RMSNorm",
    "Repeat",
    "Scale",
    "Shift",
    "Slice",
    "Softmax",
    "Sum",
    "TokenMean",
    "Tokens",
    "Vertex",
]
