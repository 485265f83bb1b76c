"""Attention, its heads split over the tensor axes: each device has whole heads of q.

    s = q^T k / sqrt(d),   p = softmax of s over the keys,   r = p v          of each head

k and v come split like q where the devices divide their heads too: no collective. Where they are
too few they come whole, and every device takes those that its heads of q look at.

What is kept is q, k and v; p is computed again in the backward pass.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpmlp.collectives import block_index
from tpmlp.graph.placement import Node
from tpmlp.graph.rules.rule import Given, Gradients, Params, Reader, Rule
from tpmlp.layout import padded
from tpmlp.xla import after, unknown_zero

# The angles by which a pair of features is turned: place * BASE^(-2i/d), i the pair's number.
BASE = 10_000.0


class Heads(NamedTuple):
    """This device's q, k and v by heads, in the compute type.

    Attributes:
        q: [K, G, d, B, T], G heads for each of the K of k and v.
        k: [K, d, B, T].
        v: [K, d, B, T].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array


def attention(
    node: Node, params: Params, inputs: tuple[jax.Array, ...], given: Given
) -> tuple[jax.Array, Any]:
    """Compute r of each head."""
    heads = _heads(node, inputs, given)
    p = _weights(node, heads, given).astype(given.run.compute)
    r = jnp.einsum("kgbqt,kdbt->kgdbq", p, heads.v, preferred_element_type=given.run.total)
    return _joined(r), None


def attention_backward(
    node: Node, params: Params, read: Reader, residue: Any, g: jax.Array, given: Given
) -> Gradients:
    """Compute dv = p^T g, dp = g v^T, ds = p * (dp - sum of dp * p), dq = ds k, dk = ds^T q."""
    run = given.run
    heads = _heads(node, (read(0), read(1), read(2)), given)
    g_heads = run.to_compute(g).reshape(heads.q.shape)
    p = _weights(node, heads, given)
    dv = _product("kgbqt,kgdbq->kdbt", p.astype(run.compute), g_heads, run.total)
    dp = _product("kgdbq,kdbt->kgbqt", g_heads, heads.v, run.total)
    ds = p * (dp - jnp.sum(dp * p, axis=-1, keepdims=True))
    # Apart from what is before, or the CPU compiler fills an array of all weights with the scale,
    # once, and has it there from the first vertex of attention to the last.
    ds = after(ds, g_heads) * _scale(heads)
    ds = ds.astype(run.compute)
    dq = _product("kgbqt,kdbt->kgdbq", ds, heads.k, run.total)
    dk = _product("kgbqt,kgdbq->kdbt", ds, heads.q, run.total)
    if node.kind.rotary:
        dq, dk = _rotated(dq, -1), _rotated(dk, -1)
    return Gradients((_joined(dq), _kv_back(node, dk), _kv_back(node, dv)), {})


def _heads(node: Node, inputs: tuple[jax.Array, ...], given: Given) -> Heads:
    q, k, v = map(given.run.to_compute, inputs)
    q = _split(node, q, node.kind.num_heads // node.num_tensor_devices)
    k, v = _kv(node, k), _kv(node, v)
    if node.kind.rotary:
        q, k = (_rotated(a.astype(given.run.total), 1).astype(a.dtype) for a in (q, k))
    return Heads(q.reshape(k.shape[0], -1, *q.shape[1:]), k, v)


def _kv(node: Node, array: jax.Array) -> jax.Array:
    """Return the heads of k or v for this device's heads of q, [K, d, B, T]."""
    kind = node.kind
    if kind.splits_kv(node.num_tensor_devices):
        return _split(node, array, kind.kv_heads // node.num_tensor_devices)
    whole = array[: node.input_shapes[1].features]
    return _split(node, whole, kind.kv_heads)[_looked_at(node)]


def _kv_back(node: Node, grad: jax.Array) -> jax.Array:
    """Return the gradient of k or v from that of `_kv`, its transpose: of whole ones a part."""
    if node.kind.splits_kv(node.num_tensor_devices):
        return _joined(grad)
    width = node.input_shapes[1].features
    # Zeros that the compiler knew would be made at the start of the step, for all such vertices.
    zeros = jnp.full((node.kind.kv_heads, *grad.shape[1:]), unknown_zero(grad), grad.dtype)
    whole = _joined(zeros.at[_looked_at(node)].add(grad))
    return jnp.pad(whole, ((0, padded(width, node.num_blocks) - width), (0, 0)))


def _looked_at(node: Node) -> jax.Array:
    """Return the number of the head of k and v for each of this device's heads of q."""
    num = node.kind.num_heads // node.num_tensor_devices
    first = block_index("F/s/g", **node.axes) * num
    group = node.kind.num_heads // node.kind.kv_heads
    return (first + jnp.arange(num, dtype=jnp.int32)) // group


def _weights(node: Node, heads: Heads, given: Given) -> jax.Array:
    """Compute p, [K, G, B, T (of q), T (of k)], in the total type."""
    s = _product("kgdbq,kdbt->kgbqt", heads.q, heads.k, given.run.total) * _scale(heads)
    if node.kind.causal:
        queries, keys = (jax.lax.broadcasted_iota(jnp.int32, s.shape, dim) for dim in (3, 4))
        s = jnp.where(keys <= queries, s, -jnp.inf)
    return jax.nn.softmax(s, axis=-1)


def _scale(heads: Heads) -> float:
    return heads.q.shape[2] ** -0.5


def _rotated(array: jax.Array, direction: int) -> jax.Array:
    """Turn pairs of features (i, i + d/2) of heads [..., d, B, T] by angles that grow with T."""
    size, num_tokens = array.shape[-3], array.shape[-1]
    pair = jnp.arange(size // 2, dtype=array.dtype)[:, None, None]
    place = jnp.arange(num_tokens, dtype=array.dtype)[None, None, :]
    angle = direction * place * BASE ** (-2 * pair / size)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    shape = (1,) * (array.ndim - 3) + angle.shape
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(array, 2, axis=-3)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-3)


def _split(node: Node, array: jax.Array, num_heads: int) -> jax.Array:
    """Return an array "F B" by heads and tokens, [num_heads, d, B, T]."""
    tokens = node.shape.positions
    return array.reshape(num_heads, array.shape[0] // num_heads, -1, tokens)


def _joined(array: jax.Array) -> jax.Array:
    """Return heads [.., d, B, T] as an array "F B"."""
    return array.reshape(-1, array.shape[-2] * array.shape[-1])


def _product(formula: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=dtype)


ATTENTION = Rule(attention, attention_backward, reads=None)
