"""What a step of a chain holds at least, without packing its buffers as tpmlp.kernels.memory does.

Buffers that are alive in one operation need room for all of them, but for what lies in results that
are not made yet. Two operations decide:

    the last       dW_1 = g_1 h_1^T, when all other results are there: g, h, and dW to be summed
    forward        a layer's product: all that is kept of the layers before, its input and, where
                   data splits it, W; in results as far as these have room

Sums over microbatches are there from the first operation on, results or not.
"""

from tpmlp.kernels.backprop import is_kept
from tpmlp.kernels.cost import LayerShape, Types
from tpmlp.strategy import Strategy


def least_temp_bytes(shapes: list[LayerShape], types: Types, strategy: Strategy) -> int:
    """Return a lower bound of tpmlp.predict.step_temp_bytes.

    Args:
        shapes: the layers, of one microbatch.
        types: bytes of an element.
        strategy: what is kept.
    """
    forward = _forward_bytes(shapes, types, strategy)
    last = _last_bytes(shapes[0], types)
    if types.microbatches == 1:
        return max(last, forward - sum(_dW_words(shape, types) for shape in shapes) * types.param)
    sums = sum(_dW_words(shape, types) for shape in shapes) * types.accumulate
    in_results = types.splits_data or shapes[0].size("d") == 1
    if in_results and types.accumulate == types.param:
        return max(last, forward)
    return sums + max(0, forward - sum(shape.W for shape in shapes) * types.param)


def _forward_bytes(shapes: list[LayerShape], types: Types, strategy: Strategy) -> int:
    """Return the most that any layer's product and what is kept before it take."""
    kept = highest = 0
    gathers = strategy.keep == "gathered"
    for shape in shapes:
        h = shape.h * types.compute if shape.size("g") > 1 else 0
        W = shape.W * types.compute if types.splits_data else 0
        highest = max(highest, kept + h + W)
        if is_kept(shape.layer, len(shapes), strategy):
            kept += shape.output * min(types.compute, types.hop)
        kept += h if gathers else 0
    return highest


def _last_bytes(first: LayerShape, types: Types) -> int:
    """Return what dW_1 is a product of, and dW_1 where it is no result yet but summed after.

    The sum is then a result that the factors, used no more, may have lain in.
    """
    factors = (first.z + first.h) * types.compute
    if types.microbatches > 1:
        return factors + first.W * types.total
    if first.size("d") == 1:
        return factors
    room = _dW_words(first, types) * types.param
    return first.W * types.total + max(0, factors - room)


def _dW_words(shape: LayerShape, types: Types) -> int:
    return shape.W // shape.size("d") if types.splits_data else shape.W
