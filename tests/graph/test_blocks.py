"""Ready-made graphs are what one writes by hand, and verify agrees on each of them.

A failure here with test_rules.py right is one of how a block is put together.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of
from tests.tolerances import FLOAT64
from tpmlp.graph import (
    gated_mlp_block,
    residual_mlp_block,
    sparse_autoencoder,
    transformer_block,
)

WIDTH, TOKENS, HEADS, KV_HEADS, BATCH = 24, 5, 4, 2, 3
SIZES = [(1, 2, 2), (1, 4, 1), (2, 1, 2)]


def norm(h: jax.Array, scale: jax.Array) -> jax.Array:
    return h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6) * scale


def turned(heads: jax.Array) -> jax.Array:
    """Turn the two halves of each head by angles that grow with the place; [B, T, H, d]."""
    half = heads.shape[-1] // 2
    angles = jnp.outer(jnp.arange(TOKENS), 1e4 ** (-jnp.arange(half) / half))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = heads[..., :half], heads[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def block(p: Any, x: jax.Array) -> jax.Array:
    """Compute a pre-norm transformer block with grouped heads and a SwiGLU, on one device."""
    W = {name: mine["W"] for name, mine in p.items() if "W" in mine}
    h = norm(x, p["attended norm"]["scale"])
    q, k, v = (
        (h @ W[name].T).reshape(BATCH, TOKENS, heads, -1)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    )
    q, k = turned(q), turned(k)
    seen = []
    for head in range(HEADS):
        mine = head // (HEADS // KV_HEADS)
        scores = q[:, :, head] @ k[:, :, mine].swapaxes(1, 2) / np.sqrt(WIDTH // HEADS)
        later = np.triu(np.ones((TOKENS, TOKENS), bool), 1)
        seen.append(jax.nn.softmax(jnp.where(later, -jnp.inf, scores)) @ v[:, :, mine])
    x = x + jnp.concatenate(seen, axis=-1) @ W["mixed"].T
    h = norm(x, p["gated norm"]["scale"])
    gate = h @ W["gate"].T
    return x + (gate / (1 + jnp.exp(-gate)) * (h @ W["up"].T)) @ W["down"].T


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_transformer_block_is_the_one_written_by_hand(sizes):
    graph = transformer_block(WIDTH, TOKENS, num_heads=HEADS, num_kv_heads=KV_HEADS, hidden=20)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda spec: rng.normal(size=spec.shape) / 3, graph.parameters)
    x, y = (rng.normal(size=(BATCH, TOKENS, WIDTH)) for _ in range(2))

    def objective(params: Any) -> jax.Array:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return jnp.mean((block(params, jnp.asarray(x)) - y) ** 2)

    wanted, expected = jax.jit(jax.value_and_grad(objective))(params)
    mesh = mesh_of(sizes)
    step = tpmlp.value_and_grad(graph, loss="mse", mesh=mesh)
    loss, grads = step(tpmlp.from_numpy(graph, params, mesh), x, y)
    assert abs(loss - wanted) <= FLOAT64 * wanted
    got = tpmlp.to_numpy(graph, grads)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= FLOAT64 * np.abs(b).max()


READY_MADE = {
    "gated": (gated_mlp_block(9, 14), "mse"),
    "residual": (residual_mlp_block(9, 14), "mse"),
    "sparse": (sparse_autoencoder(9, 14, sparsity=0.1), "mse"),
}


@pytest.mark.parametrize("name", READY_MADE)
def test_verify_agrees(name):
    graph, loss = READY_MADE[name]
    report = tpmlp.verify(graph, mesh_of((2, 2, 1)), loss=loss, kind="float64", batch_size=4)
    assert report.ok, report
