"""What each kind of vertex writes, forward and backward: two tables, at the end.

The buffers are those of the rules (tpmlp.graph.rules) as XLA's CPU compiler makes them. A kind that
is not in a table is elementwise, and writes nothing of its own.
"""

from collections.abc import Callable

from tpmlp.graph import kinds
from tpmlp.graph.arrays import Array, Arrays, is_whole, sources_of
from tpmlp.graph.placement import GATHER, Gather, Node, Turn, Whole
from tpmlp.kernels.memory import Buffer
from tpmlp.losses import Loss

# Activations that are computed again for each reader; others are written once where several read.
CHEAP = ("relu", "identity")
# Rows of one number a token that a kind keeps beside what it reads.
ROWS: dict[type, int] = {kinds.RMSNorm: 1, kinds.LayerNorm: 2, kinds.Softmax: 2}


def elementwise(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Return what its readers compute."""
    return arrays.computed(node, *inputs)


def activation(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Return sigma(z), written where it is costly and several read it."""
    array = arrays.computed(node, *inputs)
    if node.kind.sigma.name not in CHEAP and arrays.readers[node.name] > 1:
        array.sources = (arrays.write(array, arrays.types.compute),)
    return array


def norm(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Tell the rows, from which and from h the readers compute r."""
    array = arrays.computed(node, *inputs)
    if node.name not in arrays.rows:
        rows = ROWS[type(node.kind)] * arrays.columns(node)
        made = arrays.make(f"rows of {node.name}", rows, arrays.types.total, *array.sources)
        arrays.rows[node.name] = (made,)
    array.sources = (*array.sources, *arrays.rows[node.name])
    return array


def dropout(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Tell the random bits, from which and from h the readers compute r."""
    array = arrays.computed(node, *inputs)
    array.sources = (*array.sources, *_bits(arrays, node, inputs[0]))
    return array


def total(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Tell a sum or a mean over tokens, which is settled."""
    made = arrays.make(node.name, arrays.elements(node), arrays.types.total, *sources_of(*inputs))
    return arrays.rounded(node, made)


def dense(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Tell z = W h."""
    h = arrays.write(inputs[0], arrays.operand)
    W = arrays.weight(node.owner, h)
    z = arrays.summed(node.name, arrays.elements(node), arrays.size(node, "s"), h, *W)
    return arrays.rounded(node, z)


def embedding(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Tell the rows of W that are looked up."""
    share, devices, types = arrays.elements(node), arrays.size(node, "g"), arrays.types
    W = arrays.weight(node.owner, None, converts=False)
    part = arrays.make(f"{node.name} part", share * devices, types.compute, *W)
    if devices == 1:
        return arrays.written(node, part)
    item_bytes = 4 if arrays.on_cpu and types.compute == 2 else types.compute
    return arrays.rounded(node, arrays.make(node.name, share, item_bytes, part))


def gather(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Tell h made whole."""
    (h,) = inputs
    again = Array(h.name, h.elements, h.sources, h.buffer)  # gathered anew, whatever was before
    roles = "g" if node.kind is GATHER else "sg"
    return arrays.written(node, arrays.gathered(again, node, roles, arrays.elements(node)))


def turn(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Tell h in the other orientation."""
    part, types = arrays.write(inputs[0], arrays.types.total), arrays.types
    made = arrays.make(node.name, arrays.elements(node), types.total, part)
    return arrays.written(node, made)


def concatenate(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Tell all features, and a device's block of them."""
    types = arrays.types
    whole = arrays.make(f"{node.name} whole", arrays.whole(node), types.total, *sources_of(*inputs))
    return arrays.rounded(node, arrays.make(node.name, arrays.elements(node), types.total, whole))


def attention(arrays: Arrays, node: Node, inputs: list[Array]) -> Array:
    """Tell s, p and r by heads, as copies of q, k and v are; who reads r joins them."""
    types, size = arrays.types, _scores(arrays, node)
    q, k, v = _heads(arrays, node, inputs)
    p = arrays.make("p as read", size, types.compute, _weights(arrays, node, q, k))
    r = arrays.make(node.name, arrays.elements(node), types.total, p, v)
    return arrays.computed(node, arrays.rounded(node, r))


def elementwise_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Return gradients that their readers compute from g and what the node read."""
    needed = [g, *arrays.read(node)]
    return [arrays.computed(source, *needed) for source in arrays.inputs(node)]


def passed_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Return g to every input."""
    return [g] * len(node.inputs)


def dropout_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Tell the bits again, from which and from g the readers compute dh."""
    return [Array(g.name, g.elements, (*g.sources, *_bits(arrays, node, g)))]


def norm_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Tell n and dn, whose sums are taken over the features before dh is computed from them."""
    (h,) = arrays.read(node)
    elements, item_bytes, rows = g.elements, arrays.types.total, arrays.rows[node.name]
    n = arrays.make("n", elements, item_bytes, *h.sources, *rows)
    dn = arrays.make("dn", elements, item_bytes, *g.sources)
    return [Array(f"g of {node.inputs[0]}", elements, (n, dn, *rows))]


def dense_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Tell dh = W^T g; dW waits, unless what it needs is there."""
    (source,) = arrays.inputs(node)
    g_all = arrays.gathered(g, node, "s", arrays.elements(node) * arrays.size(node, "s"))
    if is_whole(source) and source.name in arrays.values:
        arrays.add(node.owner, g_all, arrays.write(arrays.value(source), arrays.operand))
    else:
        arrays.later.append((node, g_all))
    if source.name not in arrays.trained:
        return [g]
    W = arrays.weight(node.owner, g_all, converts=not arrays.on_cpu)
    if arrays.on_cpu:
        words = arrays.words(node.owner)
        W = [arrays.make("W transposed", words, arrays.operand, g_all, *W)]
    item_bytes = arrays.types.reduce if is_whole(source) else arrays.types.total
    dh = arrays.make(f"dh of {node.name}", arrays.elements(source), item_bytes, g_all, *W)
    return [arrays.written(source, dh)]


def embedding_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Tell g as rows, which are added up in dW."""
    elements = arrays.elements(node) * arrays.size(node, "g")
    g_all = arrays.gathered(g, node, "g", elements)
    arrays.add(node.owner, arrays.make("g as rows", elements, arrays.types.total, g_all))
    return [g]  # of ids: not wanted


def gather_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Tell the sum of the parts of dh where h is."""
    (source,) = arrays.inputs(node)
    part, reduce = arrays.write(g, arrays.types.reduce), arrays.types.reduce
    dh = arrays.make(f"g of {source.name}", arrays.elements(source), reduce, part)
    return [arrays.written(source, dh)]


def turn_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Tell g in the other orientation, once for all that turn it."""
    (source,), axes, total = arrays.inputs(node), ("turned", node.axes["g"]), arrays.types.total
    if axes not in g.moved:
        g.moved[axes] = arrays.make("g turned", g.elements, total, arrays.write(g, total))
    return [arrays.written(source, g.moved[axes])]


def concatenate_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Tell a device's block of g among zeros, and of these the part of each input."""
    whole = arrays.whole(node)
    placed = arrays.make(f"{g.name} placed", whole, arrays.types.total, *g.sources)
    array = Array(g.name, whole, (placed,), placed)
    return [
        arrays.settled(source, array) if source.name in arrays.trained else g
        for source in arrays.inputs(node)
    ]


def attention_back(arrays: Arrays, node: Node, g: Array) -> list[Array]:
    """Tell dv = p^T g, dp = g v^T, ds = p * (dp - sum of dp * p), dq = ds k, dk = ds^T q."""
    make, types, size = arrays.make, arrays.types, _scores(arrays, node)
    q, k, v = _heads(arrays, node, arrays.read(node))
    queries, keys = g.elements, k.bytes // types.compute
    g_heads = make("g by heads", queries, types.compute, *g.sources)
    s_operands = q, make("k as read", keys, types.compute, k)
    dp = make("dp as made", size, types.total, g_heads, v)
    dp = make("dp", size, types.total, dp)
    p = _weights(arrays, node, *s_operands)
    ds = make("ds", size, types.total, p, dp)
    dv = make("dv", keys, types.total, p, g_heads)
    for_q, for_k = (make(f"ds for {name}", size, types.compute, ds) for name in "qk")
    dq = make("dq", queries, types.total, for_q, k)
    dk = make("dk", keys, types.total, for_k, q)
    if node.kind.rotary:
        dq = make("dq turned", queries, types.total, dq)
        dk = make("dk turned", keys, types.total, dk)
    grads = zip(arrays.inputs(node), (dq, dk, dv), strict=True)
    return [Array(f"g of {i.name}", arrays.elements(i), (grad,)) for i, grad in grads]


def output_gradient(arrays: Arrays, output: Array, loss: Loss | None) -> Array:
    """Tell the loss; return g of the output."""
    item_bytes, elements = arrays.types.param, output.elements
    z = arrays.write(output, item_bytes)
    if loss is None or loss.targets != "labels":
        return Array("g", elements, (arrays.make("z - y", elements, item_bytes, z),))
    # exp(z) stays for g; of the terms summed beside it the last is written where z was.
    exp = arrays.make("exp(z)", elements, item_bytes, z)
    before = arrays.make("rows before y", elements, item_bytes, z)
    arrays.make("z at y", 0, item_bytes, exp, before, z)
    return Array("g", elements, (exp,))


def _bits(arrays: Arrays, node: Node, like: Array) -> tuple[Buffer, ...]:
    """Tell random words of 32 bits, which a loop draws in pairs; one of each is used."""
    if not node.kind.rate:
        return ()
    counters = arrays.make("counters", 2 * like.elements, 4, *like.sources)
    bits = arrays.make("bits", like.elements, 4, counters)
    unused = arrays.make("bits not used", like.elements, 4, counters)
    bits.last = unused.made
    return (bits,)


def _heads(arrays: Arrays, node: Node, inputs: list[Array]) -> list[Buffer]:
    """Tell this device's q, k and v by heads; of whole k and v those that q looks at."""
    splits = node.kind.splits_kv(node.num_tensor_devices)
    return [
        arrays.make(
            f"{array.name} by heads",
            array.elements if splits else arrays.elements(node),
            arrays.types.compute,
            *array.sources,
        )
        for array in inputs
    ]


def _weights(arrays: Arrays, node: Node, q: Buffer, k: Buffer) -> Buffer:
    """Tell s and p."""
    size, item_bytes = _scores(arrays, node), arrays.types.total
    s = arrays.make("s", size, item_bytes, q, k)
    return arrays.make("p", size, item_bytes, arrays.make("s masked", size, item_bytes, s))


def _scores(arrays: Arrays, node: Node) -> int:
    """Return the elements of s and of p on a device."""
    heads = node.kind.num_heads // node.num_tensor_devices
    return heads * arrays.columns(node) * node.shape.positions


FORWARD: dict[type, Callable[[Arrays, Node, list[Array]], Array]] = {
    kinds.Activation: activation,
    kinds.Dropout: dropout,
    kinds.RMSNorm: norm,
    kinds.LayerNorm: norm,
    kinds.Softmax: norm,
    kinds.Sum: total,
    kinds.TokenMean: total,
    kinds.Slice: total,
    kinds.Dense: dense,
    kinds.Embedding: embedding,
    kinds.Attention: attention,
    kinds.Concatenate: concatenate,
    Gather: gather,
    Whole: gather,
    Turn: turn,
}
BACKWARD: dict[type, Callable[[Arrays, Node, Array], list[Array]]] = {
    kinds.Dropout: dropout_back,
    kinds.RMSNorm: norm_back,
    kinds.LayerNorm: norm_back,
    kinds.Sum: passed_back,
    kinds.Shift: passed_back,
    kinds.Positions: passed_back,
    kinds.Dense: dense_back,
    kinds.Embedding: embedding_back,
    kinds.Attention: attention_back,
    kinds.Concatenate: concatenate_back,
    Gather: gather_back,
    Whole: gather_back,
    Turn: turn_back,
}
