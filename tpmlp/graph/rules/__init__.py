"""The rules of all kinds of vertices, forward and backward side by side."""

from tpmlp.graph import kinds
from tpmlp.graph.placement import Gather, Turn, Whole
from tpmlp.graph.rules import attention, dense, elementwise, features, norms, tokens
from tpmlp.graph.rules.rule import Given, Gradients, Reader, Rule

__all__ = ["RULES", "Given", "Gradients", "Reader", "Rule"]

RULES: dict[type, Rule] = {
    Gather: dense.GATHER,
    kinds.Dense: dense.DENSE,
    kinds.Activation: elementwise.ACTIVATION,
    kinds.Sum: elementwise.SUM,
    kinds.Product: elementwise.PRODUCT,
    kinds.Scale: elementwise.SCALE,
    kinds.Shift: elementwise.SHIFT,
    kinds.Dropout: elementwise.DROPOUT,
    kinds.ActivityL1: elementwise.ACTIVITY_L1,
    kinds.RMSNorm: norms.RMS_NORM,
    kinds.LayerNorm: norms.LAYER_NORM,
    kinds.Softmax: norms.SOFTMAX,
    kinds.Attention: attention.ATTENTION,
    kinds.Embedding: tokens.EMBEDDING,
    kinds.Positions: tokens.POSITIONS,
    kinds.TokenMean: tokens.TOKEN_MEAN,
    Turn: features.TURN,
    Whole: features.WHOLE,
    kinds.Concatenate: features.CONCATENATE,
    kinds.Slice: features.SLICE,
    kinds.Function: features.FUNCTION,
}
