"""Running errors: a function in float64, and how far rounding may have put any evaluation of it.

The function is traced to its operations, and each passes on a bound beside its value: what the
errors of its operands become, and its own rounding. With u the unit roundoff, an operation errs by
at most u times its result, a library function by a few units, and a sum of n terms in any order by
gamma_n times the sum of their sizes. A conversion to a narrower type is one rounding to it. To
first order, as running errors are.

References: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from tpmlp.inspection.bounds import ELEMENTWISE_ROUNDINGS, EXACT_ROUNDOFF, Roundoff

# These move numbers, and their errors with them.
MOVES = frozenset(
    [
        *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice"),
        *("expand_dims", "gather", "imag", "pad", "real", "reshape", "rev", "slice", "split"),
        *("squeeze", "stop_gradient", "transpose"),
    ]
)

# One rounding of a linear function.
SIGNED_SUMS = frozenset({"add", "add_any", "sub", "neg"})

# Of one operand, smooth where the error is small.
FUNCTIONS = frozenset(
    [
        *("abs", "cbrt", "cos", "cosh", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1"),
        *("integer_pow", "log", "log1p", "logistic", "rsqrt", "sin", "sinh", "sqrt", "square"),
        *("tan", "tanh"),
    ]
)

# The jaxpr of a function that is called.
CALLS = {
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


class Bounded(NamedTuple):
    """A number in float64 and how far a computed one may be from it.

    Attributes:
        value: the exact number; or integers and booleans, which have no error.
        error: at most, elementwise, real; None for integers and booleans.
    """

    value: Any
    error: Any


def with_errors(
    function: Callable[..., Any], args: Any, roundoff: Roundoff, *, of_inputs: float = 0.0
) -> Any:
    """Return what a function gives, every array a Bounded; needs 64-bit types.

    Args:
        function: of arrays, without loops.
        args: float64 arrays and integers.
        roundoff: of the types in which it was computed.
        of_inputs: the relative error of the floating arguments.

    Raises:
        NotImplementedError: an operation that is not known here, with its name.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    given = [_given(array, of_inputs) for array in jax.tree.leaves(args)]
    consts = [_constant(const, roundoff) for const in closed.consts]
    results = _Run(roundoff).jaxpr(closed.jaxpr, consts, given)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _given(array: Any, relative: float) -> Bounded:
    value = _wide(jnp.asarray(array))
    return Bounded(value, _size(value) * relative if _rounds(value) else None)


def _constant(array: Any, roundoff: Roundoff) -> Bounded:
    """Return a constant of a program, which is rounded to the type of its arithmetic."""
    constant = _given(array, roundoff.total)
    if constant.error is None:
        return constant
    parts = jnp.real(constant.value), jnp.imag(constant.value)
    is_whole = jnp.all(jnp.stack([jnp.round(part) == part for part in parts]), axis=0)
    return Bounded(constant.value, jnp.where(is_whole, 0.0, constant.error))


def _size(array: Any) -> jax.Array:
    """Return |a|; 0 of infinities, which stay what they are: what is masked is -inf."""
    size = jnp.abs(array)
    return jnp.where(jnp.isfinite(size), size, 0.0)


def _wide(array: jax.Array) -> jax.Array:
    """Return floating numbers in float64, complex ones in complex128."""
    if not _rounds(array):
        return array
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    return array.astype(jnp.complex128 if is_complex else jnp.float64)


def _rounds(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.inexact)


