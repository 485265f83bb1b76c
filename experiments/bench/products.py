"""The products of a step and nothing else: what no program on these devices can save.

Every device multiplies blocks of the shapes that the alternating layout gives it, for all layers
in one program, without a collective. There the partial sums of z_l have the shape of the gathered
h_{l+1}, so each product can feed the next, and none can be left out or merged with another:

    z_l  = W_l h_l        h_{l+1} = z_l
    dW_l = g_l h_l^T
    dh_l = W_l^T g_l      g_{l-1} = dh_l       (not for l = 1)

The numbers mean nothing; the FLOPs are those of a step.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import tpmlp
from experiments.bench.problem import Problem
from experiments.bench.timing import DType, Label, Program, make_program


def products_alone(problem: Problem, shape: tuple[int, int], dtype: DType) -> Program:
    """Return the products of one step on X x Y devices, compiled."""
    x, y = shape
    mesh = tpmlp.make_mesh(x=x, y=y)
    in_turn = (PartitionSpec("x", "y"), PartitionSpec("y", "x"))
    specs = [in_turn[index % 2] for index in range(problem.size.layers)]
    samples = PartitionSpec("y", None)

    def put(array: Any, spec: PartitionSpec) -> jax.Array:
        return jax.device_put(jnp.asarray(array, dtype), NamedSharding(mesh, spec))

    weights = [put(W, spec) for (W, _), spec in zip(problem.layers, specs, strict=True)]
    # dh_2 is a result, a different one on every device: without it nothing would need the last
    # product of the recursion.
    run = jax.shard_map(_chain, mesh=mesh, in_specs=(specs, samples), out_specs=(specs, in_turn[0]))
    label = Label(
        group="products", variant="products alone", mesh=f"{x}x{y}", devices=x * y, dtype=dtype
    )
    return make_program(label, jax.jit(run), weights, put(problem.x.T, samples))


def _chain(weights: list[jax.Array], h: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Multiply one device's blocks: W_l [O/g, I/s], h_1 [I/s, B]."""
    inputs = [h]
    for W in weights:
        inputs.append(_product("oi,ib->ob", W, inputs[-1]).astype(h.dtype))
    g = inputs.pop()
    dW: list[jax.Array] = []
    for index, (W, h) in reversed(list(enumerate(zip(weights, inputs, strict=True)))):
        dW.append(_product("ob,ib->oi", g, h))
        if index:
            g = _product("oi,ob->ib", W, g).astype(h.dtype)
    return dW[::-1], g


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
