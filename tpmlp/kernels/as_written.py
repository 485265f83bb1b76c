"""Arithmetic as it is written: a function whose operations no compiler pass may join or rewrite.

XLA simplifies what it sees: a / b / c becomes a / (b c), a division by a number a product with its
inverse; and LLVM makes one operation with one rounding of a product and a sum, a dot of one term
among the products. Each is as good as the other but rounds otherwise, and which rules apply depends
on the program around. So the bits of each result here are taken through an exclusive or with a 0
that is known only when the program runs, and no rule sees more than one operation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.extend.core.primitives import closed_call_p, div_p, jit_p

from tpmlp import xla

# These round nothing.
_MOVES = frozenset(
    {
        "concatenate",
        "copy",
        "dynamic_slice",
        "reshape",
        "select_n",
        "slice",
        "split",
        "squeeze",
        "transpose",
    }
)

# Of a program of one operation, which JAX asks for.
_NO_NAMES = DebugInfo("operation", "operation of as_written", None, None)


def as_written(function: Callable[..., Any], zero: jax.Array) -> Callable[..., Any]:
    """Return a function that computes the same, one operation at a time.

    Args:
        function: of arrays; its loops, branches and custom derivatives are one operation each.
        zero: an int32 0 that the compiler does not know (xla.unknown_zero).
    """

    def run(*args: jax.Array) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _run(closed.jaxpr, closed.consts, args, zero)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return run


def _run(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], zero: jax.Array
) -> list[jax.Array]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = list(map(read, eqn.invars))
        if eqn.primitive in (jit_p, closed_call_p):
            inner = eqn.params["jaxpr" if eqn.primitive is jit_p else "call_jaxpr"]
            results = _run(inner.jaxpr, inner.consts, operands, zero)
        else:
            results = _operation(eqn, operands)
            if eqn.primitive.name not in _MOVES:
                results = [sealed(result, zero) for result in results]
        values.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _operation(eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
    """Run one equation of a jaxpr."""
    if eqn.primitive is div_p and _is_float(operands[0]):
        # XLA takes a choice that is the same for all elements through a broadcast, and would see
        # that the divisor is one number. This one it would have to know of each.
        x, y = jnp.broadcast_arrays(*operands)
        never_of_each = lax.gt(x, lax.full_like(x, jnp.inf))
        return [lax.div(x, lax.select(never_of_each, lax.full_like(y, 1), y))]
    values = {a: x for a, x in zip(eqn.invars, operands, strict=True) if isinstance(a, Var)}
    alone = Jaxpr((), list(values), eqn.outvars, [eqn], eqn.effects, _NO_NAMES)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*values.values())


def sealed(result: jax.Array, zero: jax.Array) -> jax.Array:
    """Hide floats; not those of constants alone, which differ over fewer mesh axes than the zero.

    Their bits are the same in every program, and as JAX traced the function they must not differ.
    """
    computed = differs_over(jax.typeof(zero)) <= differs_over(jax.typeof(result))
    return xla.hidden(result, zero) if _is_float(result) and computed else result


def differs_over(type_: Any) -> frozenset[str]:
    """Return the mesh axes that an array of a type differs over; none outside a shard_map."""
    return type_.manual_axis_type.varying if type_.manual_axis_type else frozenset()


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)