class _Run:
    """The operations of a function, one after another."""

    def __init__(self, roundoff: Roundoff) -> None:
        self.roundoff, self.u = roundoff, roundoff.total + EXACT_ROUNDOFF

    def jaxpr(self, jaxpr: Jaxpr, consts: list[Bounded], args: list[Bounded]) -> list[Bounded]:
        """Run all operations of a jaxpr."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(atom: Any) -> Bounded:
            if not isinstance(atom, Literal):
                return known[atom]
            aval: Any = atom.aval
            return _constant(jnp.asarray(atom.val, aval.dtype), self.roundoff)

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self.run(eqn, list(map(read, eqn.invars))), strict=True))
        return list(map(read, jaxpr.outvars))

    def run(self, eqn: JaxprEqn, operands: list[Bounded]) -> list[Bounded]:
        """Run one operation."""
        if eqn.primitive.name in CALLS:
            inner = eqn.params[CALLS[eqn.primitive.name]]
            consts = [_constant(const, self.roundoff) for const in getattr(inner, "consts", ())]
            return self.jaxpr(getattr(inner, "jaxpr", inner), consts, operands)
        if eqn.primitive.name == "convert_element_type" and operands[0].error is not None:
            return [self.converted(operands[0], eqn.params["new_dtype"])]
        values = list(map(_wide, _bind(eqn, [operand.value for operand in operands])))
        if not any(map(_rounds, values)):
            return [Bounded(value, None) for value in values]
        if eqn.primitive.name in MOVES:
            return [Bounded(*pair) for pair in zip(values, _moved(eqn, operands), strict=True)]
        if len(values) > 1:
            raise NotImplementedError(eqn.primitive.name)
        (value,) = values
        return [Bounded(value, self.error(eqn, operands, value))]

    def converted(self, operand: Bounded, dtype: Any) -> Bounded:
        """Return a number in another type: not rounded here, but it may be, to a narrower one."""
        if not jnp.issubdtype(dtype, jnp.inexact):
            return Bounded(operand.value.astype(dtype), None)
        u = float(jnp.finfo(dtype).eps) / 2
        narrow = u * _size(operand.value) if u > self.roundoff.total else 0.0
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        value = operand.value if is_complex else jnp.real(operand.value)
        value = value.astype(jnp.complex128 if is_complex else jnp.float64)
        return Bounded(value, operand.error + narrow)

    def error(self, eqn: JaxprEqn, operands: list[Bounded], result: jax.Array) -> jax.Array:
        """Return the error of the result of an operation."""
        name, u = eqn.primitive.name, self.u
        values = [operand.value for operand in operands]
        errors = [_error_of(operand) for operand in operands]
        rounding = u * _size(result)
        if name in SIGNED_SUMS:
            return sum(errors, rounding if name != "neg" else jnp.zeros(()))
        if name == "complex":
            return errors[0] + errors[1]
        if name in ("mul", "div"):
            a, b = map(_size, values)
            if name == "mul":
                return a * errors[1] + b * errors[0] + errors[0] * errors[1] + rounding
            # Twice rounded where a compiler multiplies with the inverse.
            return (errors[0] + _size(result) * errors[1]) / jnp.abs(b) + 2 * rounding
        if name == "dot_general":
            return self.product(eqn, values, errors)
        if name in ("reduce_sum", "cumsum", "scatter-add", "scatter_add"):
            return self.sum(eqn, operands, errors)
        if name in ("max", "min"):
            return jnp.maximum(*errors)
        if name in ("reduce_max", "reduce_min"):
            return lax.reduce_max_p.bind(errors[0], **_only(eqn.params, "axes", "out_sharding"))
        if name == "select_n":
            return lax.select_n(values[0], *(jnp.broadcast_to(e, result.shape) for e in errors[1:]))
        if name in ("sign", "iota"):
            return jnp.zeros(result.shape)
        if name == "pow":
            return self.power(values, errors, result)
        if name in FUNCTIONS:
            return self.function(eqn, values[0], errors[0], result)
        raise NotImplementedError(name)

    def product(self, eqn: JaxprEqn, values: list[Any], errors: list[Any]) -> jax.Array:
        """Return the error of a product of arrays: one sum for each entry."""
        (contracted, _), _ = eqn.params["dimension_numbers"]
        num_terms = 1
        for dim in contracted:
            num_terms *= values[0].shape[dim]
        a, b = map(jnp.abs, values)

        def times(left: Any, right: Any) -> jax.Array:
            return lax.dot_general(left, right, eqn.params["dimension_numbers"])

        relative = self.roundoff.of_product(num_terms)
        return relative * times(a, b) + times(a, errors[1]) + times(errors[0], b + errors[1])

    def sum(self, eqn: JaxprEqn, operands: list[Bounded], errors: list[Any]) -> jax.Array:
        """Return the error of a sum of many terms, in any order."""
        arrays = [o.value if o.error is None else jnp.abs(o.value) for o in operands]
        moved = [o.value if o.error is None else e for o, e in zip(operands, errors, strict=True)]
        (sizes,), (carried,) = _bind(eqn, arrays), _bind(eqn, moved)
        if eqn.primitive.name == "reduce_sum":
            num_terms = operands[0].value.size // max(1, sizes.size)
        elif eqn.primitive.name == "cumsum":
            num_terms = operands[0].value.shape[eqn.params["axis"]]
        else:
            num_terms = operands[1].value.size + 1  # all may be added to one entry
        return self.roundoff.of_product(num_terms) * sizes + carried

    def power(self, values: list[Any], errors: list[Any], result: jax.Array) -> jax.Array:
        """Return the error of a ** b, to first order."""
        a, b = values
        size = jnp.abs(result)
        by_exponent = errors[1] + jnp.abs(b) * self.u  # the library's own logarithm
        grown = size * (jnp.abs(b) * errors[0] / jnp.abs(a) + jnp.abs(jnp.log(a)) * by_exponent)
        return grown + ELEMENTWISE_ROUNDINGS * self.u * size

    def function(self, eqn: JaxprEqn, a: Any, error: Any, result: jax.Array) -> jax.Array:
        """Return the error of a function of one number: |f'| times its operand's, and its own."""
        _, slope = jax.jvp(lambda a: _bind(eqn, [a])[0], (a,), (jnp.ones_like(a),))
        # Where the operand has no error its slope may be infinite.
        grown = jnp.where(error == 0, 0.0, jnp.abs(slope) * error)
        return grown + ELEMENTWISE_ROUNDINGS * self.u * _size(result)


def _error_of(operand: Bounded) -> Any:
    return jnp.zeros(jnp.shape(operand.value)) if operand.error is None else operand.error


def _moved(eqn: JaxprEqn, operands: list[Bounded]) -> list[Any]:
    """Return errors, which are real, moved as the operation moves numbers."""
    if eqn.primitive.name in ("real", "imag", "convert_element_type"):
        return [_error_of(operands[0])]  # none of integers made floating
    return _bind(eqn, [o.value if o.error is None else o.error for o in operands])


def _only(params: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: params[name] for name in names if name in params}


def _bind(eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
    results = eqn.primitive.bind(*operands, **eqn.params)
    return list(results) if eqn.primitive.multiple_results else [results]
