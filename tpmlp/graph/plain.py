"""Graphs on one device, as one writes them without this package: what the rules are checked by.

Arrays are whole, at logical widths, samples first; gradients are jax.grad's. Nothing here is shared
with the rules but the activations and the random bits of dropout.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from tpmlp.activations import activate
from tpmlp.graph import kinds
from tpmlp.graph.shape import seed_of
from tpmlp.graph.structure import Structure
from tpmlp.graph.vertex import Vertex

Params = Mapping[str, Mapping[str, jax.Array]]
Function = Callable[..., jax.Array]


def outputs(
    graph: Structure,
    params: Params,
    inputs: Mapping[str, jax.Array],
    *,
    words: jax.Array | None = None,
    added: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Compute r of every vertex.

    Args:
        graph: the graph.
        params: whole arrays {vertex: {parameter: array}}, logical.
        inputs: by source, [B, width], [B, T, width] or ids [B, T].
        words: two words of random bits; None drops nothing.
        added: what is added to r of vertices; the gradient by it is g of the vertex.
    """
    values: dict[str, jax.Array] = {}
    for vertex in graph.order:
        r = inputs[vertex.name] if isinstance(vertex.kind, kinds.Source) else None
        if r is None:
            mine = params.get(vertex.share or vertex.name, {})
            r = compute(vertex, mine, [values[name] for name in vertex.inputs], words)
        if added and vertex.name in added:
            r = r + added[vertex.name]
        values[vertex.name] = r
    return values


def activity(graph: Structure, values: Mapping[str, jax.Array], share: jax.Array) -> jax.Array:
    """Return what vertices add to the objective; `share` [B] is what each sample counts."""
    read = [(v, values[v.inputs[0]]) for v in graph.order if v.inputs]
    return sum((activity_of(vertex, h, share) for vertex, h in read), jnp.zeros(()))


def activity_of(vertex: Vertex, h: jax.Array, share: jax.Array) -> jax.Array:
    """Return what one vertex that reads h adds to the objective."""
    if not isinstance(vertex.kind, kinds.ActivityL1):
        return jnp.zeros(())
    # |h|, with the derivative 0 at 0, where half of a rectified code is; that of jnp.abs is 1.
    sizes = (h * jnp.sign(h)).sum(axis=-1)
    sizes = sizes if sizes.ndim == 1 else sizes.mean(axis=1)
    return vertex.kind.coefficient * jnp.sum(sizes * share)


def compute(
    vertex: Vertex, params: Any, inputs: Sequence[jax.Array], words: jax.Array | None
) -> jax.Array:
    """Compute r of one vertex from its parameters and its inputs."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        if isinstance(vertex.kind, kinds.Dropout):
            return _dropout(vertex.kind, vertex.name, inputs[0], words)
        return PLAIN[type(vertex.kind)](vertex.kind, params, *inputs)


def _dense(kind: Any, params: Any, h: jax.Array) -> jax.Array:
    z = h @ params["W"].T
    return z + params["b"] if kind.bias else z


def _sum(kind: Any, params: Any, *inputs: jax.Array) -> jax.Array:
    return sum(inputs[1:], inputs[0])


def _product(kind: Any, params: Any, *inputs: jax.Array) -> jax.Array:
    return reduce(jnp.multiply, inputs)


def _rms_norm(kind: Any, params: Any, h: jax.Array) -> jax.Array:
    mean = jnp.mean(h * h, axis=-1, keepdims=True)
    return params["scale"] * h / jnp.sqrt(mean + kind.epsilon)


def _layer_norm(kind: Any, params: Any, h: jax.Array) -> jax.Array:
    mean, variance = h.mean(axis=-1, keepdims=True), h.var(axis=-1, keepdims=True)
    return params["scale"] * (h - mean) / jnp.sqrt(variance + kind.epsilon) + params["shift"]


def _attention(kind: Any, params: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    B, T, width = q.shape
    size = width // kind.num_heads
    q, k, v = (a.reshape(B, T, -1, size) for a in (q, k, v))
    if kind.rotary:
        q, k = _rotary(q), _rotary(k)
    group = kind.num_heads // kind.kv_heads
    k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5
    if kind.causal:
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(B, T, width)


def _rotary(a: jax.Array) -> jax.Array:
    """Turn pairs of features (i, i + d/2), as complex numbers; a is [B, T, heads, d]."""
    half = a.shape[-1] // 2
    rate = 10_000.0 ** (-jnp.arange(half, dtype=a.dtype) / half)
    angle = jnp.arange(a.shape[1], dtype=a.dtype)[:, None, None] * rate
    turned = (a[..., :half] + 1j * a[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def _dropout(kind: Any, name: str, h: jax.Array, words: jax.Array | None) -> jax.Array:
    if words is None or kind.rate == 0:
        return h
    columns = h.reshape(-1, h.shape[-1])
    token, feature = (jax.lax.broadcasted_iota(jnp.uint32, columns.shape, dim) for dim in (0, 1))
    key = [
        jnp.full(columns.shape, word) for word in (words[0] ^ jnp.uint32(seed_of(name)), words[1])
    ]
    bits, _ = threefry2x32_p.bind(*key, token, feature)
    kept = (bits >= jnp.uint32(round(kind.rate * 2**32))).reshape(h.shape)
    return jnp.where(kept, h / (1 - kind.rate), 0)


PLAIN: dict[type, Function] = {
    kinds.Dense: _dense,
    kinds.Activation: lambda kind, params, z: activate(kind.sigma, z),
    kinds.Sum: _sum,
    kinds.Product: _product,
    kinds.Concatenate: lambda kind, params, *h: jnp.concatenate(h, axis=-1),
    kinds.Slice: lambda kind, params, h: h[..., kind.start : kind.stop],
    kinds.Scale: lambda kind, params, h: params["scale"] * h,
    kinds.Shift: lambda kind, params, h: h + params["shift"],
    kinds.Positions: lambda kind, params, h: h + params["shift"].T,
    kinds.RMSNorm: _rms_norm,
    kinds.LayerNorm: _layer_norm,
    kinds.Softmax: lambda kind, params, z: jax.nn.softmax(z, axis=-1),
    kinds.Attention: _attention,
    kinds.Embedding: lambda kind, params, ids: params["W"][ids],
    kinds.TokenMean: lambda kind, params, h: h.mean(axis=1),
    kinds.ActivityL1: lambda kind, params, h: h,
    kinds.Function: lambda kind, params, *h: kind.function(*h).astype(h[0].dtype),
}
